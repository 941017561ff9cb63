"""Measurements in windows: speed of each node now, and the time for which it has been slow (section 2.2).

Two windows end now. The short one gives a node's seconds a sample, ``c_i = (sum T - a_i C) / sum n``. The long one is cut into
sub-samples, and ``p_i`` is the share of them in which ``c_i`` exceeded the median by a factor; of nodes with the same device, for
one that is slow for all is no straggler that a restart could cure. Steps are kept as sums over sub-samples, so that
memory does not grow with their number. No clock: the caller says what time it is, in seconds or in steps.

(The specification's ``c_i = sum T / sum n`` still holds the fixed cost, which the line ``a_i + c_i n`` would count twice.)
"""

import math
import operator
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from strategies.antdt.control.affine import Moments

__all__ = ["Monitor", "Sample", "Statistics", "Windows", "medians"]

FORGET = 0.97  # of a step, in the fit of the line
PAIRS = 64  # of steps before and after a change of the batch, from which the fixed cost is told
LEAST_CHANGE = 0.025  # of those batches, half their difference over their mean
SUBSAMPLES = 30  # of the long window


class Sample(NamedTuple):
    """A step of one node.

    Attributes:
        step: Optimizer steps before it.
        n: Samples; of a parameter server, the requests served, in any unit that all servers share.
        t_data: Seconds for the data.
        t_comp: Seconds of computation, waiting for others not among them.
        t_wall: Seconds from this step's beginning to the next one's.
    """

    step: int
    n: int
    t_data: float
    t_comp: float
    t_wall: float


@dataclass(frozen=True)
class Windows:
    """Over what the monitor looks.

    Attributes:
        transient: Length of the short window.
        persistent: Length of the long window.
        unit: What both are counted in.
        min_steps: The short window reaches back over as many steps of a node at least (as far as the long one reaches).
        slow_factor: lambda_p: slow is who takes more than this times the median.
        skip_steps: Steps of a node that do not count after it has started: compilation, caches.

    Raises:
        ValueError: Numbers out of range.
    """

    transient: float = 60.0
    persistent: float = 300.0
    unit: Literal["seconds", "steps"] = "seconds"
    min_steps: int = 20
    slow_factor: float = 1.5
    skip_steps: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.transient <= self.persistent:
            raise ValueError(
                f"Windows: the short one, {self.transient:g} {self.unit}, must be positive and not longer than the long one,"
                f" {self.persistent:g} {self.unit}."
            )
        if self.unit not in ("seconds", "steps"):
            raise ValueError(f"Windows: unit={self.unit!r} must be seconds or steps.")
        if self.min_steps < 1 or self.skip_steps < 0 or not self.slow_factor > 1:
            raise ValueError(
                f"Windows: min_steps={self.min_steps} must be at least 1, skip_steps={self.skip_steps} not negative,"
                f" slow_factor={self.slow_factor} above 1."
            )

    @property
    def width(self) -> float:
        """Length of a sub-sample: a thirtieth of the long window, not longer than the short one, whole steps."""
        width = min(self.persistent / SUBSAMPLES, self.transient)
        return width if self.unit == "seconds" else float(max(1, math.floor(width)))

    @property
    def count(self) -> int:
        """Sub-samples of the long window."""
        return max(1, round(self.persistent / self.width))


@dataclass(frozen=True)
class Statistics:
    """All nodes in their windows, a column for each; see `strategies.antdt.control.cluster_view.NodeView`.

    Attributes:
        cost: c_i, seconds a sample; None while nothing was reported.
        fixed: a_i, seconds a micro-batch.
        seconds: Mean seconds of a step; None while nothing was reported.
        steps: Steps counted since it started.
        persistence: p_i.
        slow_for: How long it has been slow without a break, in the unit of the windows; 0 if it is not.
        wall: Mean seconds from one step to the next, over all nodes; None while nothing was reported.
        rate: Samples a second of all nodes together, waiting included; None while nothing was reported.
    """

    cost: list[float | None]
    fixed: list[float]
    seconds: list[float | None]
    steps: list[int]
    persistence: list[float]
    slow_for: list[float]
    wall: float | None
    rate: float | None


