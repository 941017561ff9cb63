"""Ranks as a grid of groups and places, and the process groups that run along it.

Of n ranks in groups of m, rank r is place ``j = r % m`` of group ``i = r // m``. Links inside a group are fast (a node), those
between groups slow. Where the grid is of some ranks of the job only, r counts these.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from strategies.mesh import members
from strategies.paro.link import LIBRARY_REDUCES, Link, LinkClass, Ring

__all__ = ["Direction", "Lane", "RankGrid", "Work"]

Direction = Literal["gather", "reduce"]


class RankGrid:
    """The grid of ``num_groups`` x ``group_size`` ranks; making one is a collective call of its ranks.

    Args:
        group_size: m, ranks of a group; consecutive ranks belong together.
        device_type: ``cpu`` or ``cuda``; where the tensors lie that travel.
        timeout: of every process group; None: that of torch.
        ranks: global ranks of the grid, increasing; None: all ranks of the job. Others take no part, and may do other work.
            torch names the groups by how many a process has made: it must be the same number on all of these ranks, which is
            not so once some of them have made another grid.

    Attributes:
        n: number of ranks.
        m: ranks of a group.
        ng: number of groups.
        rank: of this process among the grid's ranks, 0 to n - 1.
        ranks: global rank of each of them.
        world: process group of all of them; None: the job's own.
        i: its group.
        j: its place in the group.
        block: index of the block that it holds at granularity G, ``j * ng + i`` (see `Collectives`).
        intra: process group of this group's ranks, for gathers.
        inter: process group of the ranks in this place of all groups, for gathers.
        intra_reduce: as `intra`, for reductions, so that these can be in flight beside gathers.
        inter_reduce: as `inter`, for reductions.
        gather, reduce: the `Lane` of either direction: these groups, and those of the rings between groups.
        mesh: axes ``("intra", "inter")``, rank table ``tensor(ranks).view(ng, m).T``. On it ``[Shard(0), Shard(0)]`` is
            granularity G and ``[Shard(0), Replicate()]`` is I.

    Raises:
        RuntimeError: there is no process group yet.
        ValueError: the group size does not divide the number of ranks; no backend serves the device; this process is not one
            of ``ranks``, or these are not ranks of the job in increasing order.
    """

    def __init__(
        self, group_size: int, device_type: str = "cpu", timeout: timedelta | None = None, ranks: Sequence[int] | None = None
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("RankGrid: the process group is not initialised yet; call init_process_group first.")
        self.ranks = members(ranks, "RankGrid")
        if dist.get_rank() not in self.ranks:
            raise ValueError(
                f"RankGrid: rank {dist.get_rank()} is not one of ranks={self.ranks}: only these ranks make and use the grid."
            )
        self.n, self.rank = len(self.ranks), self.ranks.index(dist.get_rank())
        if not isinstance(group_size, int) or group_size < 1 or self.n % group_size:
            divisors = ", ".join(str(size) for size in range(1, self.n + 1) if self.n % size == 0)
            raise ValueError(f"RankGrid: group_size={group_size!r} does not divide the {self.n} ranks; it may be {divisors}.")
        self.backend = _backend(device_type)
        self.device_type = device_type
        self.timeout = timeout
        self._groups: list[dist.ProcessGroup] = []
        self.world = None if ranks is None else self.subgroup([*range(self.n)])
        self.m, self.ng = group_size, self.n // group_size
        self.i, self.j = divmod(self.rank, self.m)
        self.block = self.block_of(self.rank)
        self.gather, self.reduce = (self._lane(direction) for direction in ("gather", "reduce"))
        self.intra, self.inter = self.gather.intra.group, self.gather.inter.group
        self.intra_reduce, self.inter_reduce = self.reduce.intra.group, self.reduce.inter.group
        table = torch.tensor(self.ranks).view(self.ng, self.m).T
        self.mesh = DeviceMesh.from_group([self.intra, self.inter], device_type, mesh=table, mesh_dim_names=("intra", "inter"))

    @property
    def world_size(self) -> int:
        """n, number of ranks."""
        return self.n

    @property
    def group_size(self) -> int:
        """m, ranks of a group."""
        return self.m

    @property
    def num_groups(self) -> int:
        """Number of groups, n / m."""
        return self.ng

    @property
    def num_process_groups(self) -> int:
        """Process groups that this rank has made for the grid."""
        return len(self._groups)

    def block_of(self, rank: int) -> int:
        """Index of the block that a rank holds at granularity G."""
        i, j = divmod(rank, self.m)
        return j * self.ng + i

    def rank_at(self, i: int, j: int) -> int:
        """Rank of a place of a group; both count round."""
        return i % self.ng * self.m + j % self.m

    def link(self, rank: int, other: int) -> LinkClass:
        """The class of the link between two ranks."""
        return "intra" if rank // self.m == other // self.m else "inter"

    def subgroup(self, ranks: list[int]) -> dist.ProcessGroup:
        """A new process group of ranks of the grid; a collective call of these, who must make their groups in the same order."""
        group = dist.new_group([self.ranks[rank] for rank in ranks], timeout=self.timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        self._groups.append(group)
        return group

    def check_buffers(self, operation: str, whole: Tensor, part: Tensor, share: int, cast: bool = False) -> None:
        """Say what is wrong with the two buffers of an operation.

        Args:
            operation: named in the message.
            whole: the larger buffer.
            part: the smaller one.
            share: how many times the larger one is as long.
            cast: whether the types may differ.

        Raises:
            ValueError: a buffer is not 1-D and contiguous, of this grid's device, of the right length or type.
        """
        for tensor in (whole, part):
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(f"{operation}: buffers must be 1-D and contiguous, got shape {tuple(tensor.shape)}.")
            if tensor.device.type != self.device_type:
                raise ValueError(f"{operation}: a buffer lies on {tensor.device}, but the grid was made for {self.device_type}.")
        if whole.numel() != part.numel() * share:
            raise ValueError(
                f"{operation}: with {self.ng} groups of {self.m} ranks the larger buffer is {share} times the smaller one, got"
                f" {whole.numel()} and {part.numel()} elements; pad the buffer to a multiple of {self.n}."
            )
        if whole.dtype != part.dtype and not cast:
            raise ValueError(f"{operation}: the buffers are of different types, {whole.dtype} and {part.dtype}.")

    def drain(self) -> None:
        """Until nothing is in flight on the CPU; errors are left to those who wait for the operation."""
        self.gather.drain()
        self.reduce.drain()

    def close(self) -> None:
        """End the process groups, whose threads and connections cost time even if nobody uses them; a call of all its ranks.

        Nothing may be in flight. The grid cannot be used any more; to close it again does nothing.
        """
        if not self._groups:
            return
        while self._groups:
            dist.destroy_process_group(self._groups.pop())
        # Threads end when nobody holds a group; the engine and the units, which hold this object, may live on.
        del self.gather, self.reduce, self.intra, self.inter, self.intra_reduce, self.inter_reduce, self.mesh, self.world

    def add_flat_rings(self) -> None:
        """Give both lanes a ring of all ranks in the order of ranks; a collective call of all its ranks."""
        for lane in (self.gather, self.reduce):
            if lane.flat is None:
                lane.flat = self._ring([*range(self.n)], self.rank)

    def _lane(self, direction: Direction) -> "Lane":
        members = [self.rank_at(self.i, j) for j in range(self.m)]
        peers = [self.rank_at(i, self.j) for i in range(self.ng)]
        intra, inter = self.subgroup(members), self.subgroup(peers)
        outer = self._ring(peers, self.i)
        ways = None if self.backend in LIBRARY_REDUCES else outer.groups
        return Lane(
            direction,
            self.device_type,
            Link(intra, "intra", self.backend),
            Link(inter, "inter", self.backend, ways),
            outer,
        )

    def _ring(self, ranks: list[int], position: int) -> Ring:
        even = self.subgroup(ranks)
        odd = even if len(ranks) == 1 or self.backend in LIBRARY_REDUCES else self.subgroup(ranks)
        previous, following = ranks[position - 1], ranks[(position + 1) % len(ranks)]
        neighbours = self.ranks[previous], self.ranks[following]
        return Ring(len(ranks), position, neighbours, (even, odd), self.link(self.rank, following), self.backend)


class Work:
    """An operation in flight.

    Tensors that were handed to it must be left alone until `wait` returns.
    """

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Until the result is there: on the CPU blocks, on CUDA lets the current stream wait.

        Raises:
            RuntimeError: a peer failed, or did not answer within the timeout.
        """
        if self._wait is not None:
            self._wait()


