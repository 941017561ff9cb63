"""Links between the ranks of a process group, or neighbours on a ring; each transfer is counted in bytes.

No hierarchy is decided here; `HORing` and `Collectives` put these together.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LIBRARY_REDUCES", "Link", "LinkClass", "Meter", "Pending", "Ring", "Summed", "sum_dtype"]

LinkClass = Literal["intra", "inter"]
LIBRARY_REDUCES = ("nccl", "xccl", "hccl")
"""Backends whose own reduce-scatter sends no more than it must; these also want the sends of a step in one call."""


@dataclass(frozen=True)
class Meter:
    """Adds to a counter of ``(operation, "intra" | "inter")`` what one operation sends, in bytes."""

    sent: Counter[tuple[str, str]]
    operation: str

    def add(self, link: LinkClass, num_bytes: int) -> None:
        """Count bytes that this rank sends."""
        if num_bytes:
            self.sent[self.operation, link] += num_bytes


class Pending:
    """A started call: work of torch, and tensors that must live until it is done."""

    def __init__(self, work: list[dist.Work | None], *keep: Tensor) -> None:
        self._work, self._keep = work, keep

    def wait(self) -> None:
        """Until all of it is done (on CUDA: for the current stream)."""
        for work in self._work:
            if work is not None:
                work.wait()
        self._work, self._keep = [], ()


@dataclass(frozen=True)
class Link:
    """One process group of the grid, whose ranks hold pieces in the order of their ranks.

    Attributes:
        group: its ranks, this one among them.
        name: the class under which bytes are counted.
        backend: of torch; decides who sums. gloo's reduce-scatter sends twice what it needs to, so that all but NCCL and its
            like exchange pieces and sum here, in the order of ranks.
        ways: process groups of messages to later and to earlier ranks, for pieces that are sent one by one: over gloo one
            socket serves both directions between two ranks of a group, and a bulk transfer holds up the answers of the other
            way, which over a slow link costs up to twice the time. None: the library's collectives.
    """

    group: dist.ProcessGroup
    name: LinkClass
    backend: str
    ways: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    def all_gather(self, out: Tensor, piece: Tensor, meter: Meter) -> Pending:
        """Start to collect the pieces of all ranks; this rank sends (size - 1) of its own.

        Args:
            out: (size * piece,), contiguous.
            piece: (piece,), contiguous; may be its own place in ``out``.
            meter: counts.
        """
        if self.size == 1:
            if out.data_ptr() != piece.data_ptr():
                out.copy_(piece)
            return Pending([])
        meter.add(self.name, (self.size - 1) * _num_bytes(piece))
        if self.ways is not None:
            places = list(out.view(self.size, -1))
            mine = places[self.group.rank()]
            if mine.data_ptr() != piece.data_ptr():
                mine.copy_(piece)
            return Pending(self._exchange([piece] * self.size, places), out, piece)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return Pending([gather(out, piece, group=self.group, async_op=True)], out, piece)

    def reduce_scatter(self, full: Tensor, meter: Meter) -> "Summed":
        """Start to sum everyone's ``full`` and keep this rank's piece; it sends (size - 1) / size of ``full``.

        Args:
            full: (size * piece,), contiguous.
            meter: counts.

        Returns:
            After its `Summed.wait` the sum, (piece,), in `sum_dtype` of ``full``.
        """
        if self.size == 1:
            return Summed(Pending([]), [full])
        meter.add(self.name, (self.size - 1) * (_num_bytes(full) // self.size))
        if self.backend in LIBRARY_REDUCES:
            piece = full.new_empty(full.numel() // self.size)
            reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            return Summed(Pending([reduce(piece, full, group=self.group, async_op=True)], full), [piece])
        pieces = torch.empty_like(full)
        if self.ways is not None:
            sent, arrived = list(full.view(self.size, -1)), list(pieces.view(self.size, -1))
            arrived[self.group.rank()] = sent[self.group.rank()]
            return Summed(Pending(self._exchange(sent, arrived), full), arrived)
        work = dist.all_to_all_single(pieces, full, group=self.group, async_op=True)
        return Summed(Pending([work], full), list(pieces.view(self.size, -1)))

    def _exchange(self, sent: list[Tensor], arrived: list[Tensor]) -> list[dist.Work | None]:
        """Start to send each other rank its piece, and to receive its one; nearer ranks first."""
        assert self.ways is not None
        ranks, position = dist.get_process_group_ranks(self.group), self.group.rank()
        work: list[dist.Work | None] = []
        for distance in range(1, self.size):
            to, source = (position + distance) % self.size, (position - distance) % self.size
            # The receive is posted first: the sender's data then has somewhere to go.
            work.append(dist.irecv(arrived[source], ranks[source], group=self.ways[position < source]))
            work.append(dist.isend(sent[to], ranks[to], group=self.ways[to < position]))
        return work


@dataclass(frozen=True)
class Ring:
    """This rank's two neighbours on a ring of ranks.

    Over gloo one socket serves both directions between two ranks, and a bulk transfer holds up the answers of the other way. So
    the edges that leave even positions have a group, and hence sockets, of their own, as have those that leave odd ones.

    Attributes:
        size: ranks of the ring.
        position: of this rank.
        ranks: global ranks that this one receives from and sends to.
        groups: process groups of edges, by the parity of the position that sends; one and the same for NCCL.
        name: the class of the link that this rank sends over.
        backend: of torch.
    """

    size: int
    position: int
    ranks: tuple[int, int]
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup]
    name: LinkClass
    backend: str

    def count(self, piece: Tensor, times: int, meter: Meter) -> None:
        """Note that this rank sends so many pieces to the next one."""
        meter.add(self.name, times * _num_bytes(piece))

    def shift(self, piece: Tensor, received: Tensor, meter: Meter) -> Pending:
        """Start to send a piece to the next rank, and to receive the previous one's.

        Args:
            piece: (piece,), contiguous.
            received: (piece,), contiguous; written.
            meter: counts.
        """
        self.count(piece, 1, meter)
        previous, following = self.ranks
        inward, outward = self.groups[(self.position - 1) % self.size % 2], self.groups[self.position % 2]
        if self.backend in LIBRARY_REDUCES:
            receive = dist.P2POp(dist.irecv, received, previous, inward)
            send = dist.P2POp(dist.isend, piece, following, outward)
            return Pending([*dist.batch_isend_irecv([receive, send])], piece, received)
        # The receive is posted first: the sender's data then has somewhere to go.
        work = [dist.irecv(received, previous, group=inward), dist.isend(piece, following, group=outward)]
        return Pending(work, piece, received)


class Summed:
    """A sum in the making: pieces that arrive, and are added in their order."""

    def __init__(self, pending: Pending, pieces: list[Tensor]) -> None:
        self._pending, self._pieces = pending, pieces

    def wait(self) -> Tensor:
        """The sum in `sum_dtype`; may be the very tensor that was handed in, so it is not to be written to."""
        self._pending.wait()
        first, *rest = self._pieces
        if not rest:
            return first
        total = first.to(sum_dtype(first.dtype), copy=True)
        for piece in rest:
            total += piece
        return total


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in: float32 for narrower floats, otherwise the type itself.

    Example:
        >>> sum_dtype(torch.bfloat16), sum_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
