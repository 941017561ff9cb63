"""Tables of medians and spread over the rows of a result, for the terminal and for Markdown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table as RichTable

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """How rows become a table: one line per value of ``index``, medians over what is left (the seeds).

    Attributes:
        title: Heading.
        index: Column of the rows that names the lines.
        values: Columns of the rows that are shown; exactly one if ``columns`` is given.
        columns: Column of the rows whose values become the table's columns; ``None``: one column per value.
        digits: Digits after the point.
    """

    title: str
    index: str
    values: list[str] = field(default_factory=list)
    columns: str | None = None
    digits: int = 2

    def __post_init__(self) -> None:
        """Check that the values fit the columns."""
        if not self.values or (self.columns is not None and len(self.values) != 1):
            raise ValueError(f"Table {self.title!r}: give values, and exactly one if columns is given.")

    def cells(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        """Heading and lines as text; a cell is ``median (least to most)``, or a dash where there is no row."""
        shown = [row for row in rows if self.index in row and any(value in row for value in self.values)]
        lines = list(dict.fromkeys(row[self.index] for row in shown))
        if self.columns is None:
            heads = [self.index, *self.values]
            body = [[[row[value] for row in shown if row[self.index] == line and value in row] for value in self.values]
                    for line in lines]  # fmt: skip
        else:
            columns = list(dict.fromkeys(row[self.columns] for row in shown))
            heads = [f"{self.index} \\ {self.columns}", *map(str, columns)]
            body = [[[row[self.values[0]] for row in shown if (row[self.index], row[self.columns]) == (line, column)]
                     for column in columns] for line in lines]  # fmt: skip
        return heads, [
            [str(line), *(median_and_spread(cell, self.digits) for cell in cells)]
            for line, cells in zip(lines, body, strict=True)
        ]

    def rich(self, rows: Sequence[Row]) -> RichTable:
        """The table for the terminal."""
        heads, lines = self.cells(rows)
        return rich_table(self.title, heads, lines)

    def markdown(self, rows: Sequence[Row]) -> str:
        """The table for a README, with its title above."""
        return f"**{self.title}**\n\n{markdown_table(*self.cells(rows))}"


def median_and_spread(cells: Sequence[Cell], digits: int = 2) -> str:
    """The median and, if they differ, the least and the most of some numbers; text stands as it is.

    >>> median_and_spread([3.0, 1.0, 2.0], digits=1), median_and_spread([2.0]), median_and_spread([])
    ('2.0 (1.0 to 3.0)', '2.00', '-')
    """
    numbers = [cell for cell in cells if isinstance(cell, int | float) and not isinstance(cell, bool)]
    if not numbers:
        return ", ".join(dict.fromkeys(str(cell) for cell in cells if cell is not None)) or "-"
    if all(isinstance(number, int) for number in numbers) and len(set(numbers)) == 1:
        return str(numbers[0])
    median = f"{statistics.median(numbers):.{digits}f}"
    if len(set(numbers)) == 1:
        return median
    return f"{median} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def terminal() -> Console:
    """Where tables are printed: as wide as the terminal, 140 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 140)


def rich_table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> RichTable:
    """A table for the terminal: first column left, the others right."""
    table = RichTable(title=title, title_justify="left")
    for number, head in enumerate(heads):
        numeric = any(line[number][:1].isdigit() for line in lines)
        table.add_column(head, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column left, the others right."""
    rule = [":--", *["--:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [heads, rule, *lines])
