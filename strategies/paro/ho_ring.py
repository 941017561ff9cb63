"""Collectives of all ranks as rings: HO-Ring, an outer ring of groups overlapped with collectives inside them, and a flat ring.

HO-Ring is the paper's PaRO-CC [paper 3.2, appendix A.2]: links between groups carry each block once to every group, not once to
every rank. Of X bytes a group puts ``(ng - 1) / ng X`` on its uplink, a flat ring ``(n - 1) / n X``.
"""

from abc import ABC, abstractmethod
from collections import Counter
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.paro.grid import Lane, RankGrid, Work
from strategies.paro.link import LIBRARY_REDUCES, Meter, Ring, sum_dtype

__all__ = ["FlatRing", "HORing", "WorldCollectives"]

Order = Literal["block", "rank"]
Phases = Literal["overlapped", "two_phase"]


class WorldCollectives(ABC):
    """All-gather, reduce-scatter and all-reduce over all ranks of a grid, of buffers of n equal blocks.

    Args:
        grid: of the ranks.
        order: where the block of rank (i, j) lies in a full buffer. ``block``: at ``j * ng + i``, the layout of `Collectives`.
            ``rank``: at ``i * m + j``, as in the collectives of torch.
        sent: a counter to share; None: one of its own.

    Raises:
        ValueError: no such order.
    """

    def __init__(self, grid: RankGrid, order: Order = "block", sent: Counter[tuple[str, str]] | None = None) -> None:
        if order not in get_args(Order):
            raise ValueError(f"{type(self).__name__}: order={order!r} must be one of {', '.join(get_args(Order))}.")
        self.grid = grid
        self.order = order
        self._sent: Counter[tuple[str, str]] = Counter() if sent is None else sent

    @property
    def sent(self) -> Counter[tuple[str, str]]:
        """Bytes that this rank has sent, by ``(operation, "intra" | "inter")``; waits for what is in flight on the CPU."""
        self.grid.drain()
        return self._sent

    def reset(self) -> None:
        """Count from zero again."""
        self.sent.clear()

    def all_gather(self, out: Tensor, shard: Tensor, async_op: bool = False) -> Work | None:
        """Collect the blocks of all ranks.

        Args:
            out: (n * block,), written.
            shard: (block,); may be its place in ``out``.
            async_op: return at once.

        Returns:
            With ``async_op`` what to wait for, otherwise None.

        Raises:
            ValueError: tensors have the wrong shape, type or device.
        """
        grid = self.grid
        grid.check_buffers("all_gather", out, shard, grid.n)
        meter = Meter(self._sent, "all_gather")
        return grid.gather.perform(lambda: self._gather(grid.gather, out, shard, meter), (out, shard), async_op)

    def reduce_scatter(self, out: Tensor, full: Tensor, async_op: bool = False) -> Work | None:
        """Sum the buffers of all ranks, of which each keeps its block.

        Args:
            out: (block,), written; may be of a wider type than ``full``.
            full: (n * block,), in the type of the wire; left as it is.
            async_op: return at once.

        Returns:
            With ``async_op`` what to wait for, otherwise None.

        Raises:
            ValueError: tensors have the wrong shape or device.
        """
        grid = self.grid
        grid.check_buffers("reduce_scatter", full, out, grid.n, cast=True)
        meter = Meter(self._sent, "reduce_scatter")
        return grid.reduce.perform(lambda: self._reduce(grid.reduce, out, full, meter), (out, full), async_op)

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Work | None:
        """Sum, in place: `reduce_scatter`, then `all_gather`, so that all ranks get the same bits.

        Args:
            tensor: (n * block,), in the type of the wire.
            async_op: return at once.

        Returns:
            With ``async_op`` what to wait for, otherwise None.

        Raises:
            ValueError: the tensor has the wrong shape or device, or is no multiple of n.
        """
        grid = self.grid
        grid.check_buffers("all_reduce", tensor, tensor.reshape(-1)[: tensor.numel() // grid.n], grid.n)
        meter = Meter(self._sent, "all_reduce")

        def reduce() -> None:
            block = tensor.new_empty(tensor.numel() // grid.n)
            self._reduce(grid.reduce, block, tensor, meter)
            self._gather(grid.reduce, tensor, block, meter)

        return grid.reduce.perform(reduce, (tensor,), async_op)

    @abstractmethod
    def _gather(self, lane: Lane, out: Tensor, shard: Tensor, meter: Meter) -> None:
        """All-gather with the process groups of a lane."""

    @abstractmethod
    def _reduce(self, lane: Lane, out: Tensor, full: Tensor, meter: Meter) -> None:
        """Reduce-scatter with the process groups of a lane."""

    def _by_group(self, full: Tensor) -> Tensor:
        """A view (ng, m, block) of a full buffer, by the group and place that a block belongs to."""
        m, ng = self.grid.m, self.grid.ng
        return full.view(ng, m, -1) if self.order == "rank" else full.view(m, ng, -1).transpose(0, 1)


class HORing(WorldCollectives):
    """Inner rings, one to a group, and outer rings, one to a place, that work at the same time.

    Time of X = n b bytes, with latencies a and a', and bandwidth B of a rank between and B' inside groups [derived from 3.2]:
    ``(ng-1) max(a + b/B, (m-1)(a' + b/B')) + (m-1)(a' + b/B')`` overlapped, ``(ng-1)(a + b/B) + (m-1)(a' + ng b/B')`` in two
    phases; a flat ring ``(n-1)(a + b/B)``.

    Sums run over places 0, 1, ... of a group in float32, then, overlapped, from group i + 1 round to group i, where a narrower
    wire rounds once a group; in two phases over groups 0, 1, ..., where it rounds once.

    Args:
        grid: of the ranks.
        method: ``overlapped`` or ``two_phase``.
        order: as in `WorldCollectives`.
        sent: as there.

    Raises:
        ValueError: no such method or order.

    Example:
        On every rank::

            ring = HORing(RankGrid(group_size=8, device_type="cuda"), order="rank")
            work = ring.all_gather(out, shard, async_op=True)
            ...
            work.wait()
    """

    def __init__(
        self,
        grid: RankGrid,
        method: Phases = "overlapped",
        order: Order = "block",
        sent: Counter[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(grid, order, sent)
        if method not in get_args(Phases):
            raise ValueError(f"HORing: method={method!r} must be one of {', '.join(get_args(Phases))}.")
        self.method = method

    def _gather(self, lane: Lane, out: Tensor, shard: Tensor, meter: Meter) -> None:
        if not out.numel():
            return
        i, j, ng = self.grid.i, self.grid.j, self.grid.ng
        blocks = self._by_group(out)
        if self.method == "two_phase":
            mine = out.view(self.grid.m, -1)[j] if self.order == "block" else out.new_empty(out.numel() // self.grid.m)
            lane.inter.all_gather(mine, shard, meter).wait()
            whole = out if self.order == "block" else torch.empty_like(out)
            lane.intra.all_gather(whole, mine, meter).wait()
            if self.order == "rank":
                blocks.copy_(whole.view(self.grid.m, ng, -1).transpose(0, 1))
            return
        if blocks[i, j].data_ptr() != shard.data_ptr():
            blocks[i, j].copy_(shard)
        before: _Inside | None = None
        for step in range(ng):
            k = (i - step) % ng
            transfer = lane.outer.shift(blocks[k, j], blocks[k - 1, j], meter) if step < ng - 1 else None
            inside = _Inside(lane, blocks[k], j, meter) if self.grid.m > 1 else None
            if transfer is not None:
                transfer.wait()
            if before is not None:  # two at a time keep the links inside busy, and scratch at 2 / ng of the buffer
                before.finish()
            before = inside
        if before is not None:
            before.finish()

    def _reduce(self, lane: Lane, out: Tensor, full: Tensor, meter: Meter) -> None:
        if not full.numel():
            return
        i, ng = self.grid.i, self.grid.ng
        blocks = self._by_group(full)
        if self.method == "two_phase":
            by_place = full if self.order == "block" else blocks.transpose(0, 1).contiguous().view(-1)
            mine = lane.intra.reduce_scatter(by_place, meter).wait().to(full.dtype)
            out.copy_(lane.inter.reduce_scatter(mine, meter).wait())
            return
        total = lane.intra.reduce_scatter(blocks[i - 1].contiguous().view(-1), meter).wait()
        for step in range(ng - 1):
            received = full.new_empty(out.numel())
            transfer = lane.outer.shift(total.to(full.dtype), received, meter)
            inside = lane.intra.reduce_scatter(blocks[(i - 2 - step) % ng].contiguous().view(-1), meter).wait()
            transfer.wait()
            total = received.to(sum_dtype(full.dtype)) + inside
        out.copy_(total)


class _Inside:
    """The blocks (m, block) of one group, of which each place has one, on their way to all places of this group."""

    def __init__(self, lane: Lane, blocks: Tensor, place: int, meter: Meter) -> None:
        self._blocks = blocks
        # In block order the blocks of a group lie apart: gather them elsewhere first.
        self._whole = blocks.view(-1) if blocks.is_contiguous() else blocks.new_empty(blocks.numel())
        self._pending = lane.intra.all_gather(self._whole, blocks[place], meter)

    def finish(self) -> None:
        self._pending.wait()
        if self._whole.data_ptr() != self._blocks.data_ptr():
            self._blocks.copy_(self._whole.view_as(self._blocks))


class FlatRing(WorldCollectives):
    """One ring of all ranks in the order of ranks, the baseline; making the first one of a grid is a collective call.

    Each rank sends ``(n - 1) / n`` of a buffer to the next rank, which for the last place of a group lies in another one. Sums
    run from rank r + 1 round to rank r; a narrower wire rounds once a rank. Over NCCL its own flat collectives do it, counted
    as such a ring.

    Args:
        grid: of the ranks.
        order: as in `WorldCollectives`.
        sent: as there.

    Raises:
        ValueError: no such order.
    """

    def __init__(self, grid: RankGrid, order: Order = "block", sent: Counter[tuple[str, str]] | None = None) -> None:
        super().__init__(grid, order, sent)
        grid.add_flat_rings()

    def _gather(self, lane: Lane, out: Tensor, shard: Tensor, meter: Meter) -> None:
        if not out.numel():
            return
        ring, blocks = self._ring(lane), self._blocks(out)
        if ring.backend in LIBRARY_REDUCES:
            ring.count(shard, ring.size - 1, meter)
            by_rank = torch.empty_like(out)
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(by_rank, shard, group=ring.groups[0])
            for block, piece in zip(blocks, by_rank.view(ring.size, -1), strict=True):
                block.copy_(piece)
            return
        rank = ring.position
        if blocks[rank].data_ptr() != shard.data_ptr():
            blocks[rank].copy_(shard)
        for step in range(ring.size - 1):
            ring.shift(blocks[rank - step], blocks[rank - step - 1], meter).wait()

    def _reduce(self, lane: Lane, out: Tensor, full: Tensor, meter: Meter) -> None:
        if not full.numel():
            return
        ring, blocks = self._ring(lane), self._blocks(full)
        rank = ring.position
        if ring.backend in LIBRARY_REDUCES:
            ring.count(blocks[rank], ring.size - 1, meter)
            piece = full.new_empty(out.numel())
            reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            reduce(piece, torch.cat(blocks), group=ring.groups[0])
            out.copy_(piece)
            return
        total = blocks[rank - 1]
        for step in range(ring.size - 1):
            received = full.new_empty(out.numel())
            ring.shift(total.to(full.dtype), received, meter).wait()
            total = received.to(sum_dtype(full.dtype)) + blocks[rank - 2 - step]
        out.copy_(total)

    def _ring(self, lane: Lane) -> Ring:
        assert lane.flat is not None
        return lane.flat

    def _blocks(self, full: Tensor) -> list[Tensor]:
        """Views of a full buffer's blocks, in the order of the ranks that they belong to."""
        return [block for group in self._by_group(full) for block in group]
