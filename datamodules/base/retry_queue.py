"""Samples that are put back into the order of the data, each exactly once.

A pass over the training data is a stream: place 0, 1, 2, ... of the epoch's order. A sample that is to be tried again takes a
later place of the stream for itself, and everything behind moves on by one. With sorted places ``q`` of the retries, place
``p`` of the stream holds

    the retry itself                                  if p is one of q,
    entry  p - #{q < p}  of (carried, epoch's order)  otherwise,

so that position, ranks and workers need no more than the places. An epoch keeps its length, because a training loop is told
it in advance: samples that retries push beyond the end open the next epoch (``carried``), and so do retries whose place is
there. Nothing is lost and nothing comes twice; only what is still carried when training ends is not seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch

__all__ = ["RetryQueue", "RetryState"]


class RetryState(TypedDict):
    """A :class:`RetryQueue` as plain data.

    Attributes:
        places: Places of the epoch's stream that retries take, ascending; those already given too.
        ids: The sample at each of them.
        carried: Samples of earlier epochs that open this one.
    """

    places: list[int]
    ids: list[int]
    carried: list[int]


class RetryQueue:
    """The retries of an epoch, and what they pushed out of the one before.

    Example:
        >>> queue = RetryQueue()
        >>> queue.insert([7], first=1, window=1, generator=torch.Generator())
        >>> [queue.at(place, [5, 7, 6]) for place in range(3)]
        [5, 7, 7]
        >>> queue.turn([5, 7, 6], given=3)
        >>> queue.at(0, [6, 5, 7])
        6
    """

    def __init__(self) -> None:
        self._places: list[int] = []
        self._ids: list[int] = []
        self._carried: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._places or self._carried)

    def at(self, place: int, order: np.ndarray | Sequence[int]) -> int:
        """The sample at a place of the stream.

        Args:
            place: Place in the stream of this epoch, from 0.
            order: The epoch's own order, integers.
        """
        earlier = bisect_left(self._places, place)
        if earlier < len(self._places) and self._places[earlier] == place:
            return self._ids[earlier]
        entry = place - earlier
        return int(self._carried[entry] if entry < len(self._carried) else order[entry - len(self._carried)])

    def is_retry(self, place: int) -> bool:
        """Whether a place of the stream holds a retry."""
        earlier = bisect_left(self._places, place)
        return earlier < len(self._places) and self._places[earlier] == place

    def insert(self, ids: Sequence[int], first: int, window: int, generator: torch.Generator) -> None:
        """Give each sample a place of its own, drawn from the next free ones.

        Args:
            ids: The samples; one that is listed twice comes twice.
            first: The first place that may be taken: everything before is given, or under way.
            window: Number of free places, from ``first`` on, to draw from; raised to the number of samples.
            generator: Draws the places.
        """
        window = max(window, len(ids))
        behind = first + window + len(self._places)
        free = np.setdiff1d(np.arange(first, behind), self._places)[:window]
        drawn = free[torch.randperm(window, generator=generator)[: len(ids)].numpy()].tolist()
        queue = sorted([*zip(self._places, self._ids, strict=True), *zip(drawn, map(int, ids), strict=True)])
        self._places, self._ids = [place for place, _ in queue], [sample for _, sample in queue]

    def turn(self, order: np.ndarray | Sequence[int], given: int) -> None:
        """Begin the next epoch.

        Args:
            order: The order of the epoch that ends.
            given: Number of samples of its stream that were given.
        """
        earlier = bisect_left(self._places, given)
        entry, carried = given - earlier, len(self._carried)
        pushed_out = [int(sample) for sample in order[max(0, entry - carried) : given]]
        self._carried = self._carried[entry:] + pushed_out
        self._places = [place - given for place in self._places[earlier:]]
        self._ids = self._ids[earlier:]

    def state_dict(self) -> RetryState:
        """The queue as plain data."""
        return {"places": list(self._places), "ids": list(self._ids), "carried": list(self._carried)}

    def load_state_dict(self, state: RetryState | None) -> None:
        """Take over what :meth:`state_dict` gave; ``None`` empties the queue."""
        state = state or {"places": [], "ids": [], "carried": []}
        self._places, self._ids, self._carried = list(state["places"]), list(state["ids"]), list(state["carried"])
