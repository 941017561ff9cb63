"""A character n-gram model: what counting alone reaches, as a baseline for models of text.

Interpolated Witten-Bell smoothing (Bell, Cleary, Witten, "Text Compression", 1990, method C): with N(h c) the count of the
context h followed by c, N(h) its sum over c, T(h) the number of different c that followed h, and h' the context without
its oldest character,

    p(c | h) = (N(h c) + T(h) p(c | h')) / (N(h) + T(h)),     p(c | h) = p(c | h') where h was never seen,

down to the uniform distribution below the empty context. At the beginning of a line the context is what there is.

Shape suffixes: K characters of the alphabet, S lines, L characters of a line.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CharacterNgram"]

_LARGEST_TABLE = 2**27


class CharacterNgram:
    """Counts of a text, as the probability of each character after every context.

    Args:
        text: The training text.
        alphabet: The characters; ASCII.
        order: Characters of an n-gram: the context is one less.

    Raises:
        ValueError: The order is less than 1 or its table would be too large, or the text is empty or holds a character
            outside of the alphabet.
    """

    def __init__(self, text: str, alphabet: str = " abcdefghijklmnopqrstuvwxyz", order: int = 5) -> None:
        size = len(alphabet)
        if order < 1 or size**order > _LARGEST_TABLE:
            raise ValueError(
                f"order is {order}, and must be at least 1 and small enough for a table of {size}^order numbers below 2^27."
            )
        if not text:
            raise ValueError("The training text of the n-gram model is empty.")
        self.alphabet = alphabet
        self.order = order
        ids = self._encode(text)
        self.tables: list[NDArray[np.float64]] = []
        """After a context of m characters, ``tables[m]`` (K^m, K); a context is a number whose last digit is its newest."""
        shorter = np.full((1, size), 1 / size)
        for length in range(order):
            count = np.bincount(self._contexts(ids, length + 1), minlength=size ** (length + 1)).reshape(-1, len(shorter), size)
            total = count.sum(axis=-1, keepdims=True)
            different = np.count_nonzero(count, axis=-1, keepdims=True)
            smoothed = (count + different * shorter) / np.maximum(total + different, 1)
            shorter = np.where(total > 0, smoothed, shorter).reshape(-1, size)
            self.tables.append(shorter)

    def probabilities(self, context: str) -> NDArray[np.float64]:
        """Probability (K,) of each character of the alphabet after a context, of which the last n - 1 characters count."""
        ids = self._encode(context)[max(0, len(context) - self.order + 1) :]
        return self.tables[len(ids)][self._contexts(ids, len(ids))[-1] if len(ids) else 0]

    def bits_per_character(self, lines: Sequence[str]) -> float:
        """Mean of -log2 p over all characters of all lines; each line begins without a context.

        Raises:
            ValueError: There is no character, or one outside of the alphabet.
        """
        bits, count = 0.0, 0
        for line in lines:
            ids = self._encode(line)
            for length, table in enumerate(self.tables):
                # The context grows until it is whole; then the last table takes the rest of the line.
                end = len(ids) if length == self.order - 1 else length + 1
                gram = self._contexts(ids[:end], length + 1)
                bits -= float(np.log2(table.reshape(-1)[gram]).sum())
            count += len(ids)
        if not count:
            raise ValueError("The n-gram model was given no character to predict.")
        return bits / count

    def sample(self, num_lines: int, length: int, seed: int = 0) -> list[str]:
        """Draw S lines of L characters, each from an empty context.

        Args:
            num_lines: Number of lines S.
            length: Characters L of a line.
            seed: Seed; equal seeds give equal lines.
        """
        generator = np.random.default_rng(seed)
        size = len(self.alphabet)
        ids_SL = np.empty((num_lines, length), dtype=np.int64)
        context_S = np.zeros(num_lines, dtype=np.int64)
        for place in range(length):
            table = self.tables[min(place, self.order - 1)]
            below_SK = table[context_S].cumsum(axis=1)
            below_SK[:, -1] = 1  # so that rounding leaves no draw above
            ids_SL[:, place] = (generator.random((num_lines, 1)) >= below_SK).sum(axis=1)
            context_S = (context_S * size + ids_SL[:, place]) % size ** min(place + 1, self.order - 1)
        characters = np.frombuffer(self.alphabet.encode("ascii"), dtype=np.uint8)
        return [row.tobytes().decode("ascii") for row in characters[ids_SL]]

    def _encode(self, text: str) -> NDArray[np.int64]:
        id_of_byte = np.full(256, -1)
        id_of_byte[list(self.alphabet.encode("ascii"))] = np.arange(len(self.alphabet))
        ids = id_of_byte[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)]
        if (ids < 0).any():
            foreign = next(character for character in text if character not in self.alphabet)
            raise ValueError(f"The text holds the character {foreign!r}, which is not in the alphabet {self.alphabet!r}.")
        return ids

    def _contexts(self, ids: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """All runs of ``length`` characters as numbers in base K, in the order of their place."""
        runs = np.zeros(max(0, len(ids) - length + 1), dtype=np.int64)
        for place in range(length):
            runs = runs * len(self.alphabet) + ids[place : place + len(runs)]
        return runs
