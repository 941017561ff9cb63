"""Rows of tables by number, as a local copy that a computation may read, change and differentiate.

Shape suffixes: V rows of a table, U distinct rows that were asked for, D size of a row.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

__all__ = ["LocalRows", "RowLink", "Rows", "places"]


class Rows(NamedTuple):
    """A copy of the rows that were asked for.

    Attributes:
        ids_U: Row numbers, int64, sorted, each once.
        values: By name of the table (U, D of the table); their gradients reach the tables.
    """

    ids_U: Tensor
    values: dict[str, Tensor]


class RowLink(Protocol):
    """Fetches rows of tables; all tables have the same rows."""

    def fetch(self, tables: Mapping[str, Tensor], groups: Sequence[Tensor], sparse: bool = False) -> Rows:
        """Copy the rows that a computation needs.

        Among ranks a collective call; the gradient of a rank's rows is then the mean over the ranks, as of other parameters.

        Args:
            tables: By name; (V, D) each, or the rows of it that this rank keeps.
            groups: Row numbers, int64 of any shape, in the order of use: support and query of each task in turn, or all of a
                batch at once.
            sparse: Give tables sparse gradients, of the rows that were asked for.
        """
        ...


class LocalRows:
    """Rows of tables that this process has whole."""

    def fetch(self, tables: Mapping[str, Tensor], groups: Sequence[Tensor], sparse: bool = False) -> Rows:
        """Copy rows, see `RowLink.fetch`."""
        ids_U = torch.cat([group.reshape(-1) for group in groups]).unique()
        return Rows(ids_U, {name: embedding(ids_U, table, sparse=sparse) for name, table in tables.items()})


def places(ids_U: Tensor, ids: Tensor) -> Tensor:
    """Places of row numbers in a sorted copy: ``ids_U[places] == ids``; all must be there.

    Args:
        ids_U: int64, sorted, distinct.
        ids: int64 of any shape.
    """
    return torch.searchsorted(ids_U, ids)
