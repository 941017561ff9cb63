"""The collectives of all codes: gathers and sums that run inside groups first, or between them, and count what they send."""

from collections import Counter
from typing import Literal, get_args

from torch import Tensor

from strategies.paro.grid import RankGrid, Work
from strategies.paro.ho_ring import FlatRing, HORing, WorldCollectives
from strategies.paro.link import Meter
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
        self._world: WorldCollectives = (
            FlatRing(grid, sent=self._sent) if method == "flat" else HORing(grid, method, sent=self._sent)
        )

    @property
    def sent(self) -> Counter[tuple[str, str]]:
        """Bytes that this rank has sent, by ``(operation, "intra" | "inter")``; waits for what is in flight on the CPU."""
        self.grid.drain()
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
        if _fineness(target) > _fineness(source):
            raise ValueError(f"all_gather from {source} to {target}: the target is finer; use reduce_scatter or a slice.")
        if (source, target) == ("G", "N"):
            return self._world.all_gather(out, shard, async_op)
        lane, meter = self.grid.gather, Meter(self._sent, "all_gather")
        self.grid.check_buffers(f"all_gather from {source} to {target}", out, shard, self._ratio(target, source))

        def gather() -> None:
            if source == target or not out.numel():
                if out.data_ptr() != shard.data_ptr():
                    out.copy_(shard)
            else:
                (lane.inter if target == "I" else lane.intra).all_gather(out, shard, meter).wait()

        return lane.perform(gather, (out, shard), async_op)

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
        if _fineness(target) < _fineness(source):
            raise ValueError(f"reduce_scatter from {source} to {target}: the target is coarser; use all_gather.")
        if (source, target) == ("N", "G"):
            return self._world.reduce_scatter(out, full, async_op)
        lane, meter = self.grid.reduce, Meter(self._sent, "reduce_scatter")
        self.grid.check_buffers(f"reduce_scatter from {source} to {target}", full, out, self._ratio(source, target), cast=True)

        def reduce() -> None:
            if source == target or not full.numel():
                if out.data_ptr() != full.data_ptr():
                    out.copy_(full)
            else:
                out.copy_((lane.intra if target == "I" else lane.inter).reduce_scatter(full, meter).wait())

        return lane.perform(reduce, (out, full), async_op)

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
        if granularity == "N":
            return self._world.all_reduce(tensor, async_op)
        lane, meter = self.grid.reduce, Meter(self._sent, "all_reduce")
        _fineness(granularity)
        pieces = self._ratio(granularity, "G")
        self.grid.check_buffers(f"all_reduce of {granularity}", tensor, tensor.reshape(-1)[: tensor.numel() // pieces], pieces)

        def reduce() -> None:
            if pieces > 1 and tensor.numel():
                block = lane.inter.reduce_scatter(tensor, meter).wait().to(tensor.dtype)
                lane.inter.all_gather(tensor, block, meter).wait()

        return lane.perform(reduce, (tensor,), async_op)

    def _ratio(self, coarse: Granularity, fine: Granularity) -> int:
        """Length of a buffer at the coarser granularity over that at the finer one."""
        blocks = {"N": self.grid.n, "I": self.grid.ng, "G": 1}
        return blocks[coarse] // blocks[fine]


def _fineness(granularity: str) -> int:
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity {granularity!r} must be one of {', '.join(get_args(Granularity))}.")
    return "NIG".index(granularity)