class _Sums:
    """Sums of a sub-sample, node by node."""

    __slots__ = ("least", "micros", "samples", "seconds", "steps", "wall")

    def __init__(self, size: int) -> None:
        self.seconds = [0.0] * size
        self.samples = [0] * size
        self.micros = [0] * size
        self.steps = [0] * size
        self.wall = [0.0] * size
        self.least = [math.inf] * size  # seconds a micro-batch, of the quickest step

    def add(self, other: "_Sums", where: Sequence[bool] | None = None) -> None:
        """Add the sums of the same nodes, or of some of them only."""
        for name in ("seconds", "samples", "micros", "steps", "wall"):
            column = getattr(other, name)
            if where is not None:
                column = [value if chosen else 0 for value, chosen in zip(column, where, strict=True)]
            setattr(self, name, list(map(operator.add, getattr(self, name), column)))
        least = other.least
        if where is not None:
            least = [value if chosen else math.inf for value, chosen in zip(least, where, strict=True)]
        self.least = list(map(min, self.least, least))


@dataclass
class _Run:
    """Consecutive steps of all nodes with the same batches: forgetful sums of seconds and of their squares, and the last ones."""

    counts: list[int]
    micros: list[int]
    steps: int
    taken: list[float]
    squares: list[float]
    last: list[float]

    def add(self, taken: Sequence[float]) -> None:
        self.steps += 1
        self.last = list(taken)
        self.taken = [FORGET * before + t for before, t in zip(self.taken, taken, strict=True)]
        self.squares = [FORGET * before + t * t for before, t in zip(self.squares, taken, strict=True)]


