"""Stragglers on purpose: emulated by sleep, replayed from a trace, or made by stopping a process (for tests and benchmarks).

Sleep does not use a core, so that several ranks on one core behave like as many machines; results obtained with it are results
of an emulation. `DutyCycleInjector` really takes time away from a process.
"""

import csv
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DutyCycleInjector", "Injector", "SleepInjector", "Slowdown", "TraceInjector", "read_trace"]


@dataclass(frozen=True)
class Slowdown:
    """A rank is slower for a while.

    Attributes:
        rank: which one.
        factor: time of a sample, as a multiple of what it takes otherwise; above 1 for a straggler, below for a leader.
        start: first optimizer step of it.
        stop: first step after it; None: it lasts.
        pid_bound: it ends when the process is started again, as if that were placed on another machine.

    Raises:
        ValueError: a factor that is not positive, or steps in the wrong order.
    """

    rank: int
    factor: float
    start: int = 0
    stop: int | None = None
    pid_bound: bool = False

    def __post_init__(self) -> None:
        if not self.factor > 0 or self.rank < 0 or self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise ValueError(f"{self}: factor must be positive, rank and start not negative, and stop not before start.")


class Injector(ABC):
    """Slows ranks down."""

    def begin(self, rank: int, restarted: bool = False) -> None:  # noqa: B027  (most have nothing to do)
        """A run begins on this rank.

        Args:
            rank: this process's.
            restarted: whether the process replaces one that was killed.
        """

    @abstractmethod
    def delay(self, step: int, num_samples: int, rank: int) -> float:
        """Seconds by which the computation of a micro-batch is to be longer.

        Args:
            step: optimizer steps before this one.
            num_samples: samples of the micro-batch.
            rank: this process's.
        """

    def end(self) -> None:  # noqa: B027
        """The run ends."""


class SleepInjector(Injector):
    """Each sample costs time, on some ranks and steps more than on others (an emulation).

    Args:
        cost_per_sample: seconds a sample takes in addition to what the model takes, on a rank that is not slowed down.
        schedule: slowdowns; those of a rank that overlap multiply.
        cost_per_batch: seconds that each micro-batch takes in addition, whatever its size.

    Raises:
        ValueError: negative costs.

    Example:
        >>> injector = SleepInjector(0.01, [Slowdown(rank=3, factor=4.0, start=20)])
        >>> round(injector.delay(19, 8, rank=3), 6), round(injector.delay(20, 8, rank=3), 6)
        (0.08, 0.32)
    """

    def __init__(self, cost_per_sample: float, schedule: Sequence[Slowdown] = (), cost_per_batch: float = 0.0) -> None:
        if cost_per_sample < 0 or cost_per_batch < 0:
            raise ValueError(
                f"SleepInjector: cost_per_sample={cost_per_sample} and cost_per_batch={cost_per_batch} must not be negative."
            )
        self.cost_per_sample = cost_per_sample
        self.cost_per_batch = cost_per_batch
        self.schedule = list(schedule)
        self._restarted = False

    def begin(self, rank: int, restarted: bool = False) -> None:
        """A run begins; what was bound to a process that is gone is over."""
        self._restarted = restarted

    def delay(self, step: int, num_samples: int, rank: int) -> float:
        """Seconds for ``num_samples`` at this step and rank."""
        factor = 1.0
        for each in self.schedule:
            over = each.pid_bound and self._restarted
            if each.rank == rank and each.start <= step and (each.stop is None or step < each.stop) and not over:
                factor *= each.factor
        return factor * (self.cost_per_batch + self.cost_per_sample * num_samples)


