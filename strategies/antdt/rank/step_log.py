"""Log of each step of all ranks, a line each in a file, and the last step for callbacks (written by rank 0)."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strategies.antdt.rank.loader import StepBatch
from strategies.antdt.rank.step_timer import StepSample

__all__ = ["StepLog"]

_KEPT = 64  # steps whose counts wait for their times
_LINES = 50  # written at once


class StepLog:
    """Writes ``events.jsonl``, to which the service's process may write too: each line is whole.

    A step's line is ``{"kind": "step", "t", "step", "epoch", "n": [n_i], "batch": [B_i], "bpt": [T_i], "wall", "bubble",
    "version"}``: ``wall`` is the time of the step, ``bubble`` the part of it in which the slowest rank did not compute either:
    communication, and whatever else it waits for; seconds, ``t`` since 1970.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lines: list[str] = []
        self._steps: dict[int, dict[str, Any]] = {}
        self._written = -1
        #: The line of the last step whose times are known.
        self.latest: dict[str, Any] = {}

    def write(self, line: dict[str, Any]) -> None:
        """Add a line now, of any kind."""
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def step(self, number: int, batch: StepBatch, samples: Sequence[StepSample]) -> None:
        """A step begins.

        Args:
            number: optimizer steps before it.
            batch: what it trains.
            samples: what rank 0 has measured of steps before.
        """
        allocation, reading = batch.plan.allocation, batch.reading
        self._steps[number] = {
            "kind": "step", "t": time.time(), "step": number, "epoch": batch.plan.epoch, "n": list(reading.counts),
            "batch": list(allocation.batch), "version": allocation.version,
        }  # fmt: skip
        for sample in samples:
            if sample.step in self._steps:
                self._steps[sample.step]["wall"] = sample.wall
        row = self._steps.get(reading.measured)
        if row is not None and "wall" in row and reading.measured > self._written:
            self._written = reading.measured
            row |= {"bpt": list(reading.times), "bubble": max(0.0, row["wall"] - max(reading.times))}
            self.latest = row
            self._lines.append(json.dumps(row) + "\n")
        for old in [old for old in self._steps if old < number - _KEPT]:
            del self._steps[old]
        if len(self._lines) >= _LINES:
            self.flush()

    def flush(self) -> None:
        """Write the steps' lines."""
        if self._lines:
            os.write(self._file, "".join(self._lines).encode())
            self._lines.clear()

    def close(self) -> None:
        """Write what is left, and close."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1
