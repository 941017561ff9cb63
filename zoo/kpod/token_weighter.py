"""Weights of a rationale's tokens: a module learns which of them may be masked without harm to the answer.

With ``w`` the probability that a token is kept, ``m`` a relaxed draw of it, and k uniform in 1 ... L, the loss of an example is

    mean_k CE(answer | question, first k tokens of the masked rationale) + alpha mean_j m_j,

Eq. 2 to 7 divided by the number L of the rationale's tokens. Source: Feng et al., "Keypoint-based Progressive Chain-of-Thought
Distillation for LLMs", ICML 2024, arXiv 2405.16064.

Shape suffixes: B examples, S places of a row, P places of question and rationale, A tokens of an answer, K prefixes, T places of
a row with K answers, D width, E width of the student's embedding, H heads, W width of a head, V vocabulary, N counted tokens.
"""

import copy
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.base.random import SampleRandom
from zoo.lm.backbone import Backbone
from zoo.lm.cross_entropy import IGNORED
from zoo.lm.positions import pad_right

__all__ = [
    "AnswerPredictor",
    "DividedRows",
    "MaskLearner",
    "PrefixSamples",
    "WeightHead",
    "divide_rows",
    "draw_prefixes",
    "relaxed_mask",
]

PrefixSamples = int | Literal["all"]


class DividedRows(NamedTuple):
    """Rows of question, rationale and answer, taken apart.

    Attributes:
        ids_BP: Question and rationale, padded on the right.
        rationale_BP: Tokens of the rationale, bool.
        question_B: Number of tokens of the question.
        answer_BA: Answers in the vocabulary of the predictor, -100 behind the end.
    """

    ids_BP: Tensor
    rationale_BP: Tensor
    question_B: Tensor
    answer_BA: Tensor

    @property
    def rationale_B(self) -> Tensor:
        """Number L of tokens of the rationale."""
        return self.rationale_BP.sum(1)


def divide_rows(batch: Mapping[str, Tensor]) -> DividedRows:
    """Take rows apart.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``labels`` and ``step_ids`` (B, S), int64: labels are -100 on question and
            padding, numbers of steps are at least 0 on the rationale alone; the answer is what remains, the end of the row.
    """
    step_BS, label_BS = batch["step_ids"], batch["labels"]
    is_answer_BS = (label_BS != IGNORED) & (step_BS < 0)
    length_B = (batch["attention_mask"].bool() & ~is_answer_BS).sum(1)
    P, A = int(length_B.max()), max(1, int(is_answer_BS.sum(1).max()))
    answer_BS, there_BS = pad_right(label_BS, is_answer_BS)
    rationale_BP = step_BS[:, :P] >= 0
    return DividedRows(
        batch["input_ids"][:, :P],
        rationale_BP,
        length_B - rationale_BP.sum(1),
        answer_BS.masked_fill(there_BS == 0, IGNORED)[:, :A],
    )


class WeightHead(nn.Module):
    """Attention among the tokens of a rationale, with rotary positions, and a perceptron: one logit a token.

    Args:
        width: E.
        heads: H.
        bias: Logit at the start, without the weights' part; 1.5 keeps a token with probability 0.82.

    Raises:
        ValueError: If the width is not a multiple of twice the heads.
    """

    def __init__(self, width: int, heads: int = 8, bias: float = 1.5) -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise ValueError(f"heads={heads}: twice that must divide the width {width} of the student's embedding.")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        last = nn.Linear(width, 1)
        nn.init.constant_(last.bias, bias)
        self.perceptron = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), last)

    def forward(self, x_BPE: Tensor, rationale_BP: Tensor) -> Tensor:
        """Logits (B, P) of the probability that a token is kept; of no meaning outside of the rationale.

        Args:
            x_BPE: Embeddings of rows.
            rationale_BP: Tokens of the rationale, which see one another and nothing else.
        """
        B, P, E = x_BPE.shape
        q, k, v = self.query_key_value(self.norm(x_BPE)).view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        own_PP = torch.eye(P, dtype=torch.bool, device=x_BPE.device)
        mask_B1PP = (rationale_BP[:, None] | own_PP)[:, None]
        y_BHPW = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, attn_mask=mask_B1PP)
        e_BPE = x_BPE + self.output(y_BHPW.transpose(1, 2).reshape(B, P, E))
        return self.perceptron(e_BPE).squeeze(-1)


