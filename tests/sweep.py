"""Parameters of which ``make test`` takes some, and ``make test-all`` all."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], quick: Iterable[int] = (0,)) -> list[Any]:
    """Mark all values as slow but those at the positions ``quick``."""
    params = [value if hasattr(value, "marks") else pytest.param(value) for value in values]
    kept = set(quick)
    return [
        param if i in kept else pytest.param(*param.values, marks=[*param.marks, pytest.mark.slow], id=param.id)
        for i, param in enumerate(params)
    ]


def sweep_tuples(values: Iterable[tuple[Any, ...]], quick: Iterable[int] = (0,)) -> list[Any]:
    """The same for several parameters at a time."""
    return sweep([value if hasattr(value, "marks") else pytest.param(*value) for value in values], quick)