class Monitor:
    """The nodes of one role.

    Args:
        size: How many they are; more may come.
        windows: Over what it looks.
    """

    def __init__(self, size: int, windows: Windows) -> None:
        self.windows = windows
        self.size = 0
        self._sums: dict[int, _Sums] = {}
        self._verdicts: deque[tuple[int, bytes]] = deque()  # of sub-samples that are over: who was slow
        self._slow: list[int] = []
        self._since: list[int | None] = []  # first sub-sample of the slowness that goes on
        self._doubt: list[bool] = []  # whether the last one seen was not slow
        self._devices: list[str] = []
        self._steps: list[int] = []
        self._skip: list[int] = []
        self._fixed: list[float] = []
        self._last: list[tuple[int, int, float] | None] = []  # micro-batches, samples and seconds of a node's last step
        self._pairs: deque[tuple[float, float]] = deque(maxlen=PAIRS)  # fixed cost, weight
        self._moments: list[list[float]] = [[] for _ in Moments._fields]
        self._run: _Run | None = None
        self._first: int | None = None  # sub-sample
        self._open = 0
        self.grow(size)

    def grow(self, size: int) -> None:
        """There are as many nodes now, if there were fewer."""
        more = size - self.size
        if more <= 0:
            return
        self._fold()
        for sums in self._sums.values():
            added = _Sums(more)
            for name in _Sums.__slots__:
                getattr(sums, name).extend(getattr(added, name))
        self._verdicts = deque((key, slow + bytes(more)) for key, slow in self._verdicts)
        self._slow += [0] * more
        self._since += [None] * more
        self._doubt += [False] * more
        self._devices += [""] * more
        self._steps += [0] * more
        self._skip += [self.windows.skip_steps] * more
        self._fixed += [0.0] * more
        self._last += [None] * more
        for column in self._moments:
            column += [0.0] * more
        self.size = size

    def forget(self, node: int, device: str = "") -> None:
        """A node has moved to another machine: nothing known of it holds."""
        self.started(node, device)
        for sums in self._sums.values():
            for name, value in (("seconds", 0.0), ("samples", 0), ("micros", 0), ("steps", 0), ("wall", 0.0)):
                getattr(sums, name)[node] = value
            sums.least[node] = math.inf
        self._verdicts = deque((key, slow[:node] + b"\0" + slow[node + 1 :]) for key, slow in self._verdicts)
        self._slow[node] = 0
        self._since[node], self._doubt[node] = None, False
        self._fixed[node] = 0.0
        for column in self._moments:
            column[node] = 0.0

    def started(self, node: int, device: str = "") -> None:
        """A node's process is new: its first steps do not count. It is compared with nodes that have the same device."""
        self._devices[node] = device or self._devices[node]
        self._fold()
        self._skip[node] = self.windows.skip_steps
        self._steps[node] = 0
        self._last[node] = None

    def add(self, node: int, samples: Sequence[Sample], cap: int | None, now: float) -> None:
        """Take measurements of one node.

        Args:
            node: Its number.
            samples: Steps, the newest last; those without samples (n = 0) say nothing of its speed and are left out.
            cap: Most samples of a micro-batch.
            now: When the last step ended, if windows are in seconds.
        """
        seconds = self.windows.unit == "seconds"
        at = [0.0] * len(samples)
        end = now
        for place in range(len(samples) - 1, -1, -1):
            at[place] = end if seconds else float(samples[place].step)
            end -= samples[place].t_wall
        for sample, time in zip(samples, at, strict=True):
            if sample.n > 0 and self._skip[node]:
                self._skip[node] -= 1
            elif sample.n > 0:
                self._add(node, sample, 1 if cap is None else -(-sample.n // cap), time)

    def _add(self, node: int, sample: Sample, micros: int, at: float) -> None:
        self._fold()
        taken = sample.t_data + sample.t_comp
        sums = self._sums_at(at)
        sums.seconds[node] += taken
        sums.samples[node] += sample.n
        sums.micros[node] += micros
        sums.steps[node] += 1
        sums.wall[node] += sample.t_wall
        sums.least[node] = min(sums.least[node], taken / micros)
        self._steps[node] += 1
        self._compare(node, micros, sample.n, taken)
        for column, value in zip(self._moments, self.moments(node).after(FORGET, micros, sample.n, taken), strict=True):
            column[node] = value

    def add_step(self, counts: Sequence[int], micros: Sequence[int], taken: Sequence[float], wall: float, at: float) -> None:
        """Take one step of all nodes at once: the same as `add` for each, for simulations of many.

        Args:
            counts: n_i; 0 of those that do not take part.
            micros: C_i.
            taken: T_i, seconds.
            wall: Seconds of the step.
            at: When it ended, in the unit of the windows.
        """
        sums = self._sums_at(at)
        if any(self._skip) or not all(counts):
            for node, (n, c, t) in enumerate(zip(counts, micros, taken, strict=True)):
                if n and self._skip[node]:
                    self._skip[node] -= 1
                elif n:
                    self._add(node, Sample(0, n, 0.0, t, wall), c, at)
            return
        for name, column in (("seconds", taken), ("samples", counts), ("micros", micros)):
            setattr(sums, name, list(map(operator.add, getattr(sums, name), column)))
        sums.steps = [a + 1 for a in sums.steps]
        sums.wall = [a + wall for a in sums.wall]
        per_micro = taken if max(micros) == 1 else list(map(operator.truediv, taken, micros))
        sums.least = list(map(min, sums.least, per_micro))
        self._steps = [a + 1 for a in self._steps]
        if self._run is None or self._run.counts != counts or self._run.micros != micros:
            self._fold()
            for node, (n, c, t) in enumerate(zip(counts, micros, taken, strict=True)):
                self._compare(node, c, n, t)
            self._run = _Run(list(counts), list(micros), 0, [0.0] * self.size, [0.0] * self.size, [])
        self._run.add(taken)

    def _compare(self, node: int, micros: int, samples: int, taken: float) -> None:
        """Tell the fixed cost from a step and the one before it, if the batch has changed in between."""
        if (last := self._last[node]) is not None and (last[0], last[1]) != (micros, samples):
            one, other = last[0] * samples, micros * last[1]
            weight = abs(one - other) / (one + other)
            if weight >= LEAST_CHANGE:
                self._pairs.append(((last[2] * samples - taken * last[1]) / (one - other), weight))
        self._last[node] = (micros, samples, taken)

    def _fold(self) -> None:
        """Take steps of one shape, which were summed for all nodes together, into the moments."""
        if self._run is None:
            return
        run, self._run = self._run, None
        self._last = list(zip(run.micros, run.counts, run.last, strict=True))
        old, weight = FORGET**run.steps, (1 - FORGET**run.steps) / (1 - FORGET)
        for node, (c, n, t, tt) in enumerate(zip(run.micros, run.counts, run.taken, run.squares, strict=True)):
            new = (weight, weight * c * c, weight * c * n, weight * n * n, c * t, n * t, tt)
            for column, value in zip(self._moments, new, strict=True):
                column[node] = old * column[node] + value

    def _sums_at(self, at: float) -> _Sums:
        key = max(int(at // self.windows.width), self._open)
        if key not in self._sums:
            self._sums[key] = _Sums(self.size)
            if self._first is None:
                self._first = self._open = key
        return self._sums[key]

    def advance(self, clock: float) -> None:
        """It is ``clock`` now: judge the sub-samples that are over, let go of what left the windows.

        A sub-sample is judged one sub-sample late, so that reports of it have come in.
        """
        width = self.windows.width
        now = int(clock // width)
        for key in sorted(key for key in self._sums if self._open <= key < now - 1):
            self._judge(key)
        self._open = max(self._open, now - 1) if self._first is not None else 0
        while self._verdicts and self._verdicts[0][0] < now - 1 - self.windows.count:
            for node, slow in enumerate(self._verdicts.popleft()[1]):
                self._slow[node] -= slow
        short = math.ceil(self.windows.transient / width)
        steps = [0] * self.size
        for key in sorted(self._sums, reverse=True):
            if key < now - self.windows.count or (key < now - short and min(steps) >= self.windows.min_steps):
                del self._sums[key]
            else:
                steps = [a + b for a, b in zip(steps, self._sums[key].steps, strict=True)]

    def _judge(self, key: int) -> None:
        sums = self._sums[key]
        costs = list(map(_cost, sums.seconds, sums.samples, sums.micros, self._fixed))
        if not any(sums.samples):
            return
        usual = medians(costs, self._devices)
        factor = self.windows.slow_factor
        slow = bytes(
            cost is not None and cost > factor * usual[device] for cost, device in zip(costs, self._devices, strict=True)
        )
        for node, (cost, verdict) in enumerate(zip(costs, slow, strict=True)):
            if verdict:
                self._since[node] = key if self._since[node] is None else self._since[node]
                self._doubt[node] = False
            elif cost is not None and self._since[node] is not None:  # over once two in a row are not slow
                self._since[node], self._doubt[node] = (None, False) if self._doubt[node] else (self._since[node], True)
        self._verdicts.append((key, slow))
        self._slow = [before + verdict for before, verdict in zip(self._slow, slow, strict=True)]

    def statistics(self, clock: float) -> Statistics:
        """All nodes in their windows."""
        self._fold()
        total, windows = _Sums(self.size), self.windows
        oldest = int(clock // windows.width) - math.ceil(windows.transient / windows.width)
        for key in sorted(self._sums, reverse=True):
            part = self._sums[key]
            if key >= oldest:
                total.add(part)
            elif min(total.steps) < windows.min_steps:
                total.add(part, [steps < windows.min_steps for steps in total.steps])
        usual = self._usual_fixed()
        self._fixed = [min(usual, 0.8 * quickest) for quickest in total.least]
        walls = [wall / steps for wall, steps in zip(total.wall, total.steps, strict=True) if wall]
        rates = [samples / wall for samples, wall in zip(total.samples, total.wall, strict=True) if wall]
        return Statistics(
            list(map(_cost, total.seconds, total.samples, total.micros, self._fixed)),
            list(self._fixed),
            [seconds / steps if steps else None for seconds, steps in zip(total.seconds, total.steps, strict=True)],
            list(self._steps),
            self._persistence() if any(self._slow) else [0.0] * self.size,
            [0.0 if since is None else clock - since * windows.width for since in self._since],
            math.fsum(walls) / len(walls) if walls else None,
            math.fsum(rates) if rates else None,
        )

    def _usual_fixed(self) -> float:
        """a, the same for all nodes: the weighted median over pairs of steps before and after a change of the batch.

        A line through all steps of one node means nothing where batches follow speed: a slow node takes as long for its small
        batch as it took for a large one when it was quick, as if all of that were fixed. Two steps in a row are of the same
        speed, but for few nodes. What a node's fixed cost has more or less than this goes to c_i, which so stays exact for the
        batch at hand.
        """
        if len(self._pairs) < 2:
            return 0.0
        half = math.fsum(weight for _, weight in self._pairs) / 2
        passed = 0.0
        for fixed, weight in sorted(self._pairs):
            passed += weight
            if passed >= half:
                return max(fixed, 0.0)
        return 0.0

    def _persistence(self) -> list[float]:
        """p_i; time before the first report counts as not slow.

        Where not all of the window is slow, an interval's first and last sub-sample count as not slow: it may have covered them
        in part only, and intervals shorter than the share asked for must not reach it.
        """
        count = len(self._verdicts)
        before = self.windows.count - (self._verdicts[-1][0] - (self._first or 0) + 1)
        edges = 0 if self.windows.unit == "steps" and self.windows.width == 1 else 2
        whole = count if before <= 0 else count + before + edges
        return [1.0 if slow == whole else max(slow - edges, 0) / (count + max(before, 0)) for slow in self._slow]

    def moments(self, node: int) -> Moments:
        """Of a node, for a fit over several."""
        self._fold()
        return Moments(*(column[node] for column in self._moments))

    def columns(self) -> tuple[tuple[float, ...], ...]:
        """Moments of all nodes: a column for each field."""
        self._fold()
        return tuple(map(tuple, self._moments))

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        self._fold()
        return {
            "sums": [
                [
                    key,
                    *(getattr(sums, name) for name in _STORED[:-1]),
                    [value if value < math.inf else None for value in sums.least],
                ]
                for key, sums in sorted(self._sums.items())
            ],
            "verdicts": [[key, slow.hex()] for key, slow in self._verdicts],
            "since": list(self._since),
            "doubt": list(self._doubt),
            "devices": list(self._devices),
            "steps": list(self._steps),
            "skip": list(self._skip),
            "fixed": list(self._fixed),
            "last": [None if last is None else list(last) for last in self._last],
            "pairs": [list(pair) for pair in self._pairs],
            "moments": [list(column) for column in self._moments],
            "first": self._first,
            "open": self._open,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.size = len(state["steps"])
        self._sums = {}
        for key, *columns in state["sums"]:
            sums = self._sums[int(key)] = _Sums(0)
            for name, column in zip(_STORED, columns, strict=True):
                setattr(sums, name, list(column))
            sums.least = [math.inf if value is None else value for value in sums.least]
        self._verdicts = deque((int(key), bytes.fromhex(slow)) for key, slow in state["verdicts"])
        self._slow = [sum(column) for column in zip(*(slow for _, slow in self._verdicts), strict=True)] or [0] * self.size
        self._since, self._doubt, self._devices = list(state["since"]), list(state["doubt"]), list(state["devices"])
        self._last = [None if last is None else (last[0], last[1], last[2]) for last in state["last"]]
        self._pairs = deque(((fixed, weight) for fixed, weight in state["pairs"]), maxlen=PAIRS)
        self._steps, self._skip, self._fixed = list(state["steps"]), list(state["skip"]), list(state["fixed"])
        self._moments = [list(column) for column in state["moments"]]
        self._first = cast(int | None, state["first"])
        self._open = int(state["open"])


def medians(costs: Iterable[float | None], devices: Sequence[str]) -> dict[str, float]:
    """Median cost of the nodes of each device, of those that are known (of all, for a device of which none is)."""
    known: dict[str, list[float]] = {}
    for cost, device in zip(costs, devices, strict=True):
        if cost is not None:
            known.setdefault(device, []).append(cost)
    found = {device: statistics.median_low(values) for device, values in known.items()}
    whole = statistics.median_low([cost for values in known.values() for cost in values]) if known else 0.0
    return {device: found.get(device, whole) for device in set(devices)}


_STORED = ("seconds", "samples", "micros", "steps", "wall", "least")


def _cost(seconds: float, samples: int, micros: int, fixed: float) -> float | None:
    """c_i; where the fixed cost would take all of it, without fixed cost."""
    if not samples:
        return None
    cost = (seconds - fixed * micros) / samples
    return cost if cost > 0 else seconds / samples
