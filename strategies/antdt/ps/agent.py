"""A worker's agent: what it measures, what it tells the controller, and how it does what was decided."""

import time
from collections.abc import Sequence
from typing import Any

from strategies.antdt.ps.loader import ShardBatch, ShardLoader
from strategies.antdt.service.client import Client

__all__ = ["Agent"]


class Agent:
    """Reports every few batches; decisions about batches and learning rates take effect when the clock says so.

    Args:
        data: calls to the data-sharding server, where the controller is.
        rank: of this worker.
        report_every: batches between two reports.

    Attributes:
        steps: gradients that this worker has sent.
        dropped: those that did not count.
        version: newest decision of the controller that is in effect.
        lr_factor: by which learning rates are to be multiplied.
    """

    def __init__(self, data: Client, rank: int, report_every: int) -> None:
        self._data, self._rank, self._report_every = data, rank, report_every
        self.steps = self.dropped = self.version = 0
        self.lr_factor = 1.0
        self._samples: list[list[float]] = []
        self._ended = 0.0
        self._seconds = 0.0
        self._last: tuple[float, float] | None = None

    def state(self) -> dict[str, Any]:
        """``version``, ``dropped``, ``agent_seconds``; once a batch was trained, ``bpt``, ``wall`` and ``bubble``."""
        state: dict[str, Any] = {"version": self.version, "dropped": self.dropped, "agent_seconds": self._seconds}
        if self._last is not None:
            bpt, wall = self._last
            state |= {"bpt": [bpt], "wall": wall, "bubble": max(0.0, wall - bpt)}
        return state

    def measure(self, batch: ShardBatch, computed: float) -> bool:
        """A gradient was sent; report, if it is time to.

        Args:
            batch: from which it was computed.
            computed: seconds that this took, waiting for others not included.

        Returns:
            Whether the controller wants this process to be started again.

        Raises:
            RuntimeError: the controller says that the job cannot go on.
        """
        now = time.perf_counter()
        wall = now - self._ended if self._ended else batch.seconds + computed
        self._ended, self._last = now, (batch.seconds + computed, wall)
        self._samples.append([self.steps, batch.count, batch.seconds, computed, wall])
        if len(self._samples) < self._report_every:
            return False
        samples, self._samples = self._samples, []
        begun = time.perf_counter()
        answer = self._data.report(self.steps, samples, version=self.version)
        self._seconds += time.perf_counter() - begun
        if "failure" in answer:
            raise RuntimeError(f"AntDT: {answer['failure']}")
        for action in answer["actions"]:
            if action["action"] not in ("ADJUST_BS", "ADJUST_LR"):  # those take effect when the clock says so
                self.version = max(self.version, int(action["version"]))
        return any(
            action["action"] == "KILL_RESTART" and action["payload"]["node"] == f"worker:{self._rank}"
            for action in answer["actions"]
        )

    def obey(self, plan: Sequence[Any], loader: ShardLoader) -> None:
        """Take over batches or learning rates that the clock has announced.

        Args:
            plan: ``[version, action]``.
            loader: whose batch is set.
        """
        version, action = plan
        if int(version) <= self.version or action is None:
            return
        self.version = int(version)
        if action["action"] == "ADJUST_BS":
            loader.batch = max(1, int(action["batch"][self._rank]))
        else:
            self.lr_factor = float(action["factor"])

    def flush(self) -> None:
        """Report what was measured since the last report."""
        if self._samples:
            self._data.report(self.steps, self._samples, version=self.version)
            self._samples = []
