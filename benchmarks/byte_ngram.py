"""Byte n-gram models of text: what counting alone reaches, in bits per byte.

Interpolated Kneser-Ney smoothing (Kneser and Ney 1995; Chen and Goodman, "An Empirical Study of Smoothing Techniques for
Language Modeling", 1998): with the context h, h' the context without its oldest byte, N(h c) the count of h followed by c, N(h)
its sum over c and T(h) the number of different c that followed h,

    p_n(c | h) = (max(N(h c) - D_n, 0) + D_n T(h) p_{n-1}(c | h')) / N(h),     p_n(c | h) = p_{n-1}(c | h') for unseen h,

down to the uniform distribution over 256 bytes. Only the highest order has the counts of the text; below it N(h c) is the number
of different bytes that stood before h c. The discount of an order is n_1 / (n_1 + 2 n_2), of the numbers of n-grams that were
counted once and twice. At the beginning of a text, where the context is shorter, the model of that order speaks.

An n-gram is a number of n base-256 digits, the newest byte last; counts come from sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ByteNgram", "bits_per_byte"]

Bytes = NDArray[np.uint8]
Codes = NDArray[np.uint64]
Numbers = NDArray[np.int64]
_MOST_BYTES = 8
_BYTE = np.uint64(8)


@dataclass(frozen=True)
class _Level:
    """Counts of the n-grams of one length, and of their contexts, sorted by code.

    Attributes:
        gram: codes of the n-grams.
        count: how often each was counted, at least 1.
        context: codes of their first n - 1 bytes.
        total: counts of each context's n-grams together.
        different: how many n-grams each context has.
        discount: D, between 0 and 1.
    """

    gram: Codes
    count: Numbers
    context: Codes
    total: Numbers
    different: Numbers
    discount: float

    @staticmethod
    def of(gram: Codes, count: Numbers) -> _Level:
        """The level of sorted n-grams and their counts."""
        context, start = np.unique(gram >> _BYTE, return_index=True)
        once, twice = np.count_nonzero(count == 1), np.count_nonzero(count == 2)
        discount = once / (once + 2 * twice) if once else 0.5  # 0 would leave nothing for what was never seen
        return _Level(gram, count, context, np.add.reduceat(count, start), np.diff(start, append=len(gram)), discount)

    def mix(self, code: Codes, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of the last byte of each n-gram after its first ones, given that after a shorter context."""
        distinct, place = np.unique(code, return_inverse=True)  # sorted queries are looked up in order, and each once
        count = _lookup(self.gram, self.count, distinct)[place]
        total = _lookup(self.context, self.total, distinct >> _BYTE)[place]
        different = _lookup(self.context, self.different, distinct >> _BYTE)[place]
        smoothed = np.maximum(count - self.discount, 0) + self.discount * different * shorter
        return np.where(total > 0, smoothed / np.maximum(total, 1), shorter)


class ByteNgram:
    """Counts of a text, as the probability of each byte after every context.

    Args:
        text: The training text, uint8.
        order: Bytes of the longest n-gram, 1 to 8; its context is one less.

    Raises:
        ValueError: The order is out of range, or the text is shorter than it or not of bytes.
    """

    def __init__(self, text: Bytes, order: int = 6) -> None:
        if not 1 <= order <= _MOST_BYTES:
            raise ValueError(f"order is {order}, and must lie between 1 and {_MOST_BYTES}.")
        if text.dtype != np.uint8 or text.ndim != 1 or len(text) < order:
            raise ValueError(
                f"The training text must be a vector of at least order={order} bytes (uint8), not {text.dtype} of shape"
                f" {text.shape}."
            )
        self.order = order
        gram, count = np.unique(_codes(text, order), return_counts=True)
        self._counted: list[_Level] = [_Level.of(gram, count)]
        self._continued: list[_Level] = []
        for length in range(order - 1, 0, -1):
            longer = self._counted[0]
            ending, varieties = np.unique(longer.gram & _mask(length), return_counts=True)
            self._continued.insert(0, _Level.of(ending, varieties))
            # Each n-gram but the last of the text begins a longer one.
            last = _codes(text[-length:], length)
            place = int(np.searchsorted(longer.context, last[0]))
            if place < len(longer.context) and longer.context[place] == last[0]:
                gram, count = longer.context, longer.total.copy()
                count[place] += 1
            else:
                gram, count = np.insert(longer.context, place, last), np.insert(longer.total, place, 1)
            self._counted.insert(0, _Level.of(gram, count))

    def probabilities(self, context: bytes) -> NDArray[np.float64]:
        """Probability (256,) of each byte after a context, of which the last n - 1 bytes count."""
        context = context[max(0, len(context) - self.order + 1) :]
        every = np.arange(256, dtype=np.uint64)
        p = np.full(256, 1 / 256)
        for length in range(len(context) + 1):
            before = int.from_bytes(context[len(context) - length :], "big") if length else 0
            levels = self._counted if length == len(context) else self._continued
            p = levels[length].mix(np.uint64(before << 8) + every, p)
        return p

    def bits_per_byte(self, text: Bytes) -> list[float]:
        """Mean of -log2 p over all bytes of a text, of the models of order 1 to n.

        Args:
            text: The text to predict, uint8.

        Raises:
            ValueError: The text is empty or not of bytes.
        """
        if text.dtype != np.uint8 or text.ndim != 1 or not len(text):
            raise ValueError(f"The text to predict must be a vector of bytes (uint8), not {text.dtype} of shape {text.shape}.")
        result, beginning = [], 0.0
        shorter = np.full(len(text), 1 / 256)
        for length in range(1, min(self.order, len(text)) + 1):
            code, shorter = _codes(text, length), shorter[-(len(text) - length + 1) :]
            bits = -np.log2(self._counted[length - 1].mix(code, shorter))
            result.append((beginning + float(bits.sum())) / len(text))
            beginning += float(bits[0])
            if length < self.order:
                shorter = self._continued[length - 1].mix(code, shorter)
        return result + result[-1:] * (self.order - len(result))


def bits_per_byte(train: Bytes, validation: Bytes, orders: Sequence[int] = (3, 4, 5, 6)) -> dict[int, float]:
    """Bits per byte of a validation text under n-gram models of a training text.

    Args:
        train: What is counted, uint8.
        validation: What is predicted, uint8.
        orders: Orders n of the models.
    """
    bits = ByteNgram(train, max(orders)).bits_per_byte(validation)
    return {order: bits[order - 1] for order in orders}


def _mask(length: int) -> np.uint64:
    return np.uint64(256**length - 1)


def _codes(text: Bytes, length: int) -> Codes:
    """All runs of ``length`` bytes as numbers, in the order of their place."""
    code = np.zeros(len(text) - length + 1, dtype=np.uint64)
    for place in range(length):
        code <<= _BYTE
        code |= text[place : place + len(code)]
    return code


def _lookup(keys: Codes, values: Numbers, wanted: Codes) -> Numbers:
    """The value of each wanted key, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