def read_trace(path: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Read a trace of slowdowns: rows of ``time`` (seconds since the start), ``node`` and ``slowdown``.

    Args:
        path: JSON lines (``{"time": 1.5, "node": "worker:3", "slowdown": 4.0}``), or a CSV file with these columns.

    Returns:
        For each node, ``(time, slowdown)`` sorted by time; a slowdown holds until the next.

    Raises:
        ValueError: a row that lacks a field or is no number; it is named.
    """
    path = Path(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file if line.strip()]
    trace: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(rows, 1):
        try:
            trace.setdefault(str(row["node"]), []).append((float(row["time"]), float(row["slowdown"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {number} is {row}; each needs time, node and slowdown as numbers.") from error
    return {node: sorted(points) for node, points in trace.items()}


class TraceInjector(Injector):
    """Replays slowdowns that were recorded elsewhere, by sleep (an emulation).

    Args:
        path: of the trace (`read_trace`); nodes are named ``worker:<rank>``.
        cost_per_sample: seconds a sample takes in addition where the slowdown is 1.

    Raises:
        ValueError: a trace that cannot be read, or a negative cost.
    """

    def __init__(self, path: str, cost_per_sample: float) -> None:
        if cost_per_sample < 0:
            raise ValueError(f"TraceInjector: cost_per_sample={cost_per_sample} must not be negative.")
        self.path = path
        self.cost_per_sample = cost_per_sample
        self.trace = read_trace(path)
        #: Seconds that only grow; tests put their own here.
        self.clock: Callable[[], float] = time.monotonic
        self._started: float | None = None

    def delay(self, step: int, num_samples: int, rank: int) -> float:
        """Seconds for ``num_samples`` now; time counts from the first call."""
        now = self.clock()
        self._started = now if self._started is None else self._started
        points = self.trace.get(f"worker:{rank}", [])
        at = bisect_right(points, now - self._started, key=lambda point: point[0])
        return (points[at - 1][1] if at else 1.0) * self.cost_per_sample * num_samples


_THROTTLE = """
import os, signal, sys, time
pid, fraction, period = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
def end(*_):
    try:
        os.kill(pid, signal.SIGCONT)
    finally:
        os._exit(0)
signal.signal(signal.SIGTERM, end)
parent = os.getppid()
try:
    while os.getppid() == parent:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(fraction * period)
        os.kill(pid, signal.SIGCONT)
        time.sleep((1 - fraction) * period)
except ProcessLookupError:
    pass
"""


class DutyCycleInjector(Injector):
    """Stops a rank's process for a part of the time, from outside: real contention, all threads of the process included.

    Args:
        fraction: part of the time that the process is stopped, in (0, 1).
        period: seconds of a cycle; short beside a step.
        ranks: whom to slow down.
        start: first optimizer step of it.
        stop: first step after it; None: it lasts.
        pid_bound: it ends when the process is started again.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        fraction: float,
        period: float = 0.02,
        ranks: Sequence[int] = (0,),
        start: int = 0,
        stop: int | None = None,
        pid_bound: bool = False,
    ) -> None:
        if not 0 < fraction < 1 or period <= 0:
            raise ValueError(f"DutyCycleInjector: fraction={fraction} must lie in (0, 1), and period={period} be positive.")
        self.fraction, self.period = fraction, period
        self.ranks = list(ranks)
        self.start, self.stop, self.pid_bound = start, stop, pid_bound
        self._restarted = False
        self._throttle: subprocess.Popen[bytes] | None = None

    def begin(self, rank: int, restarted: bool = False) -> None:
        """A run begins."""
        self._restarted = restarted

    def delay(self, step: int, num_samples: int, rank: int) -> float:
        """Begin or end to stop this process if it is time; no delay of its own."""
        over = (self.stop is not None and step >= self.stop) or (self.pid_bound and self._restarted)
        if self._throttle is None and rank in self.ranks and step >= self.start and not over:
            arguments = [str(os.getpid()), str(self.fraction), str(self.period)]
            self._throttle = subprocess.Popen([sys.executable, "-S", "-c", _THROTTLE, *arguments])
        elif self._throttle is not None and over:
            self.end()
        return 0.0

    def end(self) -> None:
        """Let the process run."""
        if self._throttle is not None:
            self._throttle.terminate()
            self._throttle.wait()
            self._throttle = None
