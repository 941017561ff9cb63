"""Tasks for meta learning (Meta-IO): from MovieLens-100K, any data of clicks or the user's files, in blocks for large reads.

Batches are :class:`~datamodules.tasks.task_sets.TaskBatch`. Source of the name: "G-Meta: Distributed Meta Learning in GPU
Clusters for Large-Scale Recommender Systems", Xiao et al., CIKM 2023, arXiv 2401.04338; the layout on disk is ours.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from datamodules.assets.fetch import MANIFEST, cache_folder, fetch
from datamodules.base.cached_folder import prepare
from datamodules.base.datamodule import ZooDataModule
from datamodules.base.json_lines import OnError
from datamodules.base.loader import ResumableLoader
from datamodules.clicks.click_table import SPLITS, ClickColumns, Split
from datamodules.clicks.clicks import ClickData
from datamodules.tasks.film_tasks import TaskKey, read_film_tasks, read_films_to_score
from datamodules.tasks.task_files import TaskFiles
from datamodules.tasks.task_sets import RowOrder, Share, TaskSet, TasksToScore
from datamodules.tasks.task_table import ColdBy, RowSource, TaskTable, open_tasks, write_tasks

__all__ = ["Tasks"]

_FORMAT = "2"  # another one makes the cache again
_ASSET = "movielens-100k"


class Tasks(ZooDataModule):
    """Tasks with a support and a query set: users of MovieLens-100K (fetched once), a field of any click data, or files.

    Training tasks come in the order of shuffled runs; validation and test give cold tasks, which training never sees. Tasks
    with fewer rows than support and query are left out, and their number is logged. ``batch_size`` counts tasks.

    Args:
        task_key: Whether a task of MovieLens is a user or a film.
        clicks: Data of clicks to take instead of MovieLens: the rows of all its splits.
        task_field: Field of ``clicks`` whose values are the tasks.
        files: Files of yours to take instead, CSV or parquet.
        support: Rows of a task to adapt on.
        query: Rows of a task to learn from, or to test.
        order: Whether support and query are drawn among all rows of a task, anew in each epoch, or are its first rows by time
            and those that follow.
        cold_share: Share of the tasks that is held out whole for the test.
        val_share: Share that is held out whole for validation.
        cold_by: Whether a hash of a task holds it out, or that its first row is among the latest.
        run: Tasks that stay neighbours when training shuffles, rounded up to whole global batches, so that a batch is one large
            read; 1 shuffles task by task, for data that memory holds.
        predict_file: The user's own rows: those with a label are adapted on, those without are scored. Of MovieLens a CSV file
            with the columns ``user_id, item_id, age, gender, occupation, zip_code, rating``; of ``files`` with their columns.
            Without one, cold tasks are scored.
        on_error: Treatment of malformed rows of it, and of ``files``.
        batch_size: Tasks in a batch of one process.
        **kwargs: Arguments of `ZooDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    model_arguments: ClassVar[tuple[str, ...]] = ("field_dims", "num_dense")

    def __init__(
        self,
        task_key: TaskKey = "user",
        clicks: ClickData | None = None,
        task_field: str | None = None,
        files: TaskFiles | None = None,
        support: int = 10,
        query: int = 10,
        order: RowOrder = "random",
        cold_share: float = 0.25,
        val_share: float = 0.1,
        cold_by: ColdBy = "task",
        run: int = 64,
        predict_file: Path | None = None,
        on_error: OnError = "raise",
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        for name, size in (("support", support), ("query", query), ("run", run)):
            if size < 1:
                raise ValueError(
                    f"Tasks: {name}={size} must be at least 1: a task needs rows to adapt on, and others to learn from."
                )
        choices = {"task_key": TaskKey, "order": RowOrder, "cold_by": ColdBy, "on_error": OnError}
        for name, value in (("task_key", task_key), ("order", order), ("cold_by", cold_by), ("on_error", on_error)):
            if value not in get_args(choices[name]):
                raise ValueError(f"Tasks: {name}={value!r} must be one of {', '.join(get_args(choices[name]))}.")
        if min(cold_share, val_share) < 0 or cold_share + val_share >= 1:
            raise ValueError(
                f"Tasks: cold_share={cold_share} and val_share={val_share} must be at least 0, and below 1 together."
            )
        if (clicks is None) != (task_field is None):
            raise ValueError("Tasks: give clicks and task_field together, the data and the field whose values are the tasks.")
        if clicks is not None and (predict_file is not None or files is not None):
            raise ValueError(
                "Tasks: clicks goes neither with files nor with predict_file; with clicks, predict scores cold tasks."
            )
        if files is not None and cold_by == "time":
            raise ValueError(
                "Tasks: with files, cold tasks are chosen by their hash, so that later files move none: cold_by: task."
            )
        self.task_key = task_key
        self.clicks = clicks
        self.task_field = task_field
        self.files = files
        self.support = support
        self.query = query
        self.order = order
        self.cold_share = cold_share
        self.val_share = val_share
        self.cold_by = cold_by
        self.run = run
        self.predict_file = None if predict_file is None else Path(predict_file)
        self.on_error = on_error
        self._tables: list[dict[Split, TaskTable]] | None = None

    def folders(self) -> list[Path]:
        """Folders of the blocks in the cache, one for each file; their names depend on everything that they depend on."""
        if self.files is not None:
            sources: list[Any] = self.files.keys()
        elif self.clicks is not None:
            sources = [[self.clicks.folder().name, str(self.task_field)]]
        else:
            sources = [[MANIFEST[_ASSET].sha256, self.task_key]]
        keys = [
            repr((_FORMAT, source, self.support + self.query, self.cold_share, self.val_share, self.cold_by))
            for source in sources
        ]
        return [cache_folder() / "tasks" / f"blocks-{hashlib.sha256(key.encode()).hexdigest()[:16]}" for key in keys]

    def _write(self, folder: Path, number: int, before: Path | None) -> None:
        """Write the blocks of a part into an empty folder."""
        if self.files is not None:
            path = self.files.paths[number]
            source, names = self.files.read(Path(path), self.files.names(before) if before else {}, self.on_error)
            self.files.write_names(folder, names)
            of = f"{path}: "
        else:
            of = ""
            source = read_film_tasks(fetch(_ASSET), self.task_key) if self.clicks is None else self._click_tasks(self.clicks)
        least = self.support + self.query
        exact = self.files is None
        tasks, short = write_tasks(folder, source, least, self.cold_share, self.val_share, self.cold_by, exact)
        rank_zero_info(
            f"Tasks: {of}{tasks['train']} for training, cold ones {tasks['val']} for validation and {tasks['test']} for the test;"
            f" {short} with fewer than {self.support} + {self.query} rows are left out."
        )

    def _click_tasks(self, clicks: ClickData) -> RowSource:
        columns, parts = clicks.columns, [clicks.tables[split] for split in SPLITS]
        if self.task_field not in columns.fields:
            raise ValueError(
                f"Tasks: task_field={self.task_field!r} is no field of {type(clicks).__name__}, which has"
                f" {', '.join(columns.fields)[:160]}."
            )
        field = columns.fields.index(str(self.task_field))
        return RowSource(columns, parts, np.concatenate([part.sparse[:, field] for part in parts]).astype(np.int64))

    @override
    def prepare_data(self) -> None:
        """Write the blocks that are not in the cache."""
        before = None
        for number, folder in enumerate(self.folders()):
            prepare(folder, partial(self._write, number=number, before=before))
            before = folder

    @property
    def tables(self) -> list[dict[Split, TaskTable]]:
        """The blocks of each part, by split; opened on first use, and made if they are not there."""
        if self._tables is None:
            self.prepare_data()
            self._tables = [open_tasks(folder) for folder in self.folders()]
        return self._tables

    @property
    def columns(self) -> ClickColumns:
        """The encoded columns."""
        return self.tables[-1]["train"].table.columns

    @property
    def field_dims(self) -> tuple[int, ...]:
        """Number of ids of each field of categories, an argument of models."""
        return self.columns.field_dims

    @property
    def num_dense(self) -> int:
        """Numbers of a row."""
        return len(self.columns.numbers)

    def dataset(self, split: Split) -> TaskSet:
        """Tasks for training, or cold ones (``val`` and ``test``)."""
        tables = [part[split] for part in self.tables]
        train = split == "train"
        return TaskSet(tables, self.support, self.query, self.order, self.data_seed, self._task_share(), train, self.run)

    def _task_share(self) -> Share:
        return Share((*self._share(), self.batch_size))

    @override
    def setup(self, stage: str) -> None:
        """Open the blocks."""
        _ = self.tables

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        dataset, processes = self.dataset("train"), self._share()[0]
        if len(dataset) < processes:
            raise ValueError(
                f"Tasks: {len(dataset)} task(s) cannot be shared out to {processes} processes: run on fewer devices."
            )
        return self.train_loader(dataset)

    @override
    def val_dataloader(self) -> ResumableLoader[Any] | list[Any]:
        """Cold tasks; none where none are held out for it."""
        return self.eval_loader(self.dataset("val")) if len(self.dataset("val")) else []

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(self.dataset("test"))

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of the tasks to score."""
        if self.predict_file is None:
            return self.test_dataloader()
        if self.files is not None:
            self.prepare_data()
            names = self.files.names(self.folders()[-1])
            rows, task_N = self.files.read_to_score(self.predict_file, names, self.on_error)
        else:
            rows, task_N = read_films_to_score(fetch(_ASSET), self.predict_file, self.task_key, self.on_error)
        return self.eval_loader(TasksToScore(self.columns, rows, task_N, self._task_share()))
