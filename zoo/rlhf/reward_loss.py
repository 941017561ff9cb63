"""Losses of reward models, and how well differences of scores agree with preferences.

Shape suffixes: B prompts, K answers of a prompt, the best one first; P = K (K - 1) / 2 pairs of these; N pairs of any origin;
T tokens, padded on the right.
Sources: InstructGPT, arXiv 2203.02155, equation 1 (``last``, ranked answers); DeepSpeed-Chat, reward_model.py (``per_token``).
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "RewardLoss",
    "RewardLossKind",
    "calibration_sums",
    "expected_calibration_error",
    "last_loss",
    "last_values",
    "pairwise_accuracy",
    "per_token_loss",
    "reward_loss",
]

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
    """The value at the last token of each row, (B, T) to (B,).

    Args:
        value_BT: Value of each token.
        mask_BT: 1 for tokens, 0 for padding behind them.
    """
    return value_BT.gather(1, (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)


def last_loss(better_N: Tensor, worse_N: Tensor, margin: float = 0.0) -> Tensor:
    """``-log sigmoid(r_w - r_l - margin)`` of each pair; ln 2 where the scores are equal and the margin is 0.

    Args:
        better_N: Scores of the preferred answers.
        worse_N: Scores of the others.
        margin: Difference of scores that the model shall exceed.

    Example:
        >>> last_loss(torch.zeros(1), torch.zeros(1))
        tensor([0.6931])
    """
    return -F.logsigmoid(better_N - worse_N - margin)


def per_token_loss(
    better_NT: Tensor,
    worse_NT: Tensor,
    better_ids_NT: Tensor,
    worse_ids_NT: Tensor,
    better_mask_NT: Tensor,
    worse_mask_NT: Tensor,
    margin: float = 0.0,
) -> Tensor:
    """Mean of `last_loss` over the tokens of each pair, from the first one in which the two rows differ to the later end.

    Behind the end of the shorter row its values at padding count, as in the source. Equal rows count at their last token.

    Args:
        better_NT: Values of the preferred rows.
        worse_NT: Values of the others.
        better_ids_NT: Ids of the preferred rows.
        worse_ids_NT: Ids of the others.
        better_mask_NT: 1 for tokens of the preferred rows, 0 for padding behind them.
        worse_mask_NT: The same of the others.
        margin: As of `last_loss`.
    """
    either_NT = (better_mask_NT + worse_mask_NT) > 0
    differs_NT = ((better_ids_NT != worse_ids_NT) | (better_mask_NT != worse_mask_NT)) & either_NT
    end_N1 = either_NT.sum(1, keepdim=True)
    begin_N1 = torch.where(differs_NT.any(1, keepdim=True), differs_NT.long().argmax(1, keepdim=True), end_N1 - 1)
    place_T = torch.arange(better_NT.shape[1], device=better_NT.device)
    counts_NT = (place_T >= begin_N1) & (place_T < end_N1)
    loss_NT = last_loss(better_NT, worse_NT, margin).masked_fill(~counts_NT, 0.0)
    return loss_NT.sum(1) / counts_NT.sum(1)


def reward_loss(
    value_BKT: Tensor, ids_BKT: Tensor, mask_BKT: Tensor, kind: RewardLossKind = "last", margin: float = 0.0
) -> RewardLoss:
    """Loss of ranked answers: the mean over the pairs of each prompt, and over prompts.

    Args:
        value_BKT: Value of each token, float32 at least.
        ids_BKT: Ids of each answer with its prompt.
        mask_BKT: 1 for tokens, 0 for padding behind them.
        kind: ``last`` compares the values at the last tokens, ``per_token`` those of all tokens that tell two answers apart.
        margin: As of `last_loss`.

    Raises:
        ValueError: If there is no such kind, or a prompt has fewer than two answers.
    """
    B, K, T = value_BKT.shape
    if kind not in get_args(RewardLossKind) or K < 2:
        raise ValueError(f"reward_loss: kind={kind!r} must be last or per_token, and {K} answers of a prompt at least 2.")
    better_P, worse_P = torch.triu_indices(K, K, 1, device=value_BKT.device)
    score_BK = last_values(value_BKT.flatten(0, 1), mask_BKT.flatten(0, 1)).view(B, K)
    better_BP, worse_BP = score_BK[:, better_P], score_BK[:, worse_P]
    if kind == "last":
        loss_BP = last_loss(better_BP, worse_BP, margin)
    else:
        sides = (x_BKT[:, side_P].flatten(0, 1) for x_BKT in (value_BKT, ids_BKT, mask_BKT) for side_P in (better_P, worse_P))
        loss_BP = per_token_loss(*sides, margin=margin).view(B, -1)
    loss_B = loss_BP.mean(1)
    return RewardLoss(loss_B.mean(), loss_B.detach(), score_BK.detach(), (better_BP - worse_BP).detach())


def pairwise_accuracy(difference_N: Tensor) -> Tensor:
    """Share of pairs whose better answer has the higher score; equal scores count a half.

    Args:
        difference_N: Score of the better minus that of the worse answer.
    """
    return _right(difference_N).mean()


def calibration_sums(difference_N: Tensor, num_bins: int = 10) -> Tensor:
    """Sums of which `expected_calibration_error` is made, and which add up over batches: float64 (num_bins,).

    A pair with difference d is decided with confidence ``sigmoid(|d|)``. Bins divide confidences from 1/2 to 1 evenly; each sum
    is that of confidence minus rightness.

    Args:
        difference_N: Score of the better minus that of the worse answer.
        num_bins: Number of bins.
    """
    confidence_N = difference_N.double().abs().sigmoid()
    bin_N = ((2 * confidence_N - 1) * num_bins).long().clamp(max=num_bins - 1)
    return confidence_N.new_zeros(num_bins).index_add(0, bin_N, confidence_N - _right(difference_N))


def expected_calibration_error(difference_N: Tensor, num_bins: int = 10) -> Tensor:
    """Mean over bins of ``|confidence - accuracy|``, each weighted by its share of the pairs, of ``sigmoid(|d|)``.

    Args:
        difference_N: Score of the better minus that of the worse answer.
        num_bins: Number of bins between the confidences 1/2 and 1.
    """
    return calibration_sums(difference_N, num_bins).abs().sum() / len(difference_N)


def _right(difference_N: Tensor) -> Tensor:
    return (difference_N.sign().double() + 1) / 2
