"""Rows sorted by the expert that they visit, and the way back.

Shape suffixes: N tokens, k experts of a token, M = N k assignments, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ExpertOrder", "permute_rows", "sort_by_expert"]


class ExpertOrder(NamedTuple):
    """Assignments in the order of their experts.

    Attributes:
        order_M: Assignment ``order[i] = token * k + slot`` comes to place i.
        inverse_M: The inverse permutation.
        offset_E: Where each expert's assignments end, int32.
    """

    order_M: Tensor
    inverse_M: Tensor
    offset_E: Tensor


def sort_by_expert(ids_Nk: Tensor, num_experts: int) -> ExpertOrder:
    """Sort assignments by expert, those of one expert by token.

    Args:
        ids_Nk: the experts of each token.
        num_experts: E.
    """
    # Narrow numbers: a GPU sorts by radix, one byte of the key at a time.
    narrow = torch.uint8 if num_experts <= 256 else torch.int32
    sorted_M, order_M = ids_Nk.reshape(-1).to(narrow).sort(stable=True)
    expert_E = torch.arange(num_experts, dtype=narrow, device=ids_Nk.device)
    offset_E = torch.searchsorted(sorted_M, expert_E, right=True, out_int32=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M = inverse_M.scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return ExpertOrder(order_M, inverse_M, offset_E)


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]``, where ``inverse`` undoes ``order``; the gradient needs no atomic sums, unlike that of indexing."""
    permuted: Tensor = _Permute.apply(x, order, inverse)
    return permuted


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute_rows(grads[0], inverse, order), None, None
