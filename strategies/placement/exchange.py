"""Exchange of samples and of their numbers between ranks, never of weights.

Two rules for all placements. *Share*: what a role computed for a sample travels to every other rank that infers, once,
by an uneven all-to-all that begins as soon as this rank has its own rows. *Send*: a chunk that is complete travels from
the ranks that infer to those that train, each of which gets it whole from one rank. Bytes of a share, sent by all ranks:
rows x bytes of a row x (ranks - 1); of a send: rows x bytes of a row x ranks that train.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.placement.plan import ranks_text
from zoo.role_placement import Fields, FieldSpec

__all__ = ["owners_of_rows", "pack", "receive", "row_bytes", "send", "share", "unpack", "waiting"]


def owners_of_rows(rows: int, unit: int, owners: Sequence[int], generators: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each rank that holds a role.

    Rows are dealt to the ranks that generate in consecutive units. A rank that holds the role takes its own, and those of some
    ranks that do not: owner j the j-th of as many equal parts of the others as there are owners. With halves of N ranks the
    pairs are j and j + N/2, as in the paper. Where ranks hold the role and do not generate, all its ranks take equal parts.

    Args:
        rows: Number of rows.
        unit: Rows that stay together.
        owners: Ranks that hold the role.
        generators: Ranks that generate.

    Example:
        >>> owners_of_rows(8, 2, [0, 1], [0, 1, 2, 3])
        {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}
    """
    if not set(owners) <= set(generators):
        return dict(zip(owners, _dealt(rows, unit, len(owners)), strict=True))
    generated = dict(zip(generators, _dealt(rows, unit, len(generators)), strict=True))
    others = [rank for rank in generators if rank not in owners]
    part = math.ceil(len(others) / len(owners))
    found = {}
    for number, owner in enumerate(owners):
        taken = [owner, *others[number * part : (number + 1) * part]]
        found[owner] = [row for rank in taken for row in generated[rank]]
    return found


def _dealt(rows: int, unit: int, ranks: int) -> list[list[int]]:
    """Consecutive rows for each rank, in whole units, as even as these allow."""
    units = -(-rows // unit)
    bounds = [min(rows, unit * (number * units // ranks)) for number in range(ranks + 1)]
    return [list(range(first, last)) for first, last in itertools.pairwise(bounds)]


def row_bytes(spec: FieldSpec) -> int:
    """Bytes of a row."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def pack(fields: Fields, spec: FieldSpec, rows: int) -> Tensor:
    """Fields of some rows as bytes, (rows, bytes of a row)."""
    parts = [fields[name].to(dtype).reshape(rows, -1).contiguous().view(torch.uint8) for name, (_, dtype) in spec.items()]
    return torch.cat(parts, dim=1)


def unpack(data: Tensor, spec: FieldSpec) -> Fields:
    """Fields of the rows that `pack` wrote."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in spec.values()]
    parts = data.split(sizes, dim=1)
    return {
        name: part.contiguous().view(dtype).reshape(len(data), *shape)
        for part, (name, (shape, dtype)) in zip(parts, spec.items(), strict=True)
    }


def share(
    own: Fields, spec: FieldSpec, rows: dict[int, list[int]], group: dist.ProcessGroup, device: torch.device, what: str
) -> Callable[[], Fields]:
    """Begin to share the rows of each rank of a group; returns a function that waits and gives all rows in order.

    Args:
        own: Fields of this rank's rows; empty if it has none.
        spec: Fields of a row.
        rows: Numbers of the rows of each rank that has some, by global rank.
        group: Ranks that get everything.
        device: Where results lie.
        what: Named if the wait fails.
    """
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    counts = [len(rows.get(rank, ())) for rank in ranks]
    mine = rows.get(me, [])
    width = row_bytes(spec)
    data = pack(own, spec, len(mine)) if mine else torch.empty(0, width, dtype=torch.uint8, device=device)
    others = len(ranks) - 1
    outgoing = data.repeat(others, 1) if others and len(mine) else data[:0]
    incoming = torch.empty(sum(counts) - len(mine), width, dtype=torch.uint8, device=device)
    place = ranks.index(me)
    give = [0 if number == place else len(mine) for number in range(len(ranks))]
    take = [0 if number == place else count for number, count in enumerate(counts)]
    work = dist.all_to_all_single(incoming, outgoing, take, give, group=group, async_op=True) if others else None

    def whole() -> Fields:
        with waiting(what, ranks):
            if work is not None:
                work.wait()
        parts = list(incoming.split([count for number, count in enumerate(take) if number != place]))
        parts.insert(place, data)
        order = torch.tensor([row for rank in ranks for row in rows.get(rank, ())], device=device)
        found = torch.cat(parts)
        return unpack(torch.empty_like(found).index_copy_(0, order, found), spec)

    return whole


def send(fields: Fields, spec: FieldSpec, rows: int, targets: Sequence[int]) -> list[tuple[dist.Work, Tensor]]:
    """Begin to send a chunk to some ranks; the tensors must be kept until the work is done."""
    data = pack(fields, spec, rows)
    found = []
    for target in targets:
        work = dist.isend(data, target)
        assert work is not None
        found.append((work, data))
    return found


def receive(spec: FieldSpec, rows: int, source: int, device: torch.device, what: str) -> Callable[[], Fields]:
    """Begin to receive a chunk; returns a function that waits for it."""
    data = torch.empty(rows, row_bytes(spec), dtype=torch.uint8, device=device)
    work = dist.irecv(data, source)
    assert work is not None

    def arrived() -> Fields:
        with waiting(what, [source]):
            work.wait()
        return unpack(data, spec)

    return arrived


@contextmanager
def waiting(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """Name what this rank waited for, if another one is lost or does not answer in time.

    Raises:
        RuntimeError: As torch does, with role, stage and ranks.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|timeout|timed out|connection", str(error).lower()):
            raise  # an error of the work itself
        reason = str(error).partition("] ")[2] or str(error)
        raise RuntimeError(
            f"Rank {dist.get_rank()} waited for {what}, from ranks {ranks_text(ranks)[:40]}: {reason[:100]} See the first error"
            " of these ranks, or raise timeout_minutes of the strategy."
        ) from error
