"""Steps of a rationale, and the step of each of its tokens.

Shape suffixes: N tokens.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

__all__ = ["StepSplitter"]

_RULES = {
    # An abbreviation is matched first, without the group that ends a step.
    "period": r"\b(?:Mr|Mrs|Ms|Dr|vs|[Ee]\.g|[Ii]\.e)\.|(?P<end>[.!?]+[\"')\]]*(?=\s|$)|\n)",
    "line": r"(?P<end>\n)",
}
_SPACE = re.compile(r"\s*")


class StepSplitter:
    r"""Divides rationales into steps.

    Args:
        rule: ``period``: a step ends with ``.``, ``!`` or ``?`` before white space, and with a line; never inside a number or
            behind Mr., Mrs., Ms., Dr., e.g., i.e. and vs.; ``line``: it ends with a line; any other text: a regular expression
            (:mod:`re`), with each match of which a step ends.

    Raises:
        ValueError: The rule is no regular expression.

    Example:
        >>> StepSplitter().split("It costs $1.50. He has 2.")
        ['It costs $1.50. ', 'He has 2.']
    """

    def __init__(self, rule: str = "period") -> None:
        try:
            self._pattern = re.compile(_RULES.get(rule, rule))
        except re.error as error:
            raise ValueError(f"step_split={rule!r} is neither period, nor line, nor a regular expression: {error}.") from error
        self._named = rule in _RULES

    def split(self, text: str) -> list[str]:
        """The steps of a text, white space behind each included; joined, they are the text. One of white space alone has none."""
        return [text[start:end] for start, end in pairwise([0, *self._ends(text)])]

    def step_ids(self, text: str, spans_N2: np.ndarray) -> np.ndarray:
        """The step of each token: that of its first character that is not white space.

        Args:
            text: A rationale.
            spans_N2: First character of each token and the one after its last, int64 (N, 2), in order.

        Returns:
            Numbers of the steps from 0, none left out, int64 (N,). Tokens of white space alone are of the step before, leading
            ones of the first.
        """
        visible = np.array([not character.isspace() for character in text], dtype=bool)
        places = np.append(np.flatnonzero(visible), len(text))
        spans_N2 = np.asarray(spans_N2, dtype=np.int64).reshape(-1, 2)
        first_N = places[np.searchsorted(places, np.minimum(spans_N2[:, 0], len(text)))]
        step_N = np.searchsorted(np.array(self._ends(text), dtype=np.int64), first_N, side="right")
        step_N = np.maximum.accumulate(np.where(first_N < spans_N2[:, 1], step_N, 0))
        return np.unique(step_N, return_inverse=True)[1].reshape(-1)

    def _ends(self, text: str) -> list[int]:
        """Ends of the steps, each of which has a character that is not white space."""
        ends: list[int] = []
        for match in self._pattern.finditer(text):
            if self._named and match["end"] is None:
                continue
            end = _SPACE.match(text, match.end()).end()  # type: ignore[union-attr]
            if text[ends[-1] if ends else 0 : end].strip():
                ends.append(end)
        if text.strip() and (not ends or ends[-1] < len(text)):
            ends.append(len(text))
        return ends
