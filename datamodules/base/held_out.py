"""Samples held out for validation, the same whatever the order, the seed and the machine.

A sample is held out if a fixed hash of its key, a number in [0, 1), lies below the wanted share. So samples that are added later
do not move others from one side to the other, and equal keys are on the same side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

__all__ = ["divide", "held_out"]

T = TypeVar("T")


def held_out(keys: Sequence[str], share: float, exact: bool = False) -> np.ndarray:
    """Choose the samples that are held out.

    Args:
        keys: A key for each sample; paths may have bytes that are not UTF-8, as Python writes them (``surrogateescape``).
        share: Expected share, from 0 to less than 1. Unless it is 0, and if there are two keys at least, neither side stays
            empty: the least hash is held out, the greatest is not.
        exact: Whether to hold out the ``round(share * samples)`` least hashes instead of those below the share; samples that are
            added later may then move a few others.

    Returns:
        bool (samples,).
    """
    raw = (key.encode(errors="surrogateescape") for key in keys)
    hashes = np.array([int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little") for key in raw])
    if exact:
        chosen = np.zeros(len(hashes), dtype=bool)
        chosen[np.argsort(hashes, kind="stable")[: round(share * len(hashes))]] = True
        return chosen
    chosen = hashes < share * 2.0**48
    if share and len(keys):
        chosen |= hashes == hashes.min()
        chosen &= hashes != hashes.max()
    return chosen


def divide(samples: Sequence[T], share: float, key: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """Samples for training, and those held out for validation, each in their order.

    Args:
        samples: All samples.
        share: As of `held_out`.
        key: Gives a sample's key.
    """
    chosen = held_out([key(sample) for sample in samples], share)
    sides: tuple[list[T], list[T]] = ([], [])
    for sample, is_held_out in zip(samples, chosen, strict=True):
        sides[bool(is_held_out)].append(sample)
    return sides
