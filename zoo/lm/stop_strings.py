"""Texts that end a generated sequence.

Shape suffixes: B sequences.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["StopStrings", "text_before"]


def text_before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop texts, which is left out.

    Example:
        >>> text_before("one. two", [". ", "t"])
        'one'
    """
    return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]


class StopStrings:
    """Find stop texts in sequences as they grow.

    Args:
        stops: Texts, none empty.
        decode: From ids to text.
        batch_size: Sequences B.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[list[int]], str], batch_size: int) -> None:
        self.stops, self.decode = list(stops), decode
        # A token of text has at least one byte. Some decoders drop a space in front of the first token.
        self._tail = max(len(stop.encode()) for stop in stops) + 1
        self._rows: list[list[int]] = [[] for _ in range(batch_size)]

    def ended(self, token_B: Tensor) -> Tensor:
        """Whether the newest tokens complete a stop text, bool (B,)."""
        found = []
        for row, token in zip(self._rows, token_B.tolist(), strict=True):
            row.append(token)
            del row[: -self._tail]
            text = self.decode(row)
            found.append(any(stop in text for stop in self.stops))
        return torch.tensor(found, device=token_B.device)
