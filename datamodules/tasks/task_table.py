"""Rows of clicks in the order of their tasks, on disk: a task is one block, and many neighbouring blocks are one large read.

A folder is a table of clicks (:mod:`datamodules.clicks.click_table`), whose rows are written in the order of their tasks, and by
time within a task, so that where time divides them the support comes first. Beside its columns lie

===================  ===================================================================================================
``SPLIT.index.npy``  int64 (N,), number of each row in its source
``SPLIT.tasks.npy``  (K,), of each task: ``offset`` of its first row, ``task``, its name as a number, ``count`` of its rows, and
                     ``crc``, the CRC-32 of the bytes of its columns, one column after another
===================  ===================================================================================================

Neighbours are unrelated: tasks are written in a shuffled order, so that runs of neighbours may be trained on together.

Shape suffixes: N rows, K tasks, n rows that are read, F fields of categories, D numbers.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from datamodules.base.held_out import held_out
from datamodules.base.loader import epoch_generator
from datamodules.clicks.click_table import ClickColumns, ClickRows, ClickTable, Split, TableWriter, open_table

__all__ = ["TASK", "ColdBy", "RowSource", "TaskTable", "open_tasks", "task_blocks", "write_tasks"]

ColdBy = Literal["task", "time"]
TASK = np.dtype([("offset", "<u8"), ("task", "<i8"), ("count", "<u4"), ("crc", "<u4")])
_COLUMNS = ("sparse", "dense", "label", "index")
_CHUNK = 1 << 18


@dataclass(frozen=True)
class RowSource:
    """Rows with the task of each.

    Attributes:
        columns: Names and sizes of the columns.
        parts: The rows; they are numbered through all parts.
        task_N: Task of each, int64 (N,).
        time_N: Time of each, (N,); ``None``: their order is that of time.
    """

    columns: ClickColumns
    parts: Sequence[ClickRows]
    task_N: np.ndarray
    time_N: np.ndarray | None = None

    def gather(self, place_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (n, F), numbers (n, D) and labels (n,) of some rows."""
        if len(self.parts) == 1:
            (part,) = self.parts
            return part.sparse[place_n], part.dense[place_n], _labels(part)[place_n]
        sparse = np.empty((len(place_n), len(self.columns.fields)), np.int32)
        dense, label = np.empty((len(place_n), len(self.columns.numbers)), np.float32), np.empty(len(place_n), np.uint8)
        first = 0
        for part in self.parts:
            own = (place_n >= first) & (place_n < first + len(part))
            rows = place_n[own] - first
            sparse[own], dense[own], label[own] = part.sparse[rows], part.dense[rows], _labels(part)[rows]
            first += len(part)
        return sparse, dense, label


def _labels(rows: ClickRows) -> np.ndarray:
    if rows.label is None:
        raise ValueError("Tasks are made of rows with labels, and these have none.")
    return rows.label


