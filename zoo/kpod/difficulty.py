"""Difficulty of the steps of rationales: ``d_k = sum_j softmax(w)_j nll_j`` over the tokens j of step k.

The softmax is over raw weights inside the step. Weights in (0, 1) differ by less than 1, shares by less than a factor of e, so
that a difficulty is close to the mean loss of its step. Source: arXiv 2405.16064, section 3.4 and equation 8.

Shape suffixes: B rationales of a batch, S positions, R tokens of rationales, N questions, M steps of all of them. Losses and
difficulties are in nats.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Difficulties", "step_difficulties"]


class Difficulties(NamedTuple):
    """Difficulties of the steps of many questions, row behind row.

    Attributes:
        offsets: int64 (N + 1,); the steps of question i are ``values[offsets[i] : offsets[i + 1]]``.
        values: float64 (M,).
    """

    offsets: Tensor
    values: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[float] | Tensor]) -> "Difficulties":
        """Pack a row of difficulties for each question."""
        tensors = [torch.as_tensor(row, dtype=torch.float64) for row in rows]
        lengths = torch.tensor([0, *map(len, tensors)], dtype=torch.int64)
        return cls(lengths.cumsum(0), torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.float64))


def step_difficulties(nll_BS: Tensor, step_BS: Tensor, weight_BS: Tensor | None = None) -> list[Tensor]:
    """Difficulty of each step of each rationale, by the student before distillation.

    Args:
        nll_BS: Cross-entropy of each token; what stands outside of the rationale changes nothing, even if it is not finite.
        step_BS: int64, number of the token's step from 0, -1 outside of the rationale.
        weight_BS: Weights of tokens; None: equal ones, the mean loss of each step.

    Returns:
        float64 on the CPU for each rationale, as many as it has steps; see `Difficulties.of_rows`.

    Raises:
        ValueError: If a step has no token, or the loss or weight of one of its tokens is not finite.
    """
    step_BS = step_BS.cpu()
    inside_BS = step_BS >= 0
    count_B = step_BS.amax(1) + 1
    slot_R = (count_B.cumsum(0)[:, None] - count_B[:, None] + step_BS)[inside_BS]
    nll_R = nll_BS.detach().cpu().double()[inside_BS]
    weight_R = torch.zeros_like(nll_R) if weight_BS is None else weight_BS.detach().cpu().double()[inside_BS]
    zeros_M = nll_R.new_zeros(int(count_B.sum()))
    largest_M = torch.full_like(zeros_M, -torch.inf).scatter_reduce(0, slot_R, weight_R, "amax")
    share_R = (weight_R - largest_M[slot_R]).exp()
    values_M = zeros_M.index_add(0, slot_R, share_R * nll_R) / zeros_M.index_add(0, slot_R, share_R)
    rows = list(values_M.split(count_B.tolist()))
    for number, row in enumerate(rows):
        if not row.isfinite().all():
            raise ValueError(
                f"step_difficulties: step {int((~row.isfinite()).nonzero()[0])} of row {number} has no token, or a loss or weight"
                " that is not finite: number the steps without gaps, and check the student's precision."
            )
    return rows
