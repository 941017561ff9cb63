"""Batches of tasks: support and query of each, drawn or by time, and the order of training in runs of neighbours.

Shape suffixes: T tasks, S rows of support, Q of query, K places of a task's rows, n rows that were read, F fields of categories,
D numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base.loader import epoch_generator
from datamodules.clicks.click_table import ClickColumns, ClickRows
from datamodules.tasks.task_table import TaskTable
from zoo.base.random import SampleRandom

__all__ = ["Share", "TaskBatch", "TaskRows", "TaskSet", "TasksToScore"]

RowOrder = Literal["random", "chronological"]
_AHEAD = 2
"""Batches after which one is read that the system is asked for now."""


class TaskRows(TypedDict):
    """Rows of tasks, padded on the right: entries that are padding have index -1, and 0 elsewhere.

    Attributes:
        sparse: int64 (T, K, F), ids of categories: field f has ids 0 to ``field_dims[f] - 1``.
        dense: float32 (T, K, D), numbers; D may be 0.
        label: float32 (T, K), 1 for a click, else 0; 0 also where it is not known, in the query of a user's file.
        mask: bool (T, K), false for padding.
        index: int64 (T, K), number of the row in its source.
    """

    sparse: Tensor
    dense: Tensor
    label: Tensor
    mask: Tensor
    index: Tensor


class TaskBatch(TypedDict):
    """A batch of tasks; T may be 0 in evaluation, on a process with fewer tasks than others.

    Attributes:
        support: Rows to adapt on, K = S.
        query: Rows to score, K = Q.
        task: int64 (T,), names of the tasks as numbers: of a user or a film its id, of a field its value.
        num_tasks: Number of tasks of this batch on all processes together.
    """

    support: TaskRows
    query: TaskRows
    task: Tensor
    num_tasks: int


class Share(tuple[int, int, int]):
    """Processes, place of this one, and tasks of its batches."""

    @property
    def global_batch(self) -> int:
        """Tasks of a batch of all processes."""
        return self[0] * self[2]


class _TaskBatches(Dataset[TaskBatch]):
    """What data sets of tasks have in common: their length and the number of tasks of a batch."""

    columns: ClickColumns

    def __init__(self, length: int, share: Share, train: bool) -> None:
        self.length, self.share, self.train = length, share, train

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TaskBatch:
        return self.batch([index])

    def batch(self, indices: Sequence[int]) -> TaskBatch:
        raise NotImplementedError

    def blank(self) -> TaskBatch:
        """The last batch of a process that has no task in it."""
        sparse, dense = (np.zeros((0, len(names)), kind) for names, kind in (
            (self.columns.fields, np.int32), (self.columns.numbers, np.float32)))  # fmt: skip
        rows: dict[str, np.ndarray] = {
            "sparse": sparse,
            "dense": dense,
            "label": np.zeros(0, np.uint8),
            "index": np.zeros(0, np.int64),
        }
        none = _padded(rows, np.zeros((0, 1), np.int64), np.zeros((0, 1), bool))
        return {"support": none, "query": none, "task": torch.zeros(0, dtype=torch.int64), "num_tasks": self._num_tasks(None)}

    def _num_tasks(self, first: int | None) -> int:
        """Tasks of the global batch that begins at or before a task; ``None``: of the last one."""
        whole = self.share.global_batch
        if self.train:
            return whole
        batch = ((self.length - 1) if first is None else first) // whole
        return min(whole, self.length - batch * whole)


class TaskSet(_TaskBatches):
    """Tasks of fixed sizes of support and query.

    Args:
        tables: Tables of tasks, numbered through all of them.
        support: Rows of support, S.
        query: Rows of query, Q.
        order: Whether each epoch draws support and query among the rows of the task, or they are its first S rows and the Q rows
            after these.
        seed: Seed of the draws.
        share: This process's share.
        train: Whether the tasks are for training; otherwise the draws are those of one epoch, named evaluation.
        run: Tasks that stay neighbours when training shuffles.
    """

    def __init__(
        self,
        tables: Sequence[TaskTable],
        support: int,
        query: int,
        order: RowOrder,
        seed: int,
        share: Share,
        train: bool,
        run: int = 1,
    ) -> None:
        super().__init__(sum(map(len, tables)), share, train)
        self.tables = [table for table in tables if len(table)] or tables[:1]
        self.first_T = np.cumsum([0, *map(len, self.tables)])
        self.columns = self.tables[-1].table.columns
        self.support, self.query, self.order, self.seed, self.run = support, query, order, seed, run
        self.epoch = 0
        self._stream: np.ndarray | None = None

    @property
    def tasks(self) -> np.ndarray:
        """Names of all tasks as numbers, int64."""
        return np.concatenate([table.tasks["task"] for table in self.tables])

    def set_epoch(self, epoch: int) -> None:
        """Draw support and query of this epoch from now on."""
        self.epoch = epoch
        self._stream = None

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """Tasks of an epoch of training, a pure function of (seed, epoch) and the size of the global batch.

        The ring of all tasks is cut at a random place into runs of neighbours; runs are shuffled, the last, short one comes last.
        Within each global batch, each process gets neighbours.
        """
        batch, generator = self.share.global_batch, epoch_generator(seed, epoch, "order")
        length, run = self.length, 1 if self.run == 1 else -(-self.run // batch) * batch
        start = int(torch.randint(length, (1,), generator=generator))
        ring = (np.arange(length) + start) % length
        whole = length // run * run
        shuffled = torch.randperm(length // run, generator=generator).numpy()
        order = np.concatenate([ring[:whole].reshape(-1, run)[shuffled].ravel(), ring[whole:]])
        full = length // batch * batch
        by_process = order[:full].reshape(-1, self.share[0], self.share[2]).transpose(0, 2, 1)
        return np.concatenate([by_process.ravel(), order[full:]])

    def _ask_ahead(self, number_T: np.ndarray) -> None:
        """Let the system fetch a later batch of this process, unless it follows on disk, where the system reads on by itself."""
        if self._stream is None:
            processes, rank, _ = self.share
            self._stream = self.epoch_order(self.epoch, self.seed)[rank::processes]
            self._place = np.full(self.length, -1)
            self._place[self._stream] = np.arange(len(self._stream))
        first = int(self._place[number_T[0]]) + _AHEAD * len(number_T)
        asked = self._stream[first : first + len(number_T)]
        if len(asked) and asked[0] != number_T[0] + _AHEAD * len(number_T):
            for table, start, stop in self._stretches(asked):
                table.ask(start, stop)

    def batch(self, indices: Sequence[int]) -> TaskBatch:
        """A whole batch."""
        number_T = np.asarray(indices, dtype=np.int64)
        rows, begin_T, count_T, task_T = self.read(number_T)
        place_TK = begin_T[:, None] + self._chosen(number_T, count_T)
        support, query = place_TK[:, : self.support], place_TK[:, self.support :]
        return {
            "support": _padded(rows, support),
            "query": _padded(rows, query),
            "task": torch.from_numpy(task_T),
            "num_tasks": self._num_tasks(int(number_T[0])),
        }

    def _chosen(self, number_T: np.ndarray, count_T: np.ndarray) -> np.ndarray:
        """Places within their tasks of the rows of support and then query, int64 (T, S + Q)."""
        chosen = self.support + self.query
        if self.order == "chronological":
            return np.arange(chosen)[None].repeat(len(number_T), 0)
        draw = SampleRandom(self.seed, torch.from_numpy(number_T), self.epoch if self.train else 0)
        width = int(count_T.max())
        drawn_TK = draw.uniform("rows" if self.train else "rows of evaluation", (width,)).numpy()
        drawn_TK[np.arange(width) >= count_T[:, None]] = 2
        return np.argsort(drawn_TK, axis=1, kind="stable")[:, :chosen]

    def read(self, number_T: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """Rows of some tasks, one read for each stretch of neighbours; where each begins, its number of rows, its name."""
        parts, counts, tasks = [], [], []
        for table, start, stop in self._stretches(number_T):
            parts.append(table.read(start, stop))
            counts.append(table.tasks["count"][start:stop])
            tasks.append(table.tasks["task"][start:stop])
        if self.train and self.run > 1:
            self._ask_ahead(number_T)
        rows = parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        count_T = np.concatenate(counts).astype(np.int64)
        return rows, np.cumsum(count_T) - count_T, count_T, np.concatenate(tasks)

    def _stretches(self, number_T: np.ndarray) -> Iterator[tuple[TaskTable, int, int]]:
        """Stretches of neighbours among some tasks: their table, and numbers of the first and the one after the last in it."""
        ends = np.flatnonzero(number_T[1:] != number_T[:-1] + 1) + 1
        for first, last in zip([0, *ends.tolist()], [*ends.tolist(), len(number_T)], strict=True):
            start, stop = int(number_T[first]), int(number_T[last - 1]) + 1
            while start < stop:
                place = int(np.searchsorted(self.first_T, start, side="right")) - 1
                until = min(stop, int(self.first_T[place + 1]))
                yield self.tables[place], start - int(self.first_T[place]), until - int(self.first_T[place])
                start = until


class TasksToScore(_TaskBatches):
    """Tasks of a user's rows: those with a label are support, the others query; tasks of no query are left out.

    Args:
        columns: The columns.
        rows: The rows, their labels NaN where they are not known.
        task_N: Task of each row, int64 (N,).
        share: This process's share.

    Raises:
        ValueError: All rows have labels.
    """

    def __init__(self, columns: ClickColumns, rows: ClickRows, task_N: np.ndarray, share: Share) -> None:
        known_N = ~np.isnan(rows.label) if rows.label is not None else np.zeros(len(rows), dtype=bool)
        place_N = np.lexsort((~known_N, task_N))
        tasks, begin, count = np.unique(task_N[place_N], return_index=True, return_counts=True)
        support = np.add.reduceat(known_N[place_N].astype(np.int64), begin)
        asked = count > support
        if not asked.any():
            raise ValueError("Every row to predict has a label: leave the label of rows that are to be scored empty.")
        super().__init__(int(asked.sum()), share, train=False)
        self.columns, self.tasks = columns, tasks[asked]
        self.begin_T, self.support_T, self.count_T = begin[asked], support[asked], count[asked]
        self.left_out = int((~asked).sum())
        index_N = np.arange(len(rows)) if rows.index is None else rows.index
        label_N = np.zeros(len(rows)) if rows.label is None else np.nan_to_num(rows.label)
        self.rows = {
            "sparse": rows.sparse[place_N], "dense": rows.dense[place_N], "label": label_N[place_N], "index": index_N[place_N]
        }  # fmt: skip

    def batch(self, indices: Sequence[int]) -> TaskBatch:
        """A whole batch, padded to its longest support and query."""
        number_T = np.asarray(indices, dtype=np.int64)
        begin_T, support_T, count_T = (each[number_T] for each in (self.begin_T, self.support_T, self.count_T))
        return {
            "support": _stretches(self.rows, begin_T, support_T),
            "query": _stretches(self.rows, begin_T + support_T, count_T - support_T),
            "task": torch.from_numpy(self.tasks[number_T]),
            "num_tasks": self._num_tasks(int(number_T[0])),
        }


def _stretches(rows: Mapping[str, np.ndarray], begin_T: np.ndarray, count_T: np.ndarray) -> TaskRows:
    place_K = np.arange(max(1, int(count_T.max())))
    mask_TK = place_K < count_T[:, None]
    return _padded(rows, np.where(mask_TK, begin_T[:, None] + place_K, 0), mask_TK)


def _padded(rows: Mapping[str, np.ndarray], place_TK: np.ndarray, mask_TK: np.ndarray | None = None) -> TaskRows:
    """Rows at places; where the mask is false, padding."""
    kinds: dict[str, Any] = {"sparse": np.int64, "dense": np.float32, "label": np.float32, "index": np.int64}
    found = {name: rows[name][place_TK].astype(kind) for name, kind in kinds.items()}
    if mask_TK is None:
        mask_TK = np.ones(place_TK.shape, dtype=bool)
    else:
        for name, values in found.items():
            values[~mask_TK] = -1 if name == "index" else 0
    tensors = {name: torch.from_numpy(values) for name, values in found.items()}
    return TaskRows(**tensors, mask=torch.from_numpy(mask_TK))  # type: ignore[typeddict-item]
