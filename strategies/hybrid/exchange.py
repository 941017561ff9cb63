"""Rows of divided tables travel to the ranks that ask for them, and their gradients back.

Shape suffixes: N row numbers that are asked for, U distinct ones, A rows that other ranks ask of this one, W ranks, D size of a
row, of all tables together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding
from typing_extensions import override

from strategies.divided_rows import DividedRows
from zoo.nn.row_lookup import Rows

__all__ = ["Lookup", "RowExchange"]

Lookup = Literal["fused", "two_call", "per_task"]


class _Plan(NamedTuple):
    """Who sends how many rows to whom.

    Attributes:
        order_N: Places of the numbers that are asked for, by the rank that keeps them.
        asked: Numbers that this rank asks of each.
        served: Numbers that each asks of it.
        place_A: Those rows, as places among its own.
    """

    order_N: Tensor
    asked: list[int]
    served: list[int]
    place_A: Tensor


class RowExchange:
    """Fetches rows over the ranks of a group; each rank calls equally often, with as many numbers as it likes, or none.

    A fetch and its backward pass send ``2 U D (1 - 1/W)`` numbers, ``8 U (1 - 1/W)`` bytes of row numbers and ``8 W`` of counts a
    rank. The gradient of a table is the mean over ranks, as DDP's of other parameters.

    Args:
        parts: The tables.
        num_rows: Rows of each, whole.
        lookup: One exchange for all that is asked for; or one for all support sets and one for all query sets; or one a task. The
            last two are slower, give the same, and are there to be compared.
        dedup: Ask for a row once a step; otherwise as often as it is used, of which the first copy counts.
    """

    def __init__(self, parts: DividedRows, num_rows: int, lookup: Lookup = "fused", dedup: bool = True) -> None:
        self.parts = parts
        self.num_rows = num_rows
        self.lookup = lookup
        self.dedup = dedup

    def fetch(self, tables: Mapping[str, Tensor], groups: Sequence[Tensor], sparse: bool = False) -> Rows:
        """Copy rows, see `zoo.nn.row_lookup.RowLink`."""
        fetched, values = [], []
        for asked_N in self._calls(groups):
            asked_N = asked_N.unique() if self.dedup else asked_N
            values.append(_Fetch.apply(self, self._plan(asked_N), sparse, *tables.values()))
            fetched.append(asked_N)
        asked_N = torch.cat(fetched)
        ids_U, inverse_N = asked_N.unique(return_inverse=True)
        found = [torch.cat(parts) for parts in zip(*values, strict=True)]
        if len(ids_U) < len(asked_N):  # one copy of each row, whichever of the calls has fetched it
            first_U = torch.full_like(ids_U, len(asked_N)).scatter_reduce(
                0, inverse_N, torch.arange(len(asked_N), device=asked_N.device), "amin"
            )
            found = [embedding(first_U, value) for value in found]
        elif len(values) > 1 or not self.dedup:
            found = [embedding(inverse_N.argsort(), value) for value in found]
        return Rows(ids_U, dict(zip(tables, found, strict=True)))

    def _calls(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Numbers of each exchange; equally many on all ranks."""
        flat = [group.reshape(-1) for group in groups]
        none = flat[0][:0]
        if self.lookup == "fused":
            return [torch.cat(flat)]
        if self.lookup == "two_call":
            return [torch.cat([none, *flat[start::2]]) for start in (0, 1)]
        most = torch.tensor([len(flat)], device=self.parts.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.parts.group)
        return [*flat, *[none] * (int(most) - len(flat))]

    def _plan(self, asked_N: Tensor) -> _Plan:
        owner_N, place_N = self.parts.places(asked_N, self.num_rows)
        order_N = owner_N.argsort(stable=True)
        asked_W = torch.bincount(owner_N, minlength=self.parts.size)
        served_W = torch.empty_like(asked_W)
        dist.all_to_all_single(served_W, asked_W, group=self.parts.group)
        asked, served = asked_W.tolist(), served_W.tolist()
        place_A = place_N.new_empty(sum(served))
        dist.all_to_all_single(place_A, place_N[order_N], served, asked, group=self.parts.group)
        return _Plan(order_N, asked, served, place_A)


class _Fetch(torch.autograd.Function):
    """Rows of all tables in one exchange; backward is the exchange the other way."""

    @staticmethod
    @override
    def forward(ctx: Any, exchange: RowExchange, plan: _Plan, sparse: bool, *tables: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.plan, ctx.sparse = exchange, plan, sparse
        ctx.shapes = [table.shape for table in tables]
        sent_AD = torch.cat([table.detach()[plan.place_A] for table in tables], dim=1)
        got_ND = sent_AD.new_empty(len(plan.order_N), sent_AD.shape[1])
        dist.all_to_all_single(got_ND, sent_AD, plan.asked, plan.served, group=exchange.parts.group)
        rows_ND = torch.empty_like(got_ND)
        rows_ND[plan.order_N] = got_ND
        return tuple(rows_ND.split([table.shape[1] for table in tables], dim=1))

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        exchange, plan = ctx.exchange, ctx.plan
        sent_ND = torch.cat(gradients, dim=1)[plan.order_N]
        got_AD = sent_ND.new_empty(len(plan.place_A), sent_ND.shape[1])
        dist.all_to_all_single(got_AD, sent_ND, plan.served, plan.asked, group=exchange.parts.group)
        parts = got_AD.div_(exchange.parts.size).split([shape[1] for shape in ctx.shapes], dim=1)
        pairs = zip(parts, ctx.shapes, strict=True)
        if ctx.sparse:
            # A single row of a wider tensor counts as contiguous; torch's sparse kernels write beside such values.
            copies = [(part.clone(memory_format=torch.contiguous_format), shape) for part, shape in pairs]
            found = [torch.sparse_coo_tensor(plan.place_A[None], part, shape, check_invariants=False) for part, shape in copies]
        else:
            found = [part.new_zeros(shape).index_add_(0, plan.place_A, part) for part, shape in pairs]
        return None, None, None, *found
