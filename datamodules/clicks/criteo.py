"""Criteo's logs of display advertisements, from the official files: the Kaggle challenge (45.8 million rows) and the terabyte.

Batches are :class:`~datamodules.clicks.click_table.ClickBatch`. All 39 columns become fields of categories, none numbers.

Shape suffixes: n rows, I 13 integers, C 26 categories.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from datamodules.assets.fetch import cache_folder
from datamodules.base.json_lines import MalformedRows, OnError
from datamodules.clicks.click_table import SPLITS, ClickColumns, ClickRows, TableWriter
from datamodules.clicks.clicks import ClickData
from datamodules.clicks.criteo_rows import (
    MISSING,
    NUM_CATEGORIES,
    NUM_INTEGERS,
    CriteoRows,
    first_line_has_label,
    parse_block,
    read_blocks,
)

__all__ = ["Criteo", "integer_ids"]

_FORMAT = "1"  # another one makes the cache again
_INTEGER_IDS = 468  # of 2^31 - 1, plus one
_SHARES = (0.8, 0.9)  # where validation and test begin


class Criteo(ClickData):
    """Clicks on display advertisements (Criteo), read from the official files in a folder of yours.

    Integers become ranges: missing; -3 or less, -2 ... 2; ``floor(ln(x)^2)`` above. Categories are missing, rare (fewer than
    ``min_count`` times in the training rows, or unseen), or one of ``hash_size`` ids by a hash of field and category. Rows are
    divided 8 : 1 : 1 by a hash of their number. The first use reads the files twice and writes a memory-mapped table, 157 bytes a
    row, into the cache (``$LIGHTNING_ZOO_CACHE``).

    ``predict_file`` is a file in the same form, with or without the column of labels (``test.txt`` has none).

    Args:
        root: Folder with ``train.txt`` of the Kaggle challenge, or ``day_0.gz`` ... of the terabyte (unpacked or not).
        min_count: Occurrences in the training rows that give a category an id of its own; 1: no counting, which needs memory
            for every distinct category.
        hash_size: Ids of each field of categories, besides those of missing and rare ones.
        **kwargs: Arguments of `ClickData` and `ZooDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, root: Path, min_count: int = 10, hash_size: int = 131_072, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min_count < 1 or hash_size < 1 or hash_size > 2**31 - 3:
            raise ValueError(f"Criteo: min_count={min_count} must be at least 1, hash_size={hash_size} lie in 1 ... 2^31 - 3.")
        self.root = Path(root)
        self.min_count = min_count
        self.hash_size = hash_size

    def files(self) -> list[Path]:
        """The official files, in the order of their days.

        Raises:
            FileNotFoundError: There are none.
        """
        for name in ("train.txt", "train.txt.gz"):
            if (self.root / name).is_file():
                return [self.root / name]
        days: dict[int, Path] = {}
        for path in sorted(self.root.glob("day_*"), reverse=True):  # the unpacked one, if there are both
            if found := re.fullmatch(r"day_(\d+)(\.gz)?", path.name):
                days[int(found[1])] = path
        if not days:
            raise FileNotFoundError(
                f"Criteo: {self.root} holds neither train.txt (Kaggle display advertising challenge) nor day_0.gz, day_1.gz ..."
                " (terabyte click logs): download them from Criteo and name their folder as root."
            )
        return [days[day] for day in sorted(days)]

    def folder(self) -> Path:
        """Folder of the table in the cache."""
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files()]
        key = repr((_FORMAT, facts, self.min_count, self.hash_size, self.on_error))
        return cache_folder() / "clicks" / f"criteo-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def write(self, folder: Path) -> None:
        """Count categories and rows in a first pass over the files, make the table in a second one.

        Raises:
            ValueError: There are malformed rows, or none for training.
            OSError: A file cannot be read.
        """
        files = self.files()
        rank_zero_info(f"Reading {len(files)} file(s) of Criteo in {self.root}, once: the table will lie in the cache.")
        counts = [_Counts() for _ in range(NUM_CATEGORIES)] if self.min_count > 1 else []
        num_rows = dict.fromkeys(SPLITS, 0)
        for rows, split_n in _numbered(files, self.on_error):
            for number, split in enumerate(SPLITS):
                num_rows[split] += int((split_n == number).sum())
            for column, count in enumerate(counts):
                count.add(rows.categories[split_n == 0, column])
        if not num_rows["train"]:
            raise ValueError(f"Criteo: the files in {self.root} hold no rows to train on.")
        common = [count.at_least(self.min_count) for count in counts]
        for column, values in enumerate(common):
            np.save(folder / f"common.{column}.npy", values)
        writer = TableWriter(folder, self.columns, num_rows)
        for rows, split_n in _numbered(files, "skip", quiet=True):
            ids = self.encode(rows, common)
            for number, split in enumerate(SPLITS):
                writer.add(split, ids[split_n == number], rows.label[split_n == number])
        writer.close()

    @property
    @override
    def columns(self) -> ClickColumns:
        """The encoded columns, known without the files."""
        names = (*(f"I{n}" for n in range(1, NUM_INTEGERS + 1)), *(f"C{n}" for n in range(1, NUM_CATEGORIES + 1)))
        return ClickColumns(names, (_INTEGER_IDS,) * NUM_INTEGERS + (self.hash_size + 2,) * NUM_CATEGORIES)

    def encode(self, rows: CriteoRows, common: list[np.ndarray]) -> np.ndarray:
        """Ids int32 (n, I + C).

        Args:
            rows: Parsed rows.
            common: Of each field the categories that are not rare, int64 ascending; empty: none counts as rare.
        """
        ids = np.empty((len(rows.label), NUM_INTEGERS + NUM_CATEGORIES), np.int32)
        ids[:, :NUM_INTEGERS] = integer_ids(rows.integers)
        for column in range(NUM_CATEGORIES):
            value_n = rows.categories[:, column]
            hashed_n = _mixed((value_n + (column << 32)).astype(np.uint64)) % np.uint64(self.hash_size)
            id_n = hashed_n.astype(np.int64) + 2
            if common:
                place_n = np.searchsorted(common[column], value_n)
                known_n = place_n < len(common[column])
                known_n[known_n] = common[column][place_n[known_n]] == value_n[known_n]
                id_n = np.where(known_n, id_n, 1)
            ids[:, NUM_INTEGERS + column] = np.where(value_n < 0, 0, id_n)
        return ids

    def read_file(self, path: Path) -> ClickRows:
        """Read the user's rows.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A row is malformed, or there is none.
        """
        if not path.is_file():
            raise FileNotFoundError(f"predict_file: {path} does not exist: give a file in the form of Criteo's.")
        labelled = first_line_has_label(path)
        folder = self.folder()
        common = [np.load(folder / f"common.{column}.npy") for column in range(NUM_CATEGORIES)] if self.min_count > 1 else []
        ids, labels, lines = [], [], []
        for rows, line_n in _parsed([path], self.on_error, labelled):
            ids.append(self.encode(rows, common))
            labels.append(rows.label)
            lines.append(line_n)
        if not sum(map(len, ids)):
            raise ValueError(f"{path} holds no rows.")
        sparse = np.concatenate(ids)
        return ClickRows(
            sparse, np.zeros((len(sparse), 0), np.float32), np.concatenate(labels) if labelled else None, np.concatenate(lines)
        )


def integer_ids(integers: np.ndarray) -> np.ndarray:
    """Ranges of Criteo's integers, int32: 0 missing, 1 to 6 for -3 (or less) to 2, above 6 + floor(ln(x)^2).

    >>> integer_ids(np.array([MISSING, -7, -1, 0, 2, 3, 100, 2**40])).tolist()
    [0, 1, 3, 4, 6, 7, 27, 467]
    """
    large = np.floor(np.log(np.clip(integers, 3, 2**31 - 1).astype(float)) ** 2).astype(np.int32) + 6
    ids = np.where(integers > 2, large, np.clip(integers, -3, 2) + 4)
    return np.where(integers == MISSING, 0, ids).astype(np.int32)


class _Counts:
    """Counts of values; new ones are gathered before they are merged, so that the whole is seldom copied."""

    def __init__(self) -> None:
        self.values = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self.new: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, values: np.ndarray) -> None:
        """Count values; negative ones are none."""
        self.new.append(np.unique(values[values >= 0], return_counts=True))
        if sum(len(found) for found, _ in self.new) > max(len(self.values), 1 << 16):
            self._merge()

    def _merge(self) -> None:
        parts = [(self.values, self.counts), *self.new]
        self.values, place = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([counts for _, counts in parts]), len(self.values)).astype(np.int64)
        self.new = []

    def at_least(self, min_count: int) -> np.ndarray:
        """The values seen so often, ascending."""
        self._merge()
        return self.values[self.counts >= min_count]


def _parsed(
    files: list[Path], on_error: OnError, labelled: bool = True, quiet: bool = False
) -> Iterator[tuple[CriteoRows, np.ndarray]]:
    """Blocks of rows, and the number of each row's line over all files, from 0.

    Raises:
        ValueError: There are malformed rows, and they are not skipped.
    """
    before = 0
    for path in files:
        problems, lines = MalformedRows(on_error), 0
        for block in read_blocks(path):
            rows = parse_block(block, labelled)
            for line, what in rows.problems:
                problems.add(f"line {lines + line + 1}: {what}")
            yield rows, rows.line + before
            lines += rows.num_lines
            before += rows.num_lines
        if not quiet:
            problems.report(path, lines)


def _numbered(files: list[Path], on_error: OnError, quiet: bool = False) -> Iterator[tuple[CriteoRows, np.ndarray]]:
    """Blocks of rows, and which split each row belongs to: 0, 1, 2."""
    for rows, line_n in _parsed(files, on_error, quiet=quiet):
        share_n = (_mixed(line_n.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53
        yield rows, np.searchsorted(_SHARES, share_n, side="right")


def _mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output for each 64-bit state (:func:`zoo.base.random.splitmix64` on numpy arrays)."""
    z = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))
