"""Slowness of each node at each time, for simulations: drawn from a model, or recorded (section 2.9).

A node takes ``base * transient(t) * persistent`` times as long as usual. Transient slowness comes and goes: episodes begin after
exponential gaps, last exponentially, and slow down by a uniform factor. Persistent slowness lasts until the node is restarted
elsewhere, where a transient one ends too, for both belong to the machine. All of a node's numbers come from (seed, node), so that
whatever is done to a cluster, its nodes suffer the same.
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from strategies.antdt.simulation.inject import read_trace

__all__ = ["NodeSlowness", "SlownessModel", "read_slowness"]


@dataclass(frozen=True)
class SlownessModel:
    """Model from which slowness is drawn.

    Attributes:
        transient_rate: Episodes a second of a node that has none.
        transient_seconds: Mean length of an episode.
        transient_factor: Least and largest factor of an episode.
        persistent_share: Share of nodes that are slow persistently; as many are drawn as come closest to it.
        persistent_factor: Least and largest of their factors.
        persistent_onset: Latest second at which one of them begins to be slow.
        slow_devices: Share of nodes whose device is slower, the last ones in order.
        device_factor: By how much.

    Raises:
        ValueError: Numbers out of range.
    """

    transient_rate: float = 1 / 600
    transient_seconds: float = 60.0
    transient_factor: tuple[float, float] = (1.5, 4.0)
    persistent_share: float = 0.03
    persistent_factor: tuple[float, float] = (3.0, 6.0)
    persistent_onset: float = 0.0
    slow_devices: float = 0.0
    device_factor: float = 1.0

    def __post_init__(self) -> None:
        factors = (*self.transient_factor, *self.persistent_factor, self.device_factor)
        if min(factors) <= 0 or not 0 <= self.persistent_share <= 1 or not 0 <= self.slow_devices <= 1:
            raise ValueError(f"SlownessModel: factors {factors} must be positive, shares in [0, 1] in {self}.")
        if self.transient_rate < 0 or not self.transient_seconds > 0 or self.persistent_onset < 0:
            raise ValueError(f"SlownessModel: rates and times must not be negative, episodes must last, in {self}.")

    def draw(self, role: str, count: int, seed: int) -> list["NodeSlowness"]:
        """Nodes of a role.

        Args:
            role: ``worker`` or ``server``; their numbers differ.
            count: How many.
            seed: Of all that is drawn.
        """
        drawn = random.Random(f"{seed}/{role}")
        planted = set(drawn.sample(range(count), round(self.persistent_share * count)))
        slow_from = count - round(self.slow_devices * count)
        nodes = []
        for node in range(count):
            own = random.Random(f"{seed}/{role}/{node}")
            persistent = (own.uniform(0, self.persistent_onset), own.uniform(*self.persistent_factor))
            base, device = (self.device_factor, "slow device") if node >= slow_from else (1.0, "device")
            nodes.append(NodeSlowness(self._episodes(own), base, persistent if node in planted else None, device))
        return nodes

    def _episodes(self, drawn: random.Random) -> Iterator[tuple[float, float]]:
        time = 0.0
        while self.transient_rate:
            time += drawn.expovariate(self.transient_rate)
            yield time, drawn.uniform(*self.transient_factor)
            time += drawn.expovariate(1 / self.transient_seconds)
            yield time, 1.0


class NodeSlowness:
    """The factor by which a node is slow, piecewise constant in time; time only goes forward.

    Args:
        changes: Pairs (time, factor), sorted: from when on the transient factor is what.
        base: Factor of the device.
        persistent: From when on there is another factor until the node moves, and which.

    Attributes:
        factor: The product, at the time of the last `advance`.
        until: When it changes next; infinity if never.
        device: Name of its device.
        planted: Whether the node is slow persistently.
        cured: Whether it was, and has moved.
    """

    def __init__(
        self,
        changes: Iterable[tuple[float, float]] = (),
        base: float = 1.0,
        persistent: tuple[float, float] | None = None,
        device: str = "",
    ) -> None:
        self.device = device
        self._changes, self._base, self._persistent = iter(changes), base, persistent
        self.planted, self.cured = persistent is not None, False
        self._transient = 1.0
        self._next = next(self._changes, (math.inf, 1.0))
        self.factor, self.until = base, 0.0
        self.advance(0.0)

    def advance(self, time: float) -> float:
        """Go on to a time; returns the factor then."""
        while self._next[0] <= time:
            self._transient = self._next[1]
            self._next = next(self._changes, (math.inf, 1.0))
        self.factor, self.until = self._base * self._transient, self._next[0]
        if self._persistent is not None:
            onset, factor = self._persistent
            if onset <= time:
                self.factor *= factor
            else:
                self.until = min(self.until, onset)
        return self.factor

    def move(self, time: float) -> bool:
        """Restart elsewhere: what made the old machine slow now, for long or not, is left behind, but for its kind of device.

        Returns:
            Whether that ended a persistent slowness that had begun.
        """
        self._transient = 1.0
        helped = self._persistent is not None and self._persistent[0] <= time
        if helped:
            self._persistent, self.cured = None, True
        self.advance(time)
        return helped

    def finish(self, time: float, work: float) -> float:
        """When seconds of work, as they are at factor 1, are done if they begin at a time; goes on to that time."""
        self.advance(time)
        while work > 0:
            if time + work * self.factor <= self.until:
                time += work * self.factor
                break
            work -= (self.until - time) / self.factor
            time = self.until
            self.advance(time)
        self.advance(time)
        return time


def read_slowness(path: str | Path, role: str, count: int) -> list[NodeSlowness]:
    """Nodes that behave as they did when a trace was recorded; those that are not in it are never slow.

    Args:
        path: JSON lines ``{"time": 1.5, "node": "worker:3", "slowdown": 4.0}``, or a CSV file with these columns; seconds since
            the start, and the factor from then on.
        role: ``worker`` or ``server``.
        count: How many.

    Raises:
        ValueError: A row that lacks a field, whose slowdown is not positive, or whose node is not among those.
    """
    trace = {name: points for name, points in read_trace(path).items() if name.partition(":")[0] == role}
    names = [f"{role}:{node}" for node in range(count)]
    wrong = [name for name, points in trace.items() if name not in names or any(not factor > 0 for _, factor in points)]
    if wrong and count:
        raise ValueError(
            f"{path}: {wrong[0]} is not among {names[0]} to {names[-1]}, or its slowdown is not positive ({len(wrong)} such)."
        )
    return [NodeSlowness(trace.get(name, [])) for name in names]
