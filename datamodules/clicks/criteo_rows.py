"""Rows of the official Criteo files, parsed a block of bytes at a time.

A line is ``label TAB 13 integers TAB 26 categories``, each of the latter 32 bits in hexadecimal; any but the label may be
empty, and test files have no label. numpy looks at all lines of a block together, one character place after the other, which
takes half the time of a loop over lines, checks included; blocks are as small as a processor's cache.

Shape suffixes: n rows, I 13 integers, C 26 categories, K columns of a line.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["MISSING", "NUM_CATEGORIES", "NUM_INTEGERS", "CriteoRows", "first_line_has_label", "parse_block", "read_blocks"]

NUM_INTEGERS = 13
NUM_CATEGORIES = 26
MISSING = np.iinfo(np.int64).min
"""Stands for an empty integer; an empty category is -1."""
_BLOCK = 1 << 21
_TAB, _NEWLINE, _MINUS = b"\t\n-"

_DIGITS = np.full(256, -1, np.int64)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_DIGITS[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


class CriteoRows(NamedTuple):
    """Rows of a block.

    Attributes:
        label: uint8 (n,); zeros where the file has none.
        integers: int64 (n, I), ``MISSING`` where empty.
        categories: int64 (n, C), -1 where empty.
        line: int64 (n,), which line of the block each row is, from 0.
        problems: Of each malformed line, its number in the block and what is wrong.
        num_lines: Lines of the block, empty ones too.
    """

    label: np.ndarray
    integers: np.ndarray
    categories: np.ndarray
    line: np.ndarray
    problems: list[tuple[int, str]]
    num_lines: int


def read_blocks(path: Path, size: int = _BLOCK) -> Iterator[bytes]:
    """Whole lines of a file, about ``size`` bytes at a time; ``.gz`` is unpacked.

    Raises:
        OSError: The file cannot be read, or is a damaged archive.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        rest = b""
        while read := file.read(size):
            lines, newline, rest_of_read = read.rpartition(b"\n")
            if newline:
                yield (rest + lines + newline).replace(b"\r\n", b"\n")
                rest = rest_of_read
            else:
                rest += read
        if rest:
            yield rest.removesuffix(b"\r") + b"\n"


def first_line_has_label(path: Path) -> bool:
    """Whether the first line has 40 columns, as training files have, and not 39."""
    return next(read_blocks(path, 1 << 16), b"").partition(b"\n")[0].count(b"\t") == NUM_INTEGERS + NUM_CATEGORIES


def parse_block(block: bytes, labelled: bool = True) -> CriteoRows:
    """Parse whole lines.

    Args:
        block: Lines, each ending with a newline.
        labelled: Whether a label comes first.

    Example:
        >>> rows = parse_block(b"1" + b"\\t-2" + 12 * b"\\t" + b"\\t68fd1e64" + 25 * b"\\t" + b"\\nnonsense\\n")
        >>> rows.label.tolist(), rows.integers[0, 0].item(), hex(rows.categories[0, 0]), rows.problems
        ([1], -2, '0x68fd1e64', [(1, '1 column(s), not 40')])
    """
    text = np.frombuffer(block, np.uint8)
    num_columns = labelled + NUM_INTEGERS + NUM_CATEGORIES
    end_of_line = np.flatnonzero(text == _NEWLINE)
    start_of_line = np.concatenate([[0], end_of_line[:-1] + 1]) if len(end_of_line) else end_of_line
    tab = np.flatnonzero(text == _TAB)
    tabs = np.diff(np.searchsorted(tab, end_of_line), prepend=0)
    whole = tabs == num_columns - 1
    problems = {
        int(line): f"{tabs[line] + 1} column(s), not {num_columns}"
        for line in np.flatnonzero(~whole & (end_of_line > start_of_line))
    }
    line_n = np.flatnonzero(whole)
    between_nK = tab[whole[np.searchsorted(end_of_line, tab)]].reshape(len(line_n), num_columns - 1)
    starts_nK = np.concatenate([start_of_line[line_n, None], between_nK + 1], axis=1)
    ends_nK = np.concatenate([between_nK, end_of_line[line_n, None]], axis=1)
    integers = slice(int(labelled), labelled + NUM_INTEGERS)
    categories = slice(labelled + NUM_INTEGERS, num_columns)
    integer_nI, good_nI = _parse_numbers(text, starts_nK[:, integers], ends_nK[:, integers], base=10, longest=11)
    category_nC, good_nC = _parse_numbers(text, starts_nK[:, categories], ends_nK[:, categories], base=16, longest=8)
    good_nK = np.concatenate([good_nI, good_nC], axis=1)
    label_n = np.zeros(len(line_n), np.uint8)
    if labelled:
        mark_n = text[starts_nK[:, 0]]
        good_label_n = (ends_nK[:, 0] - starts_nK[:, 0] == 1) & ((mark_n == ord("0")) | (mark_n == ord("1")))
        good_nK = np.concatenate([good_label_n[:, None], good_nK], axis=1)
        label_n = np.where(good_label_n, mark_n - ord("0"), 0).astype(np.uint8)
    good_n = good_nK.all(axis=1)
    for row in np.flatnonzero(~good_n):
        column = int(np.flatnonzero(~good_nK[row])[0])
        found = block[starts_nK[row, column] : ends_nK[row, column]].decode(errors="replace")
        problems[int(line_n[row])] = f"column {column + 1} holds {found!r}, which is no {_kind(column - labelled)}"
    category_nC[starts_nK[:, categories] == ends_nK[:, categories]] = -1
    return CriteoRows(
        label_n[good_n], integer_nI[good_n], category_nC[good_n], line_n[good_n], sorted(problems.items()), len(end_of_line)
    )


def _kind(column: int) -> str:
    return "label (0 or 1)" if column < 0 else "integer" if column < NUM_INTEGERS else "hexadecimal number of 8 digits at most"


def _parse_numbers(
    text: np.ndarray, starts: np.ndarray, ends: np.ndarray, base: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (``MISSING`` where empty), and which of them are well-formed."""
    length = ends - starts
    negative = (text[starts] == _MINUS) & (base == 10)
    good = (length <= longest) & ~(negative & (length == 1))
    number = np.zeros(starts.shape, np.int64)
    for place in range(min(longest, int(length.max(initial=0)))):
        here = (place < length) & ~(negative & (place == 0))
        digit = _DIGITS[text[np.minimum(starts + place, len(text) - 1)]]
        good &= ~here | ((digit >= 0) & (digit < base))
        number = np.where(here, number * base + digit, number)
    return np.where(length == 0, MISSING, np.where(negative, -number, number)), good
