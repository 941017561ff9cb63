"""Meta-IO: blocks of tasks beside readers of CSV, and beside gathering the same tasks from a table in the order of time.

``python -m benchmarks.meta_io`` writes 280 thousand rows of 24 ids and a label, of 4,000 tasks, as CSV, as a table in the order
of time, and as blocks. Each arm reads all rows into memory of its own in batches of 64 tasks, with one thread, one arm after
another in each repeat; CRCs are checked by the arm that says so, as in a first epoch. Gathering knows the rows of each task and
takes them from mapped columns, in the order of the batch or in that of the file; the one that is faster in the median counts. To
drop the page cache, files are closed (mapped pages stay) and `posix_fadvise` lets go of them, before each pass or each batch;
megabytes that came from the disk stand beside. pandas and Arrow are measured where they are installed (``pip install pandas
pyarrow``).

Claim: blocks are read faster than CSV is parsed, and faster than the rows of tasks are collected.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules.clicks.click_table import ClickColumns, ClickRows, TableWriter, open_table
from datamodules.tasks.task_sets import Share, TaskSet
from datamodules.tasks.task_table import RowSource, open_tasks, write_tasks

FIELDS, IDS, BATCH = 24, 1_000_000, 64
WARM, PASS, EACH = "warm", "dropped before a pass", "dropped before a batch"


def write(folder: Path, num_rows: int, num_tasks: int, seed: int) -> None:
    """Write the same rows as ``rows.csv``, as ``table`` in the order of time, and as ``blocks`` of tasks."""
    draw = np.random.default_rng(seed)
    task_N = np.append(np.arange(num_tasks), draw.integers(num_tasks, size=num_rows - num_tasks))
    sparse = draw.integers(IDS, size=(num_rows, FIELDS), dtype=np.int32)
    label = draw.integers(2, size=num_rows)
    columns = ClickColumns(tuple(f"field{number}" for number in range(FIELDS)), (IDS,) * FIELDS)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns.fields, "label"])
        writer.writerows(np.column_stack([sparse, label]).tolist())
    for name in ("table", "blocks"):
        (folder / name).mkdir()
    table = TableWriter(folder / "table", columns, {"train": num_rows, "val": 0, "test": 0})
    table.add("train", sparse, label)
    table.close()
    np.save(folder / "task.npy", task_N)
    rows = ClickRows(sparse, np.zeros((num_rows, 0), np.float32), label)
    write_tasks(folder / "blocks", RowSource(columns, [rows], task_N), 1, 0, 0, "task")


class Reader(Protocol):
    """Reads the rows of tasks."""

    def open(self, shuffled: bool) -> None:
        """Open the files, to read in shuffled runs or in the order on disk."""

    def close(self) -> None:
        """Close them."""

    def read(self, number_T: np.ndarray) -> np.ndarray:
        """Ids of the rows of some tasks, beside their labels."""


class Blocks:
    """Batches of tasks from blocks."""

    def __init__(self, folder: Path, seed: int, checked: bool) -> None:
        self.folder, self.seed, self.checked = folder, seed, checked

    def open(self, shuffled: bool) -> None:
        """Open the files, to read in shuffled runs or in the order on disk."""
        table = open_tasks(self.folder / "blocks")["train"]
        table.checked[:] = not self.checked
        assert table.files
        self.data = TaskSet([table], 1, 1, "random", self.seed, Share((1, 0, BATCH)), train=shuffled, run=BATCH)

    def close(self) -> None:
        """Close them."""
        del self.data

    def read(self, number_T: np.ndarray) -> np.ndarray:
        """Ids of the rows of some tasks, beside their labels."""
        return self.data.read(number_T)[0]["sparse"]


class Gathering:
    """Batches of tasks from the table in the order of time."""

    def __init__(self, folder: Path, task_T: np.ndarray, by_place: bool) -> None:
        self.folder, self.by_place = folder, by_place
        task_N = np.load(folder / "task.npy")
        place_N = np.argsort(task_N, kind="stable")
        begin, end = (np.searchsorted(task_N[place_N], task_T, side=side) for side in ("left", "right"))
        self.rows = [place_N[first:last] for first, last in zip(begin, end, strict=True)]

    def open(self, shuffled: bool) -> None:
        """Open the files, to read in shuffled runs or in the order on disk."""
        table = open_table(self.folder / "table")["train"]
        self.sparse, self.label = table.sparse, table.label

    def close(self) -> None:
        """Close them."""
        del self.sparse, self.label

    def read(self, number_T: np.ndarray) -> np.ndarray:
        """Ids of the rows of some tasks, beside their labels."""
        place_n = np.concatenate([self.rows[number] for number in number_T])
        if self.by_place:
            place_n = np.sort(place_n)
        rows, _ = self.sparse[place_n], self.label[place_n]
        return rows


def drop(folder: Path) -> None:
    """Let go of the files in the page cache."""
    for path in folder.rglob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def csv_readers(path: Path) -> dict[str, Callable[[], int]]:
    """Readers of CSV; each returns the number of rows."""

    def plain() -> int:
        with path.open(newline="") as file:
            reader = csv.reader(file)
            next(reader)
            return len(np.array([list(map(int, row)) for row in reader], dtype=np.int32))

    def pandas() -> int:
        from pandas import read_csv

        return len(read_csv(path, dtype=np.int32, engine="c").to_numpy())

    def arrow() -> int:
        from pyarrow.csv import ConvertOptions, ReadOptions, read_csv

        with path.open() as file:
            types = dict.fromkeys(file.readline().strip().split(","), "int32")
        table = read_csv(path, ReadOptions(use_threads=False), convert_options=ConvertOptions(column_types=types))
        return len(np.array([column.to_numpy() for column in table.columns]).T)

    readers: dict[str, Callable[[], int]] = {"Python csv": plain}
    readers |= {"pandas": pandas} if find_spec("pandas") else {}
    readers |= {"Arrow": arrow} if find_spec("pyarrow") else {}
    return readers


def disk() -> float:
    """Megabytes that this process has read from the disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512 / 1e6


