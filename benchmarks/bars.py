"""The bars of all issues: what a benchmark has to reach, read from ``bars.yaml``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

BARS = Path(__file__).parent / "bars.yaml"


class BarError(ValueError):
    """``bars.yaml`` or a result contradicts the bars; the message names the place."""


@dataclass(frozen=True)
class Bar:
    """One number that a benchmark has to reach.

    Attributes:
        name: Its name, unique within a result.
        issues: The issues that ask for it.
        target: The number; reaching it exactly holds.
        better: Whether ``"higher"`` or ``"lower"`` values are better.
        statement: What is measured, in words.
    """

    name: str
    issues: tuple[int, ...]
    target: float
    better: Literal["higher", "lower"]
    statement: str

    def holds(self, value: float | None) -> bool:
        """Whether a measured value reaches the target; what was not measured (``None``, NaN) never does.

        >>> Bar("speed", (1,), 2.0, "higher", "").holds(2.5), Bar("speed", (1,), 2.0, "higher", "").holds(None)
        (True, False)
        """
        if value is None or math.isnan(value):
            return False
        return value >= self.target if self.better == "higher" else value <= self.target


def read_bars(path: Path = BARS) -> dict[str, dict[str, Bar]]:
    """All bars as ``{result: {name: bar}}``, in the order of the file.

    Raises:
        BarError: An entry misses a field, has an unknown one, or a value of the wrong kind; or a name is there twice.
    """
    bars: dict[str, dict[str, Bar]] = {}
    for result, group in yaml.safe_load(path.read_text()).items():
        bars[result] = {}
        for entry in group["bars"]:
            where = f"{path.name}, {result}, {entry.get('name')}"
            if set(entry) != set(Bar.__dataclass_fields__):
                raise BarError(f"{where}: needs exactly the fields {', '.join(Bar.__dataclass_fields__)}.")
            if entry["better"] not in ("higher", "lower"):
                raise BarError(f"{where}: better is 'higher' or 'lower', not {entry['better']!r}.")
            if not isinstance(entry["target"], int | float) or not entry["issues"]:
                raise BarError(f"{where}: target is a number (write 1.0e-4, not 1e-4) and issues a list of numbers.")
            if entry["name"] in bars[result]:
                raise BarError(f"{where}: the name is there twice.")
            bars[result][entry["name"]] = Bar(
                entry["name"], tuple(entry["issues"]), float(entry["target"]), entry["better"], entry["statement"]
            )
    return bars


def read_commands(path: Path = BARS) -> dict[str, str]:
    """The command that measures each result."""
    return {result: group["command"] for result, group in yaml.safe_load(path.read_text()).items()}
