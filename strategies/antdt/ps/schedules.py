"""Schedules of learning rates that follow the servers' clock, which is the same for all workers, also for one that came late."""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Schedules"]


class Schedules:
    """Steps Lightning's schedules.

    Args:
        configs: of Lightning, each with ``scheduler``, ``interval``, ``frequency`` and ``reduce_on_plateau``.
        step: makes one step of a scheduler.
        now: steps that one process would have done by now.
    """

    def __init__(self, configs: Sequence[Any], step: Callable[[Any], None], now: Callable[[], int]) -> None:
        self._configs, self._step, self._now = configs, step, now
        self._done = 0

    def skip(self) -> None:
        """What is done by now, schedules by step know already."""
        self._done = self._now()

    def follow(self) -> None:
        """Let schedules by step make the steps that are due."""
        target = self._now()
        while self._done < target:
            self._done += 1
            self.step("step", self._done)

    def step(self, interval: str, number: int) -> None:
        """A step, or an epoch, is over; schedules that wait for a plateau are Lightning's.

        Args:
            interval: ``step`` or ``epoch``.
            number: how many there have been.
        """
        for config in self._configs:
            if config.interval == interval and not config.reduce_on_plateau and number % config.frequency == 0:
                self._step(config.scheduler)