def _rotate(x_BHPW: Tensor) -> Tensor:
    """Turn pairs of elements by angles that grow with the place (rotary positions, base 10,000)."""
    P, W = x_BHPW.shape[-2:]
    place_P, pair = torch.arange(P, device=x_BHPW.device), torch.arange(W // 2, device=x_BHPW.device)
    angle = place_P[:, None] * 10_000.0 ** (-2 * pair / W)
    cos, sin = angle.cos().to(x_BHPW.dtype), angle.sin().to(x_BHPW.dtype)
    one, other = x_BHPW.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def relaxed_mask(logit: Tensor, uniform: Tensor, tau: float, hard: bool = False) -> Tensor:
    """Binary Gumbel-softmax ``m = sigmoid((logit + log u - log(1 - u)) / tau)``; 1 keeps a token.

    ``P(m > 1/2) = sigmoid(logit)`` for every tau.

    Args:
        logit: Of the probability that a token is kept.
        uniform: u in [0, 1), float64, of the same shape.
        tau: Temperature.
        hard: Round to 0 or 1, with the gradient of the relaxed mask ("straight-through"). Such masks collapse to 0 or 1
            everywhere in our measurements, see ``benchmarks/kpod_keypoints.py``.
    """
    m = torch.sigmoid((logit + torch.logit(uniform, eps=1e-15).to(logit.dtype)) / tau)
    return (m > 0.5).to(m.dtype) + (m - m.detach()) if hard else m


def draw_prefixes(length_B: Tensor, samples: PrefixSamples, random: SampleRandom) -> tuple[Tensor, Tensor]:
    """Prefixes of rationales, and their weights in the mean over all.

    Args:
        length_B: L, tokens of the rationales.
        samples: Number K of draws from 1 ... L with replacement; ``all``: each prefix once.
        random: Draws of the examples.

    Returns:
        Tokens that are read, int64 (B, K), and weights (B, K), whose sum is 1 for each example.
    """
    if samples == "all":
        k_K = torch.arange(1, max(1, int(length_B.max())) + 1, device=length_B.device)
        there_BK = k_K <= length_B[:, None].clamp(min=1)
        weight_BK = there_BK / there_BK.sum(1, keepdim=True)
        return torch.minimum(k_K, length_B[:, None]), weight_BK
    u_BK = random.uniform("prefix", (samples,), torch.float64)
    drawn_BK = (u_BK * length_B[:, None]).long() + 1
    return torch.minimum(drawn_BK, length_B[:, None]), torch.full(u_BK.shape, 1 / samples, device=u_BK.device)


class AnswerPredictor(nn.Module):
    """A language model that reads vectors of question and rationale, and predicts the answer.

    A causal model reads a row once, with one copy of the answer behind it for each prefix; a mask hides the rest of the rationale
    and the other copies (layers with a sliding window then see more than they would). An encoder-decoder model reads each
    prefix by itself.

    Args:
        backbone: The model.
        width: E, width of the vectors; they are mapped if it is not that of the model's own embedding.

    Raises:
        ValueError: If the model is an encoder.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        backbone.check_generates()
        self.backbone = backbone
        own = backbone.input_embedding.embedding_dim
        self.projection = nn.Linear(width, own, bias=False) if own != width else nn.Identity()

    def forward(self, context_BPE: Tensor, question_B: Tensor, prefix_BK: Tensor, answer_BA: Tensor) -> Tensor:
        """Cross-entropies (B, K) of answers after prefixes, in nats, summed over the tokens of an answer.

        Args:
            context_BPE: Vectors of question and rationale.
            question_B: Number of tokens of the question.
            prefix_BK: Number of tokens of the rationale that are read.
            answer_BA: Ids, -100 behind the end.
        """
        context, end_BK = self.projection(context_BPE), question_B[:, None] + prefix_BK
        causal = self.backbone.kind == "causal"
        hidden_BKAD = (self._in_one_row if causal else self._one_by_one)(context, end_BK, answer_BA)
        label_BKA = answer_BA[:, None].expand(hidden_BKAD.shape[:-1])
        counted_BKA = label_BKA != IGNORED
        logits_NV = self.backbone.logits(hidden_BKAD[counted_BKA])
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        loss_N = F.cross_entropy(logits_NV, label_BKA[counted_BKA], reduction="none")
        return loss_N.new_zeros(label_BKA.shape).masked_scatter(counted_BKA, loss_N).sum(-1)

    def _in_one_row(self, context_BPD: Tensor, end_BK: Tensor, answer_BA: Tensor) -> Tensor:
        (B, P, _), K, A = context_BPD.shape, end_BK.shape[1], answer_BA.shape[1]
        read_BAD = self.backbone.input_embedding(answer_BA[:, :-1].clamp(min=0)).to(context_BPD.dtype)
        place_P, place_A = (torch.arange(n, device=end_BK.device) for n in (P, A - 1))
        last_B1 = (answer_BA != IGNORED).sum(1, keepdim=True).sub(2).clamp(min=0)
        of_answer_BKA = end_BK[:, :, None] + torch.minimum(place_A, last_B1)[:, None]
        position_BT = torch.cat([place_P.expand(B, P), of_answer_BKA.flatten(1)], 1)
        T = position_BT.shape[1]
        seen_BTT = torch.zeros(B, T, T, dtype=torch.bool, device=end_BK.device)
        seen_BTT[:, :P, :P] = place_P[:, None] >= place_P
        seen_BTT[:, P:, :P] = place_P < end_BK.repeat_interleave(A - 1, 1)[:, :, None]
        earlier_AA = place_A[:, None] >= place_A
        seen_BTT[:, P:, P:] = torch.block_diag(*[earlier_AA] * K)
        x_BTD = torch.cat([context_BPD, read_BAD.repeat(1, K, 1)], 1)
        hidden_BTD = self.backbone(None, seen_BTT[:, None], position_BT, embeddings_BTE=x_BTD)
        before_BKD = hidden_BTD.gather(1, (end_BK - 1)[:, :, None].expand(B, K, hidden_BTD.shape[-1]))
        return torch.cat([before_BKD[:, :, None], hidden_BTD[:, P:].unflatten(1, (K, A - 1))], 2)

    def _one_by_one(self, context_BPD: Tensor, end_BK: Tensor, answer_BA: Tensor) -> Tensor:
        (P, D), (B, K) = context_BPD.shape[1:], end_BK.shape
        mask = torch.arange(P, device=end_BK.device) < end_BK[:, :, None]
        read_BA = F.pad(answer_BA[:, :-1].clamp(min=0), (1, 0), value=self.backbone.start_id)
        hidden = self.backbone(
            None,
            mask.flatten(0, 1).long(),
            decoder_ids_BT=read_BA.repeat_interleave(K, 0),
            embeddings_BTE=context_BPD[:, None].expand(B, K, P, D).flatten(0, 1),
        )
        return hidden.unflatten(0, (B, K))


class MaskLearner(nn.Module):
    """All that learns masks: the head of the weights, the vector of masked tokens, and the predictor of answers.

    Args:
        student: Model whose input embedding is read; a frozen copy of that is kept.
        predictor: Predicts answers; None: a copy of the student.
        heads: Of the attention among the tokens of a rationale.
        tau: Temperature of the masks.
        hard: Straight-through masks, which collapse; see `relaxed_mask`.
    """

    def __init__(
        self, student: Backbone, predictor: Backbone | None = None, heads: int = 8, tau: float = 1.0, hard: bool = False
    ) -> None:
        super().__init__()
        self.embedding = copy.deepcopy(student.input_embedding).requires_grad_(False)
        width = self.embedding.embedding_dim
        self.head = WeightHead(width, heads)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.predictor = AnswerPredictor(copy.deepcopy(student) if predictor is None else predictor, width)
        self.tau, self.hard = tau, hard

    def logits(self, rows: DividedRows) -> Tensor:
        """Logits (B, P) of the probability that a token is kept."""
        return self.head(self.embedding(rows.ids_BP).to(self.mask_embedding.dtype), rows.rationale_BP)

    def answer_loss(self, rows: DividedRows, mask_BP: Tensor, prefix_BK: Tensor, weight_BK: Tensor) -> Tensor:
        """Cross-entropies (B,) of answers after masked rationales, mean over prefixes.

        Args:
            rows: The examples.
            mask_BP: 1 keeps the vector of a token, 0 puts that of masked tokens there; without effect on the question.
            prefix_BK: See `draw_prefixes`.
            weight_BK: See `draw_prefixes`.
        """
        x_BPE = self.embedding(rows.ids_BP).to(self.mask_embedding.dtype)
        mask_BP1 = mask_BP.where(rows.rationale_BP, 1.0)[..., None]
        masked_BPE = mask_BP1 * x_BPE + (1 - mask_BP1) * self.mask_embedding
        loss_BK = self.predictor(masked_BPE, rows.question_B, prefix_BK, rows.answer_BA)
        return (loss_BK * weight_BK).sum(1)

    def forward(
        self, rows: DividedRows, random: SampleRandom, samples: PrefixSamples = 1, masked: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies of answers in nats, mean over prefixes (L_p / L), and means of the masks (L_m / L), (B,) each.

        Args:
            rows: The examples.
            random: Draws of the examples.
            samples: See `draw_prefixes`.
            masked: Whether tokens are masked; false while the predictor warms up.
        """
        logit_BP = self.logits(rows)
        uniform_BP = random.uniform("mask", tuple(logit_BP.shape[1:]), torch.float64)
        mask_BP = relaxed_mask(logit_BP, uniform_BP, self.tau, self.hard) if masked else 1 + 0 * logit_BP  # keeps the head in use
        mask_BP = mask_BP * rows.rationale_BP
        answer_B = self.answer_loss(rows, mask_BP, *draw_prefixes(rows.rationale_B, samples, random))
        return answer_B, mask_BP.sum(1) / rows.rationale_B.clamp(min=1)
