"""The user's own rows as tasks: CSV or parquet files, such as one a day, of which later ones are appended.

Shape suffixes: N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from datamodules.base.json_lines import OnError
from datamodules.clicks.click_table import ClickColumns, ClickRows
from datamodules.clicks.csv_columns import Columns, open_columns, read_columns
from datamodules.clicks.feature_ids import Categories
from datamodules.tasks.task_table import RowSource

__all__ = ["TaskFiles"]

NAMES = "names.json"
"""File beside the blocks of a part with the names of all ids up to it."""


@dataclass(frozen=True)
class TaskFiles:
    """Files of rows with a line of names, and what their columns are.

    Blocks of a file are written once. A file that is added at the end of ``paths`` makes blocks of its own; values that it brings
    get the ids after those that are known, and so tables of a model grow at the end of each field (``GMeta.grown``). A task that
    has rows in several files is a task of each of them.

    Attributes:
        paths: The files, CSV or parquet, in the order of time.
        task: Column whose values are the tasks.
        fields: Columns of categories; id 0 is a missing value, or one that is new when rows are scored.
        numbers: Columns of numbers, taken as they are, which every row must have.
        label: Column of the label, 0 or 1; empty in a file to predict where a row is to be scored.
        time: Column of the time, a number; ``None``: rows are in the order of time.
    """

    paths: Sequence[Path]
    task: str
    fields: Sequence[str]
    numbers: Sequence[str] = ()
    label: str = "label"
    time: str | None = None

    def keys(self) -> list[str]:
        """Names of the parts: each depends on its file, on those before it, and on the choice of columns."""
        chain = hashlib.sha256(json.dumps({**asdict(self), "paths": None}, default=list).encode())
        keys = []
        for path in self.paths:
            with open_columns(Path(path)):
                pass
            with Path(path).open("rb") as file:
                chain.update(hashlib.file_digest(file, "sha256").digest())
            keys.append(chain.hexdigest())
        return keys

    def write_names(self, folder: Path, names: Mapping[str, Categories]) -> None:
        """Store the names of all ids."""
        (folder / NAMES).write_text(json.dumps({field: known.names for field, known in names.items()}))

    def names(self, folder: Path) -> dict[str, Categories]:
        """Names of all ids up to a part.

        Raises:
            ValueError: The file is damaged.
        """
        path = folder / NAMES
        try:
            return {field: Categories(tuple(known)) for field, known in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} of the cache cannot be read ({error}): delete the folder {folder}.") from error

    def read(self, path: Path, names: Mapping[str, Categories], on_error: OnError) -> tuple[RowSource, dict[str, Categories]]:
        """Rows of a file for training, and the names with those that it brings.

        Raises:
            ValueError: A column is missing, or rows are malformed and not skipped.
        """
        columns = self._columns(path, on_error, labelled=True)
        grown = {}
        for field in (self.task, *self.fields):
            known = names.get(field, Categories(()))
            new = sorted({*np.unique(columns[field]).tolist()} - {"", *known.names})
            grown[field] = Categories((*known.names, *new))
        rows, task_N = self._encode(columns, grown)
        return RowSource(self.click_columns(grown), [rows], task_N, columns[self.time] if self.time else None), grown

    def read_to_score(self, path: Path, names: Mapping[str, Categories], on_error: OnError) -> tuple[ClickRows, np.ndarray]:
        """Rows of a file to predict, with labels NaN where they are to be scored, and the task of each, int64 (N,).

        Tasks that are not known are numbered after those that are.

        Raises:
            ValueError: A column is missing, rows are malformed and not skipped, or there is none.
        """
        columns = self._columns(path, on_error, labelled=False)
        if not len(columns["index"]):
            raise ValueError(f"{path} holds no rows.")
        known = names[self.task].names
        new = sorted({*np.unique(columns[self.task]).tolist()} - {*known})
        return self._encode(columns, {**names, self.task: Categories((*known, *new))}, names)

    def click_columns(self, names: Mapping[str, Categories]) -> ClickColumns:
        """Names and sizes of the columns."""
        return ClickColumns(tuple(self.fields), tuple(names[field].num_ids for field in self.fields), tuple(self.numbers))

    def _columns(self, path: Path, on_error: OnError, labelled: bool) -> Columns:
        texts = list(dict.fromkeys((self.task, *self.fields)))
        numbers = [*self.numbers, *([self.time] if self.time else [])]
        required = [*numbers, *([self.label] if labelled else [])]
        with open_columns(path) as file:
            return read_columns(
                file, str(path), texts, [*numbers, self.label], required=required, check=self._unsound, on_error=on_error
            )

    def _unsound(self, columns: Columns) -> dict[int, str]:
        label_N = columns[self.label]
        wrong: dict[int, str] = {
            place: f"{self.label} is {label_N[place]:g}, not 0 or 1"
            for place in np.flatnonzero(~np.isnan(label_N) & (label_N != 0) & (label_N != 1)).tolist()
        }
        return wrong | dict.fromkeys(np.flatnonzero(columns[self.task] == "").tolist(), f"{self.task} is missing")

    def _encode(
        self, columns: Columns, names: Mapping[str, Categories], fields: Mapping[str, Categories] | None = None
    ) -> tuple[ClickRows, np.ndarray]:
        of_field = names if fields is None else fields
        num_rows = len(columns["index"])
        sparse = [of_field[field].ids(columns[field]) for field in self.fields]
        dense = [columns[number].astype(np.float32) for number in self.numbers]
        rows = ClickRows(
            np.stack(sparse, axis=1),
            np.stack(dense, axis=1) if dense else np.zeros((num_rows, 0), np.float32),
            columns[self.label],
            columns["index"].astype(np.int64),
        )
        return rows, names[self.task].ids(columns[self.task]).astype(np.int64)
