"""Counts what collectives send: bytes per operation and per class of link."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traffic", "Transfer"]

Link = Literal["self", "intra", "inter"]

# By operator of torch: our name, and which of its tensor arguments is the payload (-1: the largest).
_OPERATIONS = {
    "allreduce_": ("all_reduce", -1),
    "allreduce_coalesced_": ("all_reduce", -1),
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "all_reduce_coalesced": ("all_reduce", 0),
    "all_reduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", -1),
    "broadcast": ("broadcast", 0),
    "reduce_": ("reduce", -1),
    "allgather_": ("all_gather", -1),
    "_allgather_base_": ("all_gather", -1),
    "allgather_into_tensor_coalesced_": ("all_gather", -1),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather_into_tensor_out": ("all_gather", -1),
    "all_gather_into_tensor_coalesced": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", -1),
    "_reduce_scatter_base_": ("reduce_scatter", -1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", -1),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),
    "send": ("send", -1),
    "recv_": ("recv", -1),
    "recv_any_source_": ("recv", -1),
    "barrier": ("barrier", None),
}
_GATHERS_FROM_PIECE = {"all_gather_into_tensor", "all_gather_into_tensor_coalesced"}
_SILENT = {"wait_tensor", "_wrap_tensor_autograd", "monitored_barrier_"}


@dataclass(frozen=True)
class Transfer:
    """One collective that this process took part in.

    Attributes:
        operation: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast``, ``all_to_all``, ...
        num_bytes: size of the whole tensor that it is about: what is reduced or broadcast, what is gathered, what is
            scattered; for ``all_to_all`` and ``gather``, what this process hands in. 0 for a barrier.
        ranks: global ranks of the group; for ``send`` and ``recv`` this rank and the other.
        link: ``self`` for a group of one process, ``intra`` if all of it lies in one group of neighbours, else ``inter``.
    """

    operation: str
    num_bytes: int
    ranks: tuple[int, ...]
    link: Link

    @property
    def ring_bytes(self) -> float:
        """Bytes that this process sends in a ring: ``2 (n-1)/n`` of the tensor to reduce it, ``(n-1)/n`` to do half of that."""
        n = len(self.ranks)
        if self.operation in ("send", "recv"):
            return float(self.num_bytes if self.operation == "send" else 0)
        return self.num_bytes * (2 if self.operation == "all_reduce" else 1) * (n - 1) / n


@dataclass
class Traffic:
    """Counts the collectives of this process while the context lasts, those of autograd and of DDP's reducer included.

    It does not see those of threads that the program has started itself.

    Args:
        neighbours: so many consecutive ranks share the fast links (a node); None: all of them do.

    Example:
        >>> with Traffic(neighbours=8) as traffic:
        ...     pass  # one step
        >>> traffic.num_bytes(link="inter"), traffic.num_bytes("all_reduce")
        (0, 0)
    """

    neighbours: int | None = None
    transfers: list[Transfer] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.neighbours is not None and self.neighbours < 1:
            raise ValueError(f"Traffic: neighbours={self.neighbours} must be at least 1, or None.")
        self._watch = _Watch(self)

    def __enter__(self) -> "Traffic":
        self._watch.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._watch.__exit__(*exception)

    def num_bytes(self, operation: str | None = None, link: Link | None = None) -> int:
        """Sum of the sizes of transfers, of one operation or one class of links if given."""
        return sum(transfer.num_bytes for transfer in self._chosen(operation, link))

    def ring_bytes(self, operation: str | None = None, link: Link | None = None) -> float:
        """Sum of what this process sends if each collective runs as a ring."""
        return sum(transfer.ring_bytes for transfer in self._chosen(operation, link))

    def counts(self) -> dict[tuple[str, Link], int]:
        """Number of collectives of each operation and class of links."""
        return dict(Counter((transfer.operation, transfer.link) for transfer in self.transfers))

    def link_of(self, ranks: Iterable[int]) -> Link:
        """The class of the links among some ranks."""
        ranks = list(ranks)
        if len(ranks) == 1:
            return "self"
        return "intra" if self.neighbours is None or len({rank // self.neighbours for rank in ranks}) == 1 else "inter"

    def _chosen(self, operation: str | None, link: Link | None) -> Iterator[Transfer]:
        return (t for t in self.transfers if operation in (None, t.operation) and link in (None, t.link))


class _Watch(TorchDispatchMode):
    """Sees each operator that torch dispatches, and notes the collectives among them."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):  # let it become plain tensors and collectives first
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._note(func, [*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: list[Any]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _SILENT:
            return
        if name not in _OPERATIONS:
            raise NotImplementedError(f"Traffic does not know the collective {func._schema.name}; add it to its table.")
        operation, which = _OPERATIONS[name]
        ranks = _ranks(func, args)
        sizes = [size for arg in args if (size := _bytes(arg)) is not None]
        num_bytes = 0 if which is None else max(sizes) if which == -1 else sizes[which]
        num_bytes *= len(ranks) if name in _GATHERS_FROM_PIECE else 1
        self.traffic.transfers.append(Transfer(operation, num_bytes, ranks, self.traffic.link_of(ranks)))


def _ranks(func: Any, args: list[Any]) -> tuple[int, ...]:
    """Global ranks of the group, or of the two ends of a message that goes from one rank to another."""
    group = _group(func, args)
    for described, arg in zip(func._schema.arguments, args, strict=False):
        if described.name in ("dst", "src"):
            return dist.get_rank(), dist.get_global_rank(group, arg)
    return tuple(dist.get_process_group_ranks(group))


def _group(func: Any, args: list[Any]) -> dist.ProcessGroup:
    for described, arg in zip(func._schema.arguments, args, strict=False):
        if described.name in ("group_name", "tag") and isinstance(arg, str):
            return dist.distributed_c10d._resolve_process_group(arg)  # type: ignore[arg-type]
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(described.type):
            return dist.ProcessGroup.unbox(arg)
    raise NotImplementedError(f"Traffic found no process group among the arguments of {func._schema.name}.")


def _bytes(arg: Any) -> int | None:
    """Bytes of a tensor, or of all tensors in nested lists; None for anything else."""
    if isinstance(arg, Tensor):
        return arg.numel() * arg.element_size()
    if isinstance(arg, list | tuple):
        inner = [size for item in arg if (size := _bytes(item)) is not None]
        return sum(inner) if inner or not arg else None
    return None
