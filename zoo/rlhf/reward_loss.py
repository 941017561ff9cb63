"""Losses of reward models, and how well differences of scores agree with preferences.

Shape suffixes: B prompts, K answers of a prompt, the best one first; P = K (K - 1) / 2 pairs of these; N pairs of any origin;
T tokens. Sources: InstructGPT, arXiv 2203.02155, equation 1 (``last``, ranked answers); DeepSpeed-Chat, reward_model.py
(``per_token``).
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RewardLoss", "RewardLossKind", "calibration_sums", "last_values", "pairwise_accuracy", "reward_loss"]

RewardLossKind = Literal["last", "per_token"]


class RewardLoss(NamedTuple):
    """Loss of a batch of ranked answers.

    Attributes:
        loss: Mean over prompts, with gradient.
        loss_B: That of each prompt, a mean over its pairs, without gradient.
        score_BK: Values at the last tokens, without gradient.
        difference_BP: Score of the better minus that of the worse answer of each pair, without gradient.
    """

    loss: Tensor
    loss_B: Tensor
    score_BK: Tensor
    difference_BP: Tensor


def last_values(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The value at the last token of each row, whatever padding (mask 0) stands before or behind, (B, T) to (B,)."""
    place_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    last_B1 = ((mask_BT > 0) * place_T).argmax(1, keepdim=True)
    return value_BT.gather(1, last_B1).squeeze(1)


def reward_loss(
    value_BKT: Tensor, ids_BKT: Tensor, mask_BKT: Tensor, kind: RewardLossKind = "last", margin: float = 0.0
) -> RewardLoss:
    """``-log sigmoid(v_w - v_l - margin)``, averaged over the pairs of each prompt, and over prompts.

    ``last`` compares the values at the last tokens. ``per_token`` averages over the tokens of each pair, from the first one in
    which the two rows differ to the later end; behind the end of the shorter row its values at padding count, as in the source,
    and equal rows count at their last token.

    Args:
        value_BKT: Value of each token, float32 at least.
        ids_BKT: Ids of each answer with its prompt.
        mask_BKT: 1 for tokens, 0 for padding behind them.
        kind: Compared values.
        margin: Difference that the model shall exceed.

    Raises:
        ValueError: If there is no such kind, or a prompt has fewer than two answers.

    Example:
        >>> reward_loss(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2, 3)).loss
        tensor(0.6931)
    """
    B, K, _ = value_BKT.shape
    if kind not in get_args(RewardLossKind) or K < 2:
        raise ValueError(f"reward_loss: kind={kind!r} must be last or per_token, and {K} answers of a prompt at least 2.")
    better_P, worse_P = torch.triu_indices(K, K, 1, device=value_BKT.device)
    score_BK = last_values(value_BKT.flatten(0, 1), mask_BKT.flatten(0, 1)).view(B, K)
    difference_BP = score_BK[:, better_P] - score_BK[:, worse_P]
    if kind == "last":
        loss_BP = -F.logsigmoid(difference_BP - margin)
    else:
        counts_BPT = _told_apart(ids_BKT[:, better_P], ids_BKT[:, worse_P], mask_BKT[:, better_P] > 0, mask_BKT[:, worse_P] > 0)
        loss_BPT = -F.logsigmoid(value_BKT[:, better_P] - value_BKT[:, worse_P] - margin)
        loss_BP = loss_BPT.masked_fill(~counts_BPT, 0).sum(-1) / counts_BPT.sum(-1)
    loss_B = loss_BP.mean(1)
    return RewardLoss(loss_B.mean(), loss_B.detach(), score_BK.detach(), difference_BP.detach())


def _told_apart(ids_BPT: Tensor, other_ids_BPT: Tensor, mask_BPT: Tensor, other_mask_BPT: Tensor) -> Tensor:
    """Tokens of pairs of rows from the first one that differs to the later end, bool (B, P, T); the last one of equal rows."""
    either_BPT = mask_BPT | other_mask_BPT
    differs_BPT = ((ids_BPT != other_ids_BPT) | (mask_BPT != other_mask_BPT)) & either_BPT
    last_BPT = either_BPT & ~F.pad(either_BPT[..., 1:], (0, 1))
    return torch.where(differs_BPT.any(-1, keepdim=True), differs_BPT.cumsum(-1) > 0, last_BPT) & either_BPT


def pairwise_accuracy(difference_N: Tensor) -> Tensor:
    """Share of pairs whose better answer has the higher score; equal scores count a half.

    Args:
        difference_N: Score of the better minus that of the worse answer.
    """
    return _right(difference_N).mean()


def calibration_sums(difference_N: Tensor, num_bins: int = 10) -> Tensor:
    """Sums for the expected calibration error, float64 (num_bins,), which add up over batches.

    A pair with difference d is decided with confidence ``sigmoid(|d|)``. Bins divide confidences from 1/2 to 1 evenly; each sum
    is that of confidence minus rightness. The error is the sum of their absolute values divided by the number of pairs.

    Args:
        difference_N: Score of the better minus that of the worse answer.
        num_bins: Number of bins.
    """
    confidence_N = difference_N.double().abs().sigmoid()
    bin_N = ((2 * confidence_N - 1) * num_bins).long().clamp(max=num_bins - 1)
    return confidence_N.new_zeros(num_bins).index_add(0, bin_N, confidence_N - _right(difference_N))


def _right(difference_N: Tensor) -> Tensor:
    return (difference_N.sign().double() + 1) / 2
