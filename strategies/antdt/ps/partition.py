"""Which server holds which part of the parameters.

Dense parameters are flattened, put one after another for each dtype, and cut into S ranges of equal length; a server holds the
pieces of parameters that lie in its range. Tables (embeddings) are dealt out by row, row r to server r mod S, so that frequent
rows, which often have low numbers, are spread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Entry", "Layout", "Piece"]


@dataclass(frozen=True)
class Entry:
    """A parameter.

    Attributes:
        name: in the module.
        shape: of the tensor.
        dtype: without ``torch.``.
        group: number of the optimizer's group of parameters.
        table: whether it is dealt out by row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    table: bool = False

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()


class Piece(NamedTuple):
    """Part of a dense parameter on a server.

    Attributes:
        entry: number of the parameter.
        offset: first element, counted in the flattened parameter.
        length: elements.
        start: where it begins in the server's range of this dtype.
    """

    entry: int
    offset: int
    length: int
    start: int


class Layout:
    """Where everything is.

    Args:
        entries: all parameters that are trained, in the order of the optimizer's groups.
        num_servers: S.

    Raises:
        ValueError: no server, or a table that has no rows.

    Example:
        >>> layout = Layout([Entry("weight", (3,), "float32", 0), Entry("bias", (2,), "float32", 0)], num_servers=2)
        >>> layout.pieces(1)
        [Piece(entry=0, offset=2, length=1, start=0), Piece(entry=1, offset=0, length=2, start=1)]
    """

    def __init__(self, entries: Sequence[Entry], num_servers: int) -> None:
        if num_servers < 1:
            raise ValueError(f"there must be at least one parameter server, not {num_servers}.")
        flat = [entry.name for entry in entries if entry.table and len(entry.shape) != 2]
        if flat:
            raise ValueError(f"{', '.join(flat)} cannot be dealt out by row: tables have two dimensions.")
        self.entries = list(entries)
        self.num_servers = num_servers
        self.tables = [number for number, entry in enumerate(self.entries) if entry.table]
        self.dense = [number for number, entry in enumerate(self.entries) if not entry.table]
        self.starts: dict[int, int] = {}
        """Where each dense parameter begins among those of its dtype."""
        self.sizes: dict[str, int] = {}
        """Elements of all dense parameters of a dtype."""
        for number in self.dense:
            entry = self.entries[number]
            self.starts[number] = self.sizes.get(entry.dtype, 0)
            self.sizes[entry.dtype] = self.starts[number] + entry.numel

    @property
    def dtypes(self) -> list[str]:
        """Of dense parameters, in the order in which their ranges travel."""
        return list(self.sizes)

    def span(self, dtype: str, server: int) -> tuple[int, int]:
        """The server's range ``[lo, hi)`` of the elements of a dtype."""
        size = self.sizes[dtype]
        return size * server // self.num_servers, size * (server + 1) // self.num_servers

    def pieces(self, server: int) -> list[Piece]:
        """What a server holds of dense parameters."""
        found = []
        for number in self.dense:
            entry, start = self.entries[number], self.starts[number]
            lo, hi = self.span(entry.dtype, server)
            first, last = max(start, lo), min(start + entry.numel, hi)
            if first < last:
                found.append(Piece(number, first - start, last - first, first - lo))
        return found

    def rows(self, table: int, server: int) -> int:
        """How many rows of a table a server holds."""
        return max(0, -(-(self.entries[table].shape[0] - server) // self.num_servers))

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        """For each server, a mask of the given global rows that it holds; there they have the number ``row // S``."""
        owner = rows % self.num_servers
        return [owner == server for server in range(self.num_servers)]

    def state_bytes(self, server: int) -> int:
        """Bytes of the parameters that a server holds."""
        dense = sum(piece.length * getattr(torch, self.entries[piece.entry].dtype).itemsize for piece in self.pieces(server))
        return dense + sum(
            self.rows(table, server) * self.entries[table].shape[1] * getattr(torch, self.entries[table].dtype).itemsize
            for table in self.tables
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"entries": [asdict(entry) for entry in self.entries], "num_servers": self.num_servers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Layout":
        """What `to_json` has made."""
        entries = [Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in data["entries"]]
        return cls(entries, int(data["num_servers"]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]
