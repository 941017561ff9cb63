"""Files with one JSON object a line, and what is done about malformed rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["MalformedRow", "MalformedRows", "OnError", "encodable", "is_finite", "read_json_lines"]

T = TypeVar("T")

OnError = Literal["raise", "skip"]
_SHOWN = 3


class MalformedRow(ValueError):
    """A row that cannot be used; the message says why, and fits after "line 3: "."""


class MalformedRows:
    """Collects what is wrong, so that one error can tell how much of it there is.

    Args:
        on_error: ``raise`` makes :meth:`report` an error, ``skip`` a warning.
    """

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self.count = 0
        self._first: list[str] = []

    def add(self, case: str) -> None:
        """Remember a case, such as ``"line 3: it has no text"``."""
        self.count += 1
        if len(self._first) < _SHOWN:
            self._first.append(case)

    def report(self, source: object, total: int, unit: str = "rows") -> None:
        """Report malformed rows, if there are any.

        Args:
            source: Origin of the rows.
            total: Number of rows, good and bad.
            unit: Name of the rows.

        Raises:
            ValueError: There were malformed rows, and ``on_error`` is ``raise``.
        """
        if not self.count:
            return
        more = ", ..." if self.count > len(self._first) else ""
        found = f"{self.count} of {total} {unit} of {source} are malformed ({'; '.join(self._first)}{more})"
        if self.on_error == "raise":
            raise ValueError(f"{found}: correct them, or leave them out with on_error: skip.")
        rank_zero_warn(f"{found}, and are left out.")


def read_json_lines(path: Path, parse: Callable[[dict[str, Any]], T], problems: MalformedRows) -> Iterator[T]:
    """Read the rows of a file, one after another; empty lines are none.

    Args:
        path: UTF-8 file with one JSON object a line.
        parse: Makes of a row what is wanted, or raises :class:`MalformedRow`.
        problems: Counts malformed rows; when all are read, it raises an error or warns, with their number and the first of
            them.

    Yields:
        What ``parse`` returned.

    Raises:
        FileNotFoundError: No such file.
        ValueError: There are malformed rows, and ``problems`` does not skip them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file with one JSON object a line.")
    total = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            total += 1
            try:
                parsed = parse(_json_object(line))
            except MalformedRow as error:
                problems.add(f"line {number}: {error}")
            except RecursionError as error:
                problems.add(f"line {number}: it is nested too deeply ({error})")
            else:
                yield parsed
    problems.report(path, total)


def _json_object(line: bytes) -> dict[str, Any]:
    """The object that a line holds.

    Raises:
        MalformedRow: It holds none; also where a number has more digits than Python reads.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise MalformedRow(f"it is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise MalformedRow("it is no JSON object")
    return row


def is_finite(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def encodable(text: str) -> str:
    """The text, if it is Unicode; JSON's escapes can write halves of characters, which no tokenizer takes.

    Raises:
        MalformedRow: It holds half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedRow(f"its character {error.start} is half of a surrogate pair") from None
    return text