def task_blocks(task_N: np.ndarray, time_N: np.ndarray | None, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rows by task, and by time within a task.

    Args:
        task_N: Task of each row.
        time_N: Its time; ``None``: the order of the rows.
        least: Rows that a task must have.

    Returns:
        Places of the rows, one task after another (N,); where each task begins there, its number of rows (both (K,)); and how
        many tasks are left out because they are too short.

    Example:
        >>> task_blocks(np.array([7, 5, 7, 9, 5]), np.array([2, 0, 1, 0, 3]), least=2)[:3]
        (array([1, 4, 2, 0, 3]), array([0, 2]), array([2, 2]))
    """
    keys = (task_N,) if time_N is None else (time_N, task_N)
    place_N = np.lexsort(keys)
    _, begin, count = np.unique(task_N[place_N], return_index=True, return_counts=True)
    long = count >= least
    return place_N, begin[long], count[long], int((~long).sum())


def write_tasks(
    folder: Path, source: RowSource, least: int, cold_share: float, val_share: float, cold_by: ColdBy, exact: bool = True
) -> tuple[dict[Split, int], int]:
    """Write the tasks of a source into an empty folder: those for training, and cold ones, for validation and test.

    Args:
        folder: The folder.
        source: Rows and their tasks.
        least: Rows that a task must have; shorter ones are left out.
        cold_share: Share of the tasks that is held out for the test.
        val_share: Share that is held out for validation.
        cold_by: Whether a hash of a task holds it out, or that its first row is among the latest.
        exact: Whether a hash holds out exactly that share; else tasks that come later, with greater numbers, do not move others.

    Returns:
        Number of tasks of each split, and of those left out.

    Raises:
        ValueError: There is no task of so many rows.
    """
    place_N, begin_K, count_K, short = task_blocks(source.task_N, source.time_N, least)
    if not len(begin_K):
        raise ValueError(f"None of the {short} tasks has the {least} rows of support and query: lower support or query.")
    task_K = source.task_N[place_N[begin_K]]
    test_K, val_K = np.zeros((2, len(task_K)), dtype=bool)
    if cold_by == "time":
        first_K = place_N[begin_K] if source.time_N is None else source.time_N[place_N[begin_K]]
        late_K = np.argsort(-first_K, kind="stable")
        tests, cold = (round(share * len(task_K)) for share in (cold_share, cold_share + val_share))
        test_K[late_K[:tests]] = val_K[late_K[tests:cold]] = True
    else:
        names = task_K if exact else np.arange(int(task_K.max()) + 1)
        cold = held_out([str(task) for task in names.tolist()], cold_share, exact)
        others = names[~cold]
        chosen = held_out([f"validation {task}" for task in others.tolist()], val_share / (1 - cold_share), exact)
        test_K, val_K = np.isin(task_K, names[cold]), np.isin(task_K, others[chosen])
    shuffled = torch.randperm(len(task_K), generator=epoch_generator(0, 0, "tasks")).numpy()
    of_split: dict[Split, np.ndarray] = {"train": ~test_K & ~val_K, "val": val_K, "test": test_K}
    sides = {split: shuffled[mask_K[shuffled]] for split, mask_K in of_split.items()}
    writer = TableWriter(folder, source.columns, {split: int(count_K[side].sum()) for split, side in sides.items()})
    for split, side in sides.items():
        _write_split(folder, split, source, writer, place_N, begin_K[side], count_K[side], task_K[side])
    writer.close()
    return {split: len(side) for split, side in sides.items()}, short


def _write_split(
    folder: Path,
    split: Split,
    source: RowSource,
    writer: TableWriter,
    place_N: np.ndarray,
    begin_K: np.ndarray,
    count_K: np.ndarray,
    task_K: np.ndarray,
) -> None:
    tasks = np.zeros(len(task_K), TASK)
    tasks["offset"], tasks["task"], tasks["count"] = np.cumsum(count_K) - count_K, task_K, count_K
    index_N = np.concatenate([place_N[:0], *(place_N[b : b + c] for b, c in zip(begin_K, count_K, strict=True))])
    for first, last in _chunks(tasks):
        start, stop = int(tasks["offset"][first]), int(tasks["offset"][last - 1] + tasks["count"][last - 1])
        place_n = index_N[start:stop]
        sparse, dense, label = source.gather(place_n)
        writer.add(split, sparse, label, dense)
        read: dict[str, np.ndarray] = {
            "sparse": sparse.astype(np.int32),
            "dense": dense.astype(np.float32),
            "label": label.astype(np.uint8),
            "index": place_n.astype(np.int64),
        }
        tasks["crc"][first:last] = _crcs(read, tasks[first:last])
    np.save(folder / f"{split}.index.npy", index_N.astype(np.int64))
    np.save(folder / f"{split}.tasks.npy", tasks)


def _chunks(tasks: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of tasks with about `_CHUNK` rows each."""
    first = 0
    while first < len(tasks):
        last = int(np.searchsorted(tasks["offset"], tasks["offset"][first] + _CHUNK))
        yield first, max(last, first + 1)
        first = max(last, first + 1)


def _crcs(rows: Mapping[str, np.ndarray], tasks: np.ndarray) -> np.ndarray:
    """CRC-32 of neighbouring tasks, uint32, of their rows."""
    found = np.zeros(len(tasks), np.uint32)
    views = [np.ascontiguousarray(rows[name]) for name in _COLUMNS if rows[name].size]
    start = tasks["offset"].astype(np.int64) - int(tasks["offset"][0])
    for number, (first, last) in enumerate(zip(start.tolist(), (start + tasks["count"]).tolist(), strict=True)):
        crc = 0
        for view in views:
            crc = zlib.crc32(view[first:last].data, crc)
        found[number] = crc
    return found


class TaskTable:
    """A split of tasks on disk; nothing is read before it is asked for, and each task's CRC is checked when it is first read.

    Args:
        table: The columns of its rows.
        tasks: Its tasks, :data:`TASK` (K,).
    """

    def __init__(self, table: ClickTable, tasks: np.ndarray) -> None:
        self.table = table
        self.tasks = tasks
        self.checked = np.zeros(len(tasks), dtype=bool)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked opens the files itself.
        return {name: value for name, value in vars(self).items() if name != "files"}

    @cached_property
    def files(self) -> dict[str, _Column]:
        """The columns, opened when they are first asked for."""
        table = self.table
        shapes = {"sparse": (len(table.columns.fields),), "dense": (len(table.columns.numbers),)}
        kinds = {"sparse": np.int32, "dense": np.float32, "label": np.uint8, "index": np.int64}
        return {
            name: _Column(table.folder / f"{table.split}.{name}.npy", np.dtype(kinds[name]), shapes.get(name, ()), table.num_rows)
            for name in _COLUMNS
        }

    def _rows(self, first: int, last: int) -> tuple[int, int]:
        tasks = self.tasks
        return int(tasks["offset"][first]), int(tasks["offset"][last - 1]) + int(tasks["count"][last - 1])

    def ask(self, first: int, last: int) -> None:
        """Let the system fetch the rows of the tasks number ``first`` to ``last - 1`` while others are at work."""
        for file in self.files.values():
            file.ask(*self._rows(first, last))

    def read(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Rows of the tasks number ``first`` to ``last - 1``: ``sparse``, ``dense``, ``label`` and ``index``, one read each.

        Raises:
            ValueError: A block is corrupt.
        """
        tasks, (start, stop) = self.tasks[first:last], self._rows(first, last)
        rows = {name: file.read(start, stop) for name, file in self.files.items()}
        if not self.checked[first:last].all():
            wrong = np.flatnonzero(_crcs(rows, tasks) != tasks["crc"])
            if len(wrong):
                raise ValueError(
                    f"The block of task {tasks['task'][wrong[0]]} (number {first + wrong[0]} of {self.table.split}) in"
                    f" {self.table.folder.name} is corrupt, its CRC differs: delete the folder {self.table.folder}."
                )
            self.checked[first:last] = True
        return rows


class _Column:
    """A column on disk, read by large reads at places, which workers that share the file may do at once."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], num_rows: int) -> None:
        self.path, self.dtype, self.shape = path, dtype, shape
        self.row_bytes = dtype.itemsize * int(np.prod(shape))
        if not self.row_bytes:
            return
        try:
            found = np.load(path, mmap_mode="r")
            self.file = path.open("rb", buffering=0)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} of the cache cannot be read ({error}): delete the folder {path.parent}.") from error
        if found.shape != (num_rows, *shape) or found.dtype != dtype:
            raise ValueError(
                f"{path.name} of the cache holds {found.dtype} {found.shape}, not {dtype} {(num_rows, *shape)}: its blocks were"
                f" written with other columns; delete the folder {path.parent}."
            )
        self.begin = int(getattr(found, "offset", 0))

    def ask(self, start: int, stop: int) -> None:
        """Let the system fetch rows ``start`` to ``stop - 1``, where it takes advice."""
        if self.row_bytes and hasattr(os, "posix_fadvise"):
            place, length = self.begin + start * self.row_bytes, (stop - start) * self.row_bytes
            os.posix_fadvise(self.file.fileno(), place, length, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop - 1``."""
        rows = np.empty((stop - start, *self.shape), self.dtype)
        if not rows.nbytes:
            return rows
        bytes_, done = rows.view(np.uint8).reshape(-1).data, 0
        while done < len(bytes_):
            got = os.preadv(self.file.fileno(), [bytes_[done:]], self.begin + start * self.row_bytes + done)
            if not got:
                raise ValueError(f"{self.path} of the cache ends too early: delete the folder {self.path.parent}.")
            done += got
        return rows


def open_tasks(folder: Path, columns: ClickColumns | None = None) -> dict[Split, TaskTable]:
    """The splits of a folder of tasks.

    Args:
        folder: The folder.
        columns: Columns that it must have. ``None``: any.

    Raises:
        ValueError: The folder is damaged, or its blocks were written with other columns.
    """
    tables = open_table(folder)
    found = tables["train"].columns
    if columns is not None and found != columns:
        raise ValueError(
            f"The blocks in {folder.name} were written with the columns {', '.join((*found.fields, *found.numbers))[:80]}, not"
            f" {', '.join((*columns.fields, *columns.numbers))[:80]}: delete the folder {folder}."
        )
    opened: dict[Split, TaskTable] = {}
    for split, table in tables.items():
        path = folder / f"{split}.tasks.npy"
        try:
            tasks = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} of the cache cannot be read ({error}): delete the folder {folder}.") from error
        if tasks.dtype != TASK:
            raise ValueError(f"{path} holds no index of tasks: delete the folder {folder}.")
        opened[split] = TaskTable(table, tasks)
    return opened
