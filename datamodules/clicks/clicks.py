"""Base of data sets of clicks: a table in the cache, its splits, and the rows of ``predict``.

Batches are :class:`~datamodules.clicks.click_table.ClickBatch`: ``{"index", "dense", "sparse", "label"}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from typing_extensions import override

from datamodules.base.cached_folder import prepare
from datamodules.base.datamodule import ZooDataModule
from datamodules.base.json_lines import OnError
from datamodules.base.loader import ResumableLoader, epoch_generator
from datamodules.clicks.click_table import ClickColumns, ClickRows, Split, open_table

__all__ = ["ClickData"]


class ClickData(ZooDataModule, ABC):
    """The base of click data; a subclass makes the table.

    Args:
        train_rows: Train on so many rows only, drawn once by ``seed``; ``None``: on all.
        predict_split: The split whose rows ``predict`` scores, unless ``predict_file`` is given.
        predict_file: The user's own rows for ``predict``, with or without labels.
        on_error: Treatment of malformed rows: ``raise`` an error that counts them and shows the first, or ``skip`` them
            and log their number.
        **kwargs: Arguments of `ZooDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    model_arguments: ClassVar[tuple[str, ...]] = ("field_dims", "num_dense")

    def __init__(
        self,
        train_rows: int | None = None,
        predict_split: Split = "test",
        predict_file: Path | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if train_rows is not None and train_rows < 1:
            raise ValueError(f"{name}: train_rows={train_rows} must be at least 1, or null.")
        for argument, value, choices in (("predict_split", predict_split, Split), ("on_error", on_error, OnError)):
            if value not in get_args(choices):
                raise ValueError(f"{name}: {argument}={value!r} must be one of {', '.join(get_args(choices))}.")
        self.train_rows = train_rows
        self.predict_split = predict_split
        self.predict_file = None if predict_file is None else Path(predict_file)
        self.on_error = on_error
        self._tables: dict[Split, Any] | None = None
        self._predict_set: ClickRows | None = None

    @abstractmethod
    def folder(self) -> Path:
        """Folder of the table in the cache; its name depends on everything that the table depends on."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Make the table in an empty folder."""

    @abstractmethod
    def read_file(self, path: Path) -> ClickRows:
        """Read the user's rows as the table's columns.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A row is malformed, or there is none.
        """

    @override
    def prepare_data(self) -> None:
        """Make the table, unless it is in the cache."""
        prepare(self.folder(), self.write)

    @property
    def tables(self) -> dict[Split, Any]:
        """The splits; opened on first use, and made if they are not there."""
        if self._tables is None:
            self.prepare_data()
            self._tables = open_table(self.folder())
        return self._tables

    @property
    def columns(self) -> ClickColumns:
        """The encoded columns."""
        return self.tables["train"].columns

    @property
    def field_dims(self) -> tuple[int, ...]:
        """Number of ids of each field of categories, an argument of models."""
        return self.columns.field_dims

    @property
    def num_dense(self) -> int:
        """Numbers of a row."""
        return len(self.columns.numbers)

    def dataset(self, split: Literal["train", "val", "test"]) -> Any:
        """The rows of a split (:class:`~datamodules.clicks.click_table.ClickTable`); ``train_rows`` of training."""
        table = self.tables[split]
        if split == "train" and self.train_rows is not None and self.train_rows < len(table):
            drawn = torch.randperm(len(table), generator=epoch_generator(self.data_seed, 0, "rows"))[: self.train_rows]
            return type(table)(table.folder, split, table.columns, table.num_rows, np.sort(drawn.numpy()))
        return table

    @override
    def setup(self, stage: str) -> None:
        """Open the table; read the user's file."""
        _ = self.tables
        if stage == "predict":
            self._predict_set = self._read_predict_set()

    def _read_predict_set(self) -> ClickRows:
        return self.dataset(self.predict_split) if self.predict_file is None else self.read_file(self.predict_file)

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        return self.train_loader(self.dataset("train"))

    @override
    def val_dataloader(self) -> ResumableLoader[Any] | list[Any]:
        """Validation batches; none where no rows are held out."""
        return self.eval_loader(self.dataset("val")) if len(self.dataset("val")) else []

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(self.dataset("test"))

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of the rows to score."""
        return self.eval_loader(self._predict_set or self._read_predict_set())
