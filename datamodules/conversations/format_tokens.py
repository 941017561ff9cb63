"""Tokens of a text's format: those that overlap a match of a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

__all__ = ["FormatTokens"]


class FormatTokens:
    r"""Finds the tokens of a format, such as code fences, headings or tags.

    Args:
        patterns: Regular expressions of Python (:mod:`re`), searched for anywhere in a text; flags are written into them, as in
            ``(?m)^#+ ``. What any of them matches is format; a match of nothing, as of ``x*`` in ``y``, is none.

    Raises:
        ValueError: There is no pattern, or one is no regular expression.

    Example:
        >>> text, spans = "<b>hi</b>", np.array([[0, 1], [1, 4], [4, 5], [5, 9], [9, 9]])
        >>> FormatTokens(["</?b>"]).marks(text, spans).tolist()
        [True, True, False, True, False]
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        if isinstance(patterns, str) or not patterns:
            raise ValueError(f"format_patterns is {patterns!r}, and must be a list of at least one regular expression.")
        self.patterns: list[re.Pattern[str]] = []
        for pattern in patterns:
            try:
                self.patterns.append(re.compile(pattern))
            except (re.error, TypeError) as error:
                raise ValueError(f"format_patterns has {pattern!r}, which is no regular expression: {error}.") from error

    def marks(self, text: str, spans_N2: np.ndarray) -> np.ndarray:
        """Tokens with at least one character of a match.

        Args:
            text: A text.
            spans_N2: First character of each token and the one after its last, int64 (N, 2), each in ``[0, len(text)]``; tokens
                may share characters, and one without any, such as an eos, belongs to no format.

        Returns:
            bool (N,).
        """
        matched = np.zeros(len(text), dtype=bool)
        for pattern in self.patterns:
            for match in pattern.finditer(text):
                matched[match.start() : match.end()] = True
        before = np.concatenate([[0], np.cumsum(matched)])  # matched characters before each
        spans_N2 = np.asarray(spans_N2, dtype=np.int64).reshape(-1, 2)
        marks: np.ndarray = before[spans_N2[:, 1]] > before[spans_N2[:, 0]]
        return marks
