"""Loss of a student on rationales: weights of tokens, and steps that are given instead of learned.

    sum_j w_j (- log P(r_j | r_<j, x)) + a sum_j (- log P(y_j | y_<j, r, x)),    j over tokens of the steps that are not given,

divided by the number of these tokens and of the answer's. Source: Feng et al., ICML 2024, arXiv 2405.16064, Eq. 15.

Shape suffixes: B examples, S places of a row, E places that an encoder reads, U places of a decoder, V vocabulary.
"""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from zoo.lm.cross_entropy import IGNORED
from zoo.lm.positions import pad_right

__all__ = ["WeightNorm", "keypoint_weights", "move_given_steps", "supervised_labels", "weighted_nll"]

WeightNorm = Literal["none", "mean1"]


def supervised_labels(label_BS: Tensor, step_BS: Tensor, given_B: Tensor) -> Tensor:
    """Labels without those of given steps, (B, S).

    Args:
        label_BS: Ids, -100 where nothing is learned.
        step_BS: Number of a rationale token's step, -1 elsewhere.
        given_B: Number of leading steps that are given.

    Example:
        >>> import torch
        >>> labels, steps = torch.tensor([[-100, 5, 6, 7]]), torch.tensor([[-1, 0, 1, -1]])
        >>> supervised_labels(labels, steps, torch.tensor([1])).tolist()
        [[-100, -100, 6, 7]]
    """
    return label_BS.masked_fill((step_BS >= 0) & (step_BS < given_B[:, None]), IGNORED)


def keypoint_weights(
    weight_BS: Tensor, step_BS: Tensor, norm: WeightNorm = "none", floor: float = 0.0, answer_weight: float = 1.0
) -> Tensor:
    """Factors of the tokens in the loss, (B, S): weights of the rationale, ``answer_weight`` elsewhere.

    Args:
        weight_BS: Weights of the rationale's tokens.
        step_BS: Number of a rationale token's step, -1 elsewhere.
        norm: ``mean1`` divides the weights of an example by their mean over its whole rationale.
        floor: Least weight, before they are divided; 0: the paper's.
        answer_weight: Of the answer's tokens.
    """
    of_rationale_BS = step_BS >= 0
    weight_BS = weight_BS.clamp(min=floor)
    if norm == "mean1":
        total_B1 = weight_BS.where(of_rationale_BS, 0.0).sum(1, keepdim=True)
        weight_BS = weight_BS * of_rationale_BS.sum(1, keepdim=True) / total_B1.clamp(min=1e-12)
    return weight_BS.where(of_rationale_BS, answer_weight)


def weighted_nll(logits: Tensor, label: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weighted negative log-likelihoods in nats, and the number of tokens that are supervised, whatever their weights.

    The mean of an optimizer step is the sum over all of its batches and processes, divided by the number over them.

    Args:
        logits: (..., V), of the token that ``label`` holds.
        label: (...), -100 where nothing is learned.
        weight: (...), see `keypoint_weights`.
    """
    counted = label != IGNORED
    logits = logits[counted]
    nll = F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, label[counted], reduction="none")
    return (nll * weight[counted]).sum(), counted.sum()


def move_given_steps(
    batch: Mapping[str, Tensor], weight_BS: Tensor, given_B: Tensor, start_id: int, pad_id: int
) -> dict[str, Tensor]:
    """Rows for an encoder-decoder student: the encoder reads the question and the given steps, the decoder writes the rest.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``labels`` and ``step_ids`` (B, S).
        weight_BS: Factors of the tokens, see `keypoint_weights`.
        given_B: Number of leading steps that are given.
        start_id: Token that the decoder begins with.
        pad_id: Fills up on the right.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, E); ``decoder_input_ids``, ``labels`` and ``weights`` (B, U), where the first
        place is the start and no label, so that labels are shifted as those of a causal model.
    """
    ids_BS, step_BS = batch["input_ids"], batch["step_ids"]
    label_BS = supervised_labels(batch["labels"], step_BS, given_B)
    learned_BS = label_BS != IGNORED
    read_BS = batch["attention_mask"].bool() & ~learned_BS
    E, U = int(read_BS.sum(1).max()), int(learned_BS.sum(1).max())
    encoder_ids, encoder_mask = pad_right(ids_BS, read_BS)

    def decoder(values_BS: Tensor, first: float, fill: float) -> Tensor:
        moved_BS, there_BS = pad_right(values_BS, learned_BS)
        return F.pad(moved_BS.masked_fill(there_BS == 0, fill)[:, :U], (1, 0), value=first)

    return {
        "input_ids": encoder_ids.masked_fill(encoder_mask == 0, pad_id)[:, :E],
        "attention_mask": encoder_mask.long()[:, :E],
        "decoder_input_ids": decoder(ids_BS, start_id, pad_id),
        "labels": decoder(label_BS, IGNORED, IGNORED),
        "weights": decoder(weight_BS, 1.0, 1.0),
    }
