"""T_i, the seconds that a rank itself takes for a step, without waiting for others (section 2.2).

A step's time is that of its data, and that from the beginning of the first forward pass to the moment when the last bucket of
gradients is handed to the collective. Wall time would not do: all ranks end a step together, so that all look equally slow.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["StepSample", "StepTimer"]


@dataclass(frozen=True)
class StepSample:
    """Measurements of a rank in a step.

    Attributes:
        step: optimizer steps before this one.
        count: n_i.
        data: seconds for its data.
        compute: seconds of computation, waiting not included.
        wall: seconds from the request for this step's data to that for the next.
    """

    step: int
    count: int
    data: float
    compute: float
    wall: float

    @property
    def seconds(self) -> float:
        """T_i."""
        return self.data + self.compute


class _Open:
    """A step that is under way, or whose events the device has not reached."""

    def __init__(self, step: int, count: int, data: float, begun: float) -> None:
        self.step, self.count, self.data, self.begun = step, count, data, begun
        self.waited = 0.0
        self.start: Any = None
        self.stop: Any = None
        self.wall: float | None = None


class StepTimer:
    """Measures steps; on a GPU with events that are read when the device has passed them, so that nothing waits.

    Args:
        device: of the model.
        clock: seconds that only grow.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self._open: deque[_Open] = deque()
        #: The step measured last.
        self.last: StepSample | None = None

    def begin(self, step: int, count: int, data: float, begun: float) -> None:
        """The data of a step have come.

        Args:
            step: optimizer steps before this one.
            count: n_i.
            data: seconds they took, without waiting for other ranks.
            begun: when they were asked for, by `clock`.
        """
        if self._open and self._open[-1].wall is None:
            self._open[-1].wall = begun - self._open[-1].begun
        self._open.append(_Open(step, count, data, begun))

    def forward_begins(self) -> None:
        """The first forward pass of the step begins (later calls of the step change nothing)."""
        if self._open and self._open[-1].start is None:
            self._open[-1].start = self._now()

    def waited(self, seconds: float) -> None:
        """So many seconds of the computation were spent on waiting for others."""
        if self._open:
            self._open[-1].waited += seconds

    def handed_over(self) -> None:
        """The last bucket of gradients is ready."""
        if self._open:
            self._open[-1].stop = self._now()

    def finished(self) -> list[StepSample]:
        """Steps that are over and were not returned before."""
        samples = []
        while self._open and self._open[0].wall is not None and self._reached(self._open[0]):
            samples.append(self._close(self._open.popleft()))
        if samples:
            self.last = samples[-1]
        return samples

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _reached(self, step: _Open) -> bool:
        return self.device.type != "cuda" or step.stop is None or step.stop.query()

    def _close(self, step: _Open) -> StepSample:
        compute = 0.0
        if step.start is not None and step.stop is not None:
            cuda = self.device.type == "cuda"
            compute = step.start.elapsed_time(step.stop) / 1000 if cuda else step.stop - step.start
        assert step.wall is not None
        return StepSample(step.step, step.count, step.data, max(0.0, compute - step.waited), step.wall)