def timed_pass(reader: Reader, folder: Path, order: np.ndarray, shuffled: bool, cache: str) -> tuple[float, float, int]:
    """Seconds of reading all batches of an order, megabytes from the disk, and the number of rows."""
    parts = np.split(order, range(BATCH, len(order), BATCH))
    seconds, before, rows = 0.0, disk(), 0
    for batches in [[part] for part in parts] if cache == EACH else [parts]:
        if cache != WARM:
            drop(folder)
        reader.open(shuffled)
        begin = time.perf_counter()
        rows += sum(len(reader.read(number_T)) for number_T in batches)
        seconds += time.perf_counter() - begin
        reader.close()
    return seconds, disk() - before, rows


def measure(record: Record, folder: Path, num_rows: int, num_tasks: int, seed: int, repeats: int) -> None:
    """All arms, and the bars."""
    blocks = Blocks(folder, seed, checked=False)
    blocks.open(shuffled=True)
    data = blocks.data
    readers: dict[str, Reader] = {
        "blocks": blocks,
        "blocks, CRCs checked": Blocks(folder, seed, checked=True),
        "gathering": Gathering(folder, data.tasks, by_place=False),
        "gathering by place": Gathering(folder, data.tasks, by_place=True),
    }
    some, expected = np.arange(BATCH), np.sort(blocks.read(np.arange(BATCH)), axis=0)
    for reader in readers.values():
        reader.open(shuffled=False)
        if not np.array_equal(np.sort(reader.read(some), axis=0), expected):
            raise SystemExit("The arms read other rows.")
        reader.close()
    found: dict[tuple[str, str, str], list[float]] = {}

    def note(reader: str, order: str, cache: str, measured: tuple[float, float, int]) -> None:
        seconds, megabytes, rows = measured
        if rows != num_rows:
            raise SystemExit(f"{reader} has read {rows} rows, not {num_rows}.")
        found.setdefault((reader, order, cache), []).append(seconds)
        series = f"{reader}, {order}" if order else f"{reader}, CSV"
        record.row(arm=f"{series}; {cache}", series=series, cache=cache, milliseconds=seconds * 1000,
                   million_rows_per_second=rows / seconds / 1e6, from_disk=megabytes)  # fmt: skip

    for repeat in range(repeats):
        for name, read in csv_readers(folder / "rows.csv").items():
            before, begin = disk(), time.perf_counter()
            rows = read()
            note(name, "", WARM, (time.perf_counter() - begin, disk() - before, rows))
        for order, numbers in {"slices": np.arange(num_tasks), "runs": data.epoch_order(repeat, seed)}.items():
            for cache in (WARM, PASS, EACH):
                for name, reader in readers.items():
                    for _ in range(2 if cache == WARM else 1):  # the first brings the files into memory
                        measured = timed_pass(reader, folder, numbers, order == "runs", cache)
                    note(name, order, cache, measured)

    def over(baselines: Sequence[str], order: str, cache: str, ours: str) -> float | None:
        times = [found[name, order, cache] for name in baselines if (name, order, cache) in found]
        own = found[ours, order or "slices", cache]
        if not times:
            return None
        fastest = min(times, key=statistics.median)
        return statistics.median(other / mine for other, mine in zip(fastest, own, strict=True))

    gathering = ["gathering", "gathering by place"]
    for bar, name in (("over_pandas", "pandas"), ("over_arrow", "Arrow"), ("over_csv", "Python csv")):
        record.measure(bar, over([name], "", WARM, "blocks, CRCs checked"))
    record.measure("runs_over_gathering_warm", over(gathering, "runs", WARM, "blocks"))
    record.measure("runs_over_gathering_dropped", over(gathering, "runs", PASS, "blocks"))
    record.measure("slices_over_gathering_dropped", over(gathering, "slices", PASS, "blocks"))
    for order in ("runs", "slices"):
        for cache in (WARM, PASS, EACH):
            ratios = {name: over(gathering, order, cache, name) for name in ("blocks", "blocks, CRCs checked")}
            record.row(speed=f"{order}; {cache}", plain=ratios["blocks"], checked=ratios["blocks, CRCs checked"])


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_io", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of the order")
    parser.add_argument("--smoke", action="store_true", help="few rows; the result is not kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_rows, num_tasks, repeats = (2_000, 100, 1) if options.smoke else (280_000, 4_000, 9)
    record = Record("meta_io", seeds=[options.seed], smoke=options.smoke, tables=[
        Table("All rows of 4,000 tasks: milliseconds, and megabytes from the disk", "arm",
              ["milliseconds", "million_rows_per_second", "from_disk"]),
        Table("Speed over the faster gathering, paired medians; with CRCs checked", "speed", ["plain", "checked"], digits=2),
        Table("Packages", "package", ["version"]),
    ], plots=[Plot("Reading 280 thousand rows of 4,000 tasks", "cache", "milliseconds", "series", log="y")])  # fmt: skip
    with tempfile.TemporaryDirectory(dir=".") as name:  # a disk; the usual folder may lie in memory
        folder = Path(name).absolute()
        write(folder, num_rows, num_tasks, options.seed)
        measure(record, folder, num_rows, num_tasks, options.seed, repeats)
    for package in ("pandas", "pyarrow"):
        if find_spec(package):
            record.row(package=package, version=metadata.version(package))
    return record.save()


if __name__ == "__main__":
    main()
