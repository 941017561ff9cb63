"""Clicks as columns on disk: numbers, ids of categories and labels, memory-mapped, read by the place of the row.

==================  ==========================================================================================================
``facts.json``      ``columns`` (names of the fields, how many ids each has, names of the numbers) and the rows of each split
``SPLIT.dense.npy``   float32 (N, D), numbers; absent where there are none
``SPLIT.sparse.npy``  int32 (N, F), ids of categories
``SPLIT.label.npy``   uint8 (N,), 1 for a click
==================  ==========================================================================================================

Shape suffixes: N rows, B rows of a batch, D numbers, F fields of categories.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SPLITS", "ClickBatch", "ClickColumns", "ClickRows", "ClickTable", "Split", "TableWriter", "open_table"]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ClickBatch(TypedDict, total=False):
    """A batch of rows; without the axis B, one row.

    Attributes:
        index: int64 (B,), number of the row in its data set, 0 to N - 1: what random draws of the sample depend on.
        dense: float32 (B, D), numbers; D may be 0.
        sparse: int64 (B, F), ids of categories: field f has ids 0 to ``field_dims[f] - 1``.
        label: float32 (B,), 1 for a click (of flights: late), else 0; absent where it is not known.
    """

    index: Tensor
    dense: Tensor
    sparse: Tensor
    label: Tensor


@dataclass(frozen=True)
class ClickColumns:
    """Names and sizes of the columns.

    Attributes:
        fields: Names of the fields of categories.
        field_dims: Number of ids of each.
        numbers: Names of the numbers.
    """

    fields: tuple[str, ...]
    field_dims: tuple[int, ...]
    numbers: tuple[str, ...] = ()


class ClickRows(Dataset[ClickBatch]):
    """Rows that are in memory already, such as those of a user's file.

    Args:
        sparse: int (N, F).
        dense: float32 (N, D).
        label: (N,), 0 or 1; ``None``: not known.
        index: int64 (N,), numbers of the rows; ``None``: 0 to N - 1.

    Example:
        >>> rows = ClickRows(np.array([[3, 1], [0, 2]]), np.zeros((2, 0), np.float32), np.array([1, 0]))
        >>> {name: values.tolist() for name, values in rows.batch([1]).items()}
        {'index': [1], 'dense': [[]], 'sparse': [[0, 2]], 'label': [0.0]}
    """

    def __init__(
        self, sparse: np.ndarray, dense: np.ndarray, label: np.ndarray | None = None, index: np.ndarray | None = None
    ) -> None:
        self.sparse = sparse
        self.dense = dense
        self.label = label
        self.index = index

    def __len__(self) -> int:
        return len(self.sparse)

    def __getitem__(self, index: int) -> ClickBatch:
        row: dict[str, Any] = {**self.batch([index])}
        return {name: values[0] for name, values in row.items()}  # type: ignore[return-value]

    def batch(self, indices: Sequence[int] | np.ndarray) -> ClickBatch:
        """A whole batch."""
        return self._read(np.asarray(indices, dtype=np.int64), None)

    def _read(self, place_B: np.ndarray, index_B: np.ndarray | None) -> ClickBatch:
        if index_B is None:
            index_B = place_B if self.index is None else self.index[place_B]
        batch: ClickBatch = {
            "index": torch.from_numpy(index_B),
            "dense": torch.from_numpy(np.asarray(self.dense[place_B], dtype=np.float32)),
            "sparse": torch.from_numpy(np.asarray(self.sparse[place_B], dtype=np.int64)),
        }
        if self.label is not None:
            batch["label"] = torch.from_numpy(np.asarray(self.label[place_B], dtype=np.float32))
        return batch


class ClickTable(ClickRows):
    """A split of a table on disk, or some of its rows; nothing is read before it is asked for.

    Args:
        folder: The table.
        split: Name of the split.
        columns: Its columns.
        num_rows: Number of rows of the split.
        places: int64 (n,), the rows to take; ``None``: all.
    """

    def __init__(
        self, folder: Path, split: Split, columns: ClickColumns, num_rows: int, places: np.ndarray | None = None
    ) -> None:
        self.folder = folder
        self.split = split
        self.columns = columns
        self.num_rows = num_rows
        self.places = places
        self.index = None

    def __len__(self) -> int:
        return self.num_rows if self.places is None else len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked opens the files itself, instead of being sent what they hold.
        return {name: value for name, value in vars(self).items() if name not in ("dense", "sparse", "label")}

    @cached_property
    def sparse(self) -> np.ndarray:  # type: ignore[override]
        """int32 (N, F), on disk until it is asked for."""
        return self._map("sparse", (self.num_rows, len(self.columns.fields)))

    @cached_property
    def dense(self) -> np.ndarray:  # type: ignore[override]
        """float32 (N, D), on disk until it is asked for."""
        shape = (self.num_rows, len(self.columns.numbers))
        return self._map("dense", shape) if shape[1] else np.zeros(shape, np.float32)

    @cached_property
    def label(self) -> np.ndarray:  # type: ignore[override]
        """uint8 (N,), on disk until it is asked for."""
        return self._map("label", (self.num_rows,))

    def batch(self, indices: Sequence[int] | np.ndarray) -> ClickBatch:
        """A whole batch."""
        index_B = np.asarray(indices, dtype=np.int64)
        return self._read(index_B if self.places is None else self.places[index_B], index_B)

    def _map(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / f"{self.split}.{name}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} of the cache cannot be read ({error}): delete the folder {self.folder}.") from error
        if array.shape != shape:
            raise ValueError(f"{path} holds an array of shape {array.shape}, not {shape}: delete the folder {self.folder}.")
        return array


class TableWriter:
    """Fills a table on disk, block by block, in the order of the rows.

    Args:
        folder: An empty folder.
        columns: Its columns.
        num_rows: Number of rows of each split.
    """

    def __init__(self, folder: Path, columns: ClickColumns, num_rows: Mapping[Split, int]) -> None:
        self.folder = folder
        self.columns = columns
        self.num_rows = num_rows
        self._filled = dict.fromkeys(SPLITS, 0)
        kinds: dict[str, tuple[type, tuple[int, ...]]] = {
            "sparse": (np.int32, (len(columns.fields),)),
            "label": (np.uint8, ()),
        }
        if columns.numbers:
            kinds["dense"] = (np.float32, (len(columns.numbers),))
        self._arrays = {
            (split, name): np.lib.format.open_memmap(
                folder / f"{split}.{name}.npy", mode="w+", dtype=dtype, shape=(num_rows[split], *shape)
            )
            for split in SPLITS
            for name, (dtype, shape) in kinds.items()
        }

    def add(self, split: Split, sparse: np.ndarray, label: np.ndarray, dense: np.ndarray | None = None) -> None:
        """Append rows to a split.

        Args:
            split: Name of the split.
            sparse: int (n, F).
            label: (n,), 0 or 1.
            dense: float (n, D), where there are numbers.

        Raises:
            ValueError: An id lies outside its field, or there are more rows than were announced.
        """
        start, stop = self._filled[split], self._filled[split] + len(sparse)
        if stop > self.num_rows[split]:
            raise ValueError(f"{self.folder}: {split} was announced with {self.num_rows[split]} rows, and has {stop} or more.")
        if len(sparse) and ((sparse < 0) | (sparse >= np.array(self.columns.field_dims))).any():
            raise ValueError(f"{self.folder}: an id of {split} lies outside its field: {self.columns.field_dims}.")
        for name, values in (("sparse", sparse), ("label", label), ("dense", dense)):
            if (split, name) in self._arrays:
                self._arrays[split, name][start:stop] = values
        self._filled[split] = stop

    def close(self) -> None:
        """Write everything to disk, and the facts last.

        Raises:
            ValueError: A split has fewer rows than were announced.
        """
        if self._filled != dict(self.num_rows):
            raise ValueError(f"{self.folder}: rows were announced as {dict(self.num_rows)}, and are {self._filled}.")
        for array in self._arrays.values():
            array.flush()
        self._arrays.clear()
        facts = {"columns": asdict(self.columns), "num_rows": dict(self.num_rows)}
        (self.folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def open_table(folder: Path) -> dict[Split, ClickTable]:
    """The splits of a table on disk.

    Raises:
        ValueError: The table is damaged.
    """
    try:
        facts = json.loads((folder / "facts.json").read_text())
        columns = ClickColumns(**{name: tuple(values) for name, values in facts["columns"].items()})
        return {split: ClickTable(folder, split, columns, facts["num_rows"][split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'facts.json'} is damaged ({error}): delete the folder {folder}.") from error
