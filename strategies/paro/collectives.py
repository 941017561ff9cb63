"""The collectives of all codes: gathers and sums that run inside groups first, or between them, and count what they send."""

from collections import Counter
from typing import Literal, get_args

from torch import Tensor

from strategies.paro.grid import RankGrid, Work
from strategies.paro.link import Link, Meter
from strategies.paro.partition import Granularity

__all__ = ["Collectives", "Method"]

Method = Literal["overlapped", "two_phase", "flat"]


class Collectives:
    """Moves a buffer from one granularity to another.

    A full buffer is n equal blocks. Rank (i, j) holds of it, at granularity N, all; at I, blocks ``j * ng`` to
    ``(j + 1) * ng - 1``; at G, block ``j * ng + i``. So a G block is a slice of the I shard, and both are contiguous.

    All ranks call the same operations in the same order. Asynchronous gathers may be in flight beside asynchronous reductions;
    operations of either kind start one after another.

    Sums are taken in a fixed order (places, then groups), in float32 where the wire is narrower, so that two runs give the same
    bits; over NCCL it is the library that sums.

    Args:
        grid: of the ranks.
        method: how to go between N and G. ``two_phase``: between groups and inside them, one after the other. ``overlapped``:
            at the same time, block by block (HO-Ring, paper 3.2). ``flat``: one ring of all ranks, the baseline.

    Raises:
        ValueError: no such method.
    """

    def __init__(self, grid: RankGrid, method: Method = "overlapped") -> None:
        if method not in get_args(Method):
            raise ValueError(f"Collectives: method={method!r} must be one of {', '.join(get_args(Method))}.")
        self.grid = grid
        self.method = method
        self._sent: Counter[tuple[str, str]] = Counter()

    @property
    def sent(self) -> Counter[tuple[str, str]]:
        """Bytes that this rank has sent, by ``(operation, "intra" | "inter")``; waits for what is in flight on the CPU."""
        self.grid.gather.drain()
        self.grid.reduce.drain()
        return self._sent

    def reset(self) -> None:
        """Count from zero again."""
        self.sent.clear()

    def all_gather(
        self, out: Tensor, shard: Tensor, source: Granularity, target: Granularity, async_op: bool = False
    ) -> Work | None:
        """Make a shard coarser: G to I between groups, I to N inside them, G to N both; a copy if nothing changes.

        Args:
            out: what the rank holds at granularity ``target``; 1-D, contiguous.
            shard: what it holds at ``source``; may lie in its place in ``out``.
            source: granularity of ``shard``.
            target: granularity of ``out``, not finer.
            async_op: return at once.

        Returns:
            With ``async_op`` what to wait for, otherwise None.

        Raises:
            ValueError: the target is finer, or tensors have the wrong shape, type or device.
        """
        if _FINENESS.index(target) > _FINENESS.index(source):
            raise ValueError(f"all_gather from {source} to {target}: the target is finer; use reduce_scatter or a slice.")
        grid = self.grid

        def gather() -> None:
            meter, lane = Meter(self._sent, "all_gather"), grid.gather
            intra, inter = Link(lane.intra, "intra", grid.backend), Link(lane.inter, "inter", grid.backend)
            if source == target:
                out.copy_(shard)
            elif target == "I":
                inter.all_gather(out, shard, meter).wait()
            elif source == "I":
                intra.all_gather(out, shard, meter).wait()
            else:
                mine = out.view(grid.m, -1)[grid.j]
                inter.all_gather(mine, shard, meter).wait()
                intra.all_gather(out, mine, meter).wait()

        return grid.gather.perform(gather, (out, shard), async_op)

    def reduce_scatter(
        self, out: Tensor, full: Tensor, source: Granularity, target: Granularity, async_op: bool = False
    ) -> Work | None:
        """Sum over ranks and keep a finer shard: N to I over the group, I to G over the ranks in this place, N to G over all.

        Args:
            out: what the rank holds at granularity ``target``; 1-D, contiguous; may be wider than ``full``.
            full: what it holds at ``source``, in the type of the wire; it is left as it is.
            source: granularity of ``full``.
            target: granularity of ``out``, not coarser.
            async_op: return at once.

        Returns:
            With ``async_op`` what to wait for, otherwise None.

        Raises:
            ValueError: the target is coarser, or tensors have the wrong shape, type or device.
        """
        if _FINENESS.index(target) < _FINENESS.index(source):
            raise ValueError(f"reduce_scatter from {source} to {target}: the target is coarser; use all_gather.")
        grid = self.grid

        def reduce() -> None:
            meter, lane = Meter(self._sent, "reduce_scatter"), grid.reduce
            intra, inter = Link(lane.intra, "intra", grid.backend), Link(lane.inter, "inter", grid.backend)
            if source == target:
                out.copy_(full)
            elif target == "I":
                out.copy_(intra.reduce_scatter(full, meter).wait())
            elif source == "I":
                out.copy_(inter.reduce_scatter(full, meter).wait())
            else:
                shard = intra.reduce_scatter(full, meter).wait().to(full.dtype)
                out.copy_(inter.reduce_scatter(shard, meter).wait())

        return grid.reduce.perform(reduce, (out, full), async_op)

    def all_reduce(self, tensor: Tensor, granularity: Granularity, async_op: bool = False) -> Work | None:
        """Sum, in place, over the ranks that hold the same shard: N over all, I over the ranks in this place, G nothing.

        It is a reduce-scatter and an all-gather, so that all of these ranks get the same bits.

        Args:
            tensor: what the rank holds at ``granularity``, in the type of the wire; 1-D, contiguous.
            granularity: of it.
            async_op: return at once.

        Returns:
            With ``async_op`` what to wait for, otherwise None.

        Raises:
            ValueError: the tensor has the wrong shape or device.
        """
        grid = self.grid

        def reduce() -> None:
            meter, lane = Meter(self._sent, "all_reduce"), grid.reduce
            intra, inter = Link(lane.intra, "intra", grid.backend), Link(lane.inter, "inter", grid.backend)
            if granularity == "G":
                return
            shard = tensor
            if granularity == "N":
                shard = tensor.view(grid.m, -1)[grid.j]
                shard.copy_(intra.reduce_scatter(tensor, meter).wait())
            block = shard.view(grid.ng, -1)[grid.i]
            block.copy_(inter.reduce_scatter(shard, meter).wait())
            inter.all_gather(shard, block, meter).wait()
            if granularity == "N":
                intra.all_gather(tensor, shard, meter).wait()

        return grid.reduce.perform(reduce, (tensor,), async_op)


_FINENESS = "NIG"
