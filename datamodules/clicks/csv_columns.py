"""Columns of a CSV file as numpy arrays; rows that cannot be used are counted, with the first of them in the message.

Shape suffixes: N rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import numpy as np

from datamodules.base.json_lines import MalformedRows, OnError

__all__ = ["Columns", "open_columns", "read_columns"]

Columns = dict[str, np.ndarray]
"""Columns by name: str or float64 (N,); ``index`` is int64 (N,), the number of each row in the file, from 0."""


def open_columns(path: Path) -> TextIO:
    """Open a CSV file, or a parquet file (by its name) as one.

    Raises:
        FileNotFoundError: No such file.
        ModuleNotFoundError: Parquet without the extra ``recsys``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file with a line of names and rows, CSV or parquet.")
    if path.suffix != ".parquet":
        return path.open(encoding="utf-8-sig", newline="")
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError(f"{path} is parquet, which needs pyarrow: pip install 'lightning-zoo[recsys]'.")
    from pyarrow.csv import write_csv
    from pyarrow.parquet import read_table

    written = io.BytesIO()
    write_csv(read_table(path), written)
    written.seek(0)
    return io.TextIOWrapper(written, encoding="utf-8", newline="")


def read_columns(
    file: Iterable[str],
    source: str,
    texts: Sequence[str],
    numbers: Sequence[str],
    *,
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    check: Callable[[Columns], Mapping[int, str]] | None = None,
    on_error: OnError = "raise",
    delimiter: str = ",",
) -> Columns:
    """Read some columns; ``NA`` and nothing are missing values, read as the empty text or NaN.

    Args:
        file: An open text file, or lines of text; the first names the columns.
        source: Its name in messages.
        texts: Columns of texts.
        numbers: Columns of numbers.
        required: Those of the numbers that every row must have.
        optional: Further columns of numbers that the file may lack.
        check: Looks at the columns and says what is wrong with which row, by its place.
        on_error: Treatment of malformed rows.
        delimiter: Separates columns; where it is a tab, quotation marks are characters like others.

    Raises:
        ValueError: A column is missing, or rows are malformed and not skipped.

    Example:
        >>> from io import StringIO
        >>> columns = read_columns(StringIO("city,height\\nUlm,478\\nAA,NA\\n"), "cities.csv", ["city"], ["height"])
        >>> columns["city"].tolist(), columns["height"].tolist()
        (['Ulm', 'AA'], [478.0, nan])
    """
    reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)
    head = next(reader, [])
    if missing := [name for name in (*texts, *numbers) if name not in head]:
        raise ValueError(f"{source} lacks the column(s) {', '.join(missing)}; it has {', '.join(head) or 'none'}.")
    names = [*texts, *numbers, *(name for name in optional if name in head)]
    places = [head.index(name) for name in names]
    problems: dict[int, str] = {}
    # One flat list: hundreds of thousands of small lists would keep the garbage collector busy for most of the time.
    cells: list[str] = []
    lines: list[int] = []
    for row in reader:
        if len(row) != len(head):
            problems[len(lines)] = f"it has {len(row)} columns, not {len(head)}"
            row = [""] * len(head)
        cells += [row[place] for place in places]
        lines.append(reader.line_num)
    columns: Columns = {"index": np.arange(len(lines))}
    for place, name in enumerate(names):
        column = cells[place :: len(names)]
        if name in texts:
            text_N = np.array(column, dtype=str)
            columns[name] = np.where(text_N == "NA", "", text_N)
            continue
        columns[name], wrong = _numbers(column)
        found = {row: f"{name} is {column[row]!r}, and no number" for row in wrong}
        if name in required:
            missing_n = np.flatnonzero(~np.isfinite(columns[name])).tolist()
            found |= {row: f"{name} is missing" for row in missing_n if row not in found}
        problems |= {row: what for row, what in found.items() if row not in problems}
    if problems:
        columns = _without(columns, problems)
    if check is not None and (unsound := check(columns)):
        problems |= {int(columns["index"][row]): what for row, what in unsound.items()}
        columns = _without(columns, unsound)
    malformed = MalformedRows(on_error)
    for place, what in sorted(problems.items()):
        malformed.add(f"line {lines[place]}: {what}")
    malformed.report(source, len(lines))
    return columns


def _numbers(texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Numbers, NaN where missing, and the places of other texts."""
    text_N = np.array(texts, dtype=str)
    text_N = np.where((text_N == "NA") | (text_N == ""), "nan", text_N)
    try:
        return text_N.astype(float), []
    except ValueError:
        wrong = [row for row, text in enumerate(text_N.tolist()) if not _is_number(text)]
        text_N[wrong] = "nan"
        return text_N.astype(float), wrong


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _without(columns: Columns, rows: Mapping[int, str]) -> Columns:
    kept = np.ones(len(columns["index"]), dtype=bool)
    kept[list(rows)] = False
    return {name: column[kept] for name, column in columns.items()}
