"""A weighted mixture of sources: the windows of an epoch, and their order.

An epoch has a fixed number of windows. Each source gives its share of them, exactly but for rounding, in every epoch. A source
is walked in a shuffled order of its own, across the epochs: no window of it comes again before all have had their turn; then the
order is drawn again. The windows of an epoch are shuffled together. All of it is a pure function of (seed, epoch), whatever the
batches: where these do not divide an epoch, the loader leaves out the last, incomplete one, and its windows have had their turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.base.loader import epoch_generator

__all__ = ["Mixture", "apportion"]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a number by weights: the rounded-down shares, and one more for the largest remainders.

    Args:
        total: Number to divide.
        weights: Positive numbers.

    Returns:
        Numbers that sum to ``total``, each less than 1 from its exact share.

    Example:
        >>> apportion(10, [1, 1, 1])
        [4, 3, 3]
    """
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


class Mixture:
    """The order of a mixture; windows are numbered through all sources.

    Args:
        names: Names of the sources; each names its own shuffling.
        sizes: Number of windows of each source.
        weights: Share of each source, positive; they need not sum to 1.
        epoch_length: Windows of an epoch; ``None``: as many as all sources have, so that an epoch of a single source is one
            pass over it.

    Raises:
        ValueError: A source has no window, or gets none in an epoch.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], epoch_length: int | None = None
    ) -> None:
        self.names = names
        self.sizes = sizes
        self.epoch_length = sum(sizes) if epoch_length is None else epoch_length
        self.shares = apportion(self.epoch_length, weights)
        for name, size, weight, share in zip(names, sizes, weights, self.shares, strict=True):
            if not size:
                raise ValueError(f"The source {name} has no text to train on.")
            if not share:
                raise ValueError(
                    f"With its weight of {weight}, the source {name} gets none of the {self.epoch_length} windows of an epoch: "
                    f"raise its weight or the length of an epoch."
                )

    def epoch_order(self, epoch: int, seed: int) -> Tensor:
        """The windows of an epoch in order: int64 (``epoch_length``,)."""
        first = 0
        windows = []
        for name, size, share in zip(self.names, self.sizes, self.shares, strict=True):
            windows += [first + part for part in self._walk(name, size, epoch * share, share, seed)]
            first += size
        mixed = torch.cat(windows)
        return mixed[torch.randperm(len(mixed), generator=epoch_generator(seed, epoch, "order"))]

    @staticmethod
    def _walk(name: str, size: int, start: int, count: int, seed: int) -> list[Tensor]:
        """The windows number ``start`` to ``start + count - 1`` of the endless walk over a source, in parts."""
        parts = []
        while count:
            number, place = divmod(start, size)
            order = torch.randperm(size, generator=epoch_generator(seed, number, f"pass over {name}"))
            parts.append(order[place : place + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return parts