@dataclass
class Lane:
    """The process groups of one direction, and the order in which operations take them.

    Operations of a lane start in the order in which they are asked for, on every rank, whether they are asynchronous or not.
    Those of the two lanes share no process group, so that they may overtake one another. On the CPU one thread performs what
    is asynchronous; on CUDA a stream of the lane's own.

    Attributes:
        direction: ``gather`` or ``reduce``.
        device_type: where the tensors lie.
        intra: ranks of this group.
        inter: ranks in this place of all groups.
        outer: the ring of the ranks in this place of all groups.
        flat: the ring of all ranks; None until a `FlatRing` is made.
    """

    direction: Direction
    device_type: str
    intra: Link
    inter: Link
    outer: Ring
    flat: Ring | None = None

    def __post_init__(self) -> None:
        self._tasks: _Tasks | None = None
        self._last: Future[None] | None = None
        self._stream: torch.cuda.Stream | None = None

    def perform(self, operation: Callable[[], None], tensors: tuple[Tensor, ...], async_op: bool) -> Work | None:
        """Do an operation after all earlier ones of this lane.

        Args:
            operation: issues collectives of this lane's groups.
            tensors: what it reads and writes.
            async_op: return at once.

        Returns:
            What to wait for, or None if it is done (on CUDA: if the current stream has it before it).
        """
        if self.device_type == "cuda":
            return self._on_stream(operation, tensors) if async_op else self._now(operation)
        if not async_op:
            self.drain()
            return self._now(operation)
        if self._tasks is None:
            self._tasks = SimpleQueue()
            # Not one of concurrent.futures: the interpreter would wait at its end for peers that are gone.
            threading.Thread(target=_serve, args=(self._tasks,), name=f"paro {self.direction}", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)
        self._last = Future()
        self._tasks.put((operation, self._last))
        return Work(self._last.result)

    def drain(self) -> None:
        """Until no operation of this lane is in flight on the CPU; errors are left to those who wait for the operation."""
        if self._last is not None:
            self._last.exception()

    @staticmethod
    @torch.no_grad()
    def _now(operation: Callable[[], None]) -> None:
        operation()

    def _on_stream(self, operation: Callable[[], None], tensors: tuple[Tensor, ...]) -> Work:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._now(operation)
        for tensor in tensors:
            tensor.record_stream(stream)
        event = stream.record_event()
        return Work(lambda: torch.cuda.current_stream().wait_event(event))


_Tasks = SimpleQueue[tuple[Callable[[], None], "Future[None]"] | None]


def _serve(tasks: _Tasks) -> None:
    """Perform operations one after another until None comes; hold none of their tensors in between."""
    while (task := tasks.get()) is not None:
        operation, future = task
        del task
        try:
            Lane._now(operation)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        del operation, future


def _backend(device_type: str) -> str:
    served = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    if device_type not in served:
        raise ValueError(
            f"RankGrid: device_type={device_type!r}, but the process group serves only {', '.join(served)}; initialise it with a"
            f" backend for it, such as cpu:gloo,cuda:nccl."
        )
    return served[device_type]
