"""When workers may begin a step and whose gradients count: asynchronous, stale-synchronous, and synchronous with backups.

A state machine without input or output; `strategies.antdt.ps.steps` asks it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Clock", "Consistency", "Decision", "Pushed"]


@dataclass(frozen=True)
class Consistency:
    """How far workers may be apart.

    ======  ====================================================================================================================
    asp     not at all bounded: each gradient is a step
    ssp     each gradient is a step; a worker that has pushed ``staleness`` gradients more than the slowest one waits for it
            (Ho et al. 2013)
    bsp     a step takes one gradient of each worker, weighed by samples; with ``backup`` = b, the first W - b, and those that
            come later are dropped (Chen et al. 2016)
    ======  ====================================================================================================================

    Raises:
        ValueError: an unknown kind, or a number that does not go with it.
    """

    kind: Literal["asp", "ssp", "bsp"] = "asp"
    staleness: int = 0
    backup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("asp", "ssp", "bsp"):
            raise ValueError(f"mode is {self.kind!r}; it must be asp, ssp or bsp.")
        if self.staleness < 0 or self.backup < 0:
            raise ValueError(f"staleness={self.staleness} and backup={self.backup} must not be negative.")
        if self.backup and self.kind != "bsp":
            raise ValueError(f"backup={self.backup} goes with mode bsp only, not with {self.kind}: no step waits there.")
        if self.staleness and self.kind != "ssp":
            raise ValueError(f"staleness={self.staleness} goes with mode ssp only, not with {self.kind}.")


@dataclass(frozen=True)
class Decision:
    """Which gradients make a synchronous step.

    Attributes:
        version: the step.
        accepted: workers, in ascending order.
    """

    version: int
    accepted: tuple[int, ...]

    def to_json(self) -> list[Any]:
        """``[version, accepted]``."""
        return [self.version, list(self.accepted)]

    @classmethod
    def from_json(cls, data: Any) -> "Decision":
        """What `to_json` has made."""
        return cls(int(data[0]), tuple(int(worker) for worker in data[1]))


@dataclass(frozen=True)
class Pushed:
    """What becomes of a gradient.

    Attributes:
        accepted: it counts; False: dropped; None: not known until the step is complete.
        decision: the step that it completes.
    """

    accepted: bool | None
    decision: Decision | None = None


class Clock:
    """Counts steps, and knows who takes part in them.

    Args:
        consistency: how far workers may be apart.

    Attributes:
        version: steps done.
        counts: ``pushed``, ``dropped``, and ``stale``, the largest number of steps between the weights with which a gradient was
            computed and those to which it was applied.

    Example:
        >>> clock = Clock(Consistency("bsp", backup=1))
        >>> clock.enter(range(3))
        >>> clock.push(2, version=0).accepted
        >>> clock.push(0, version=0).decision
        Decision(version=0, accepted=(0, 2))
        >>> clock.push(1, version=0).accepted
        False
    """

    def __init__(self, consistency: Consistency) -> None:
        self.consistency = consistency
        self.version = 0
        self.own: dict[int, int] = {}
        """Gradients of each worker that takes part; one that came later counts from the slowest."""
        self.arrived: set[int] = set()
        self.awaited: set[int] = set()
        """Who took part with the former process and has not come back: no synchronous step is complete without them."""
        self.last: Decision | None = None
        self.gone = range(0)
        """Steps that were decided by the former process and are lost, see `advance`."""
        self.counts = {"pushed": 0, "dropped": 0, "stale": 0}

    def enter(self, workers: Iterable[int]) -> None:
        """Workers have batches to train, so that others may have to wait for them."""
        start = min(self.own.values(), default=self.version)
        for worker in workers:
            self.awaited.discard(worker)
            self.own.setdefault(worker, start)

    def resume(self, worker: int, count: int) -> None:
        """A worker that was idle for a while takes part again; it counts from where it was, or from the slowest."""
        self.own[worker] = max(count, min(self.own.values(), default=count))

    def idle(self, worker: int) -> Decision | None:
        """A worker has nothing to train, or is lost; nobody waits for it.

        Returns:
            The step that is complete without it.
        """
        self.own.pop(worker, None)
        self.arrived.discard(worker)
        self.awaited.discard(worker)
        return self._complete()

    def expect_back(self, workers: Iterable[int]) -> None:
        """This clock was restarted: these workers took part, and each will say whether it trains or is idle.

        What was saved of that may be out of date: who is in the middle of a step must not be left out of it.
        """
        self.awaited = set(workers)

    def may_begin(self, worker: int) -> bool:
        """Whether a worker may begin a step now. A synchronous one may: it has waited for the step before."""
        if self.consistency.kind != "ssp":
            return True
        slowest = min(self.own.values(), default=0)
        return self.own.get(worker, slowest) <= slowest + self.consistency.staleness

    def push(self, worker: int, version: int) -> Pushed:
        """A gradient has come.

        Args:
            worker: whose; it takes part.
            version: steps that the weights had seen with which it was computed.
        """
        self.counts["pushed"] += 1
        if worker in self.awaited:
            self.enter([worker])
        if self.consistency.kind != "bsp":
            self.counts["stale"] = max(self.counts["stale"], self.version - version)
            self.version += 1
            self._count(worker)
            return Pushed(True)
        if version in self.gone:  # the former process took it, and could not say so
            return Pushed(True)
        if version != self.version:
            self.counts["dropped"] += 1
            return Pushed(False)
        self._count(worker)
        self.arrived.add(worker)
        decision = self._complete()
        return Pushed(None if decision is None else True, decision)

    def _count(self, worker: int) -> None:
        if worker in self.own:  # one that was lost after it had sent its gradient is not
            self.own[worker] += 1

    def set_backup(self, backup: int) -> Decision | None:
        """Another number of backup workers from now on.

        Raises:
            ValueError: negative, or not synchronous.
        """
        self.consistency = Consistency(self.consistency.kind, self.consistency.staleness, backup)
        return self._complete()

    @property
    def quorum(self) -> int:
        """Gradients that make a synchronous step."""
        return max(1, len(self.own) - self.consistency.backup)

    def _complete(self) -> Decision | None:
        if self.consistency.kind != "bsp" or self.awaited or not self.arrived or len(self.arrived) < self.quorum:
            return None
        self.last = Decision(self.version, tuple(sorted(self.arrived)))
        self.arrived.clear()
        self.version += 1
        return self.last

    def advance(self, version: int) -> int:
        """Others know of steps that this clock, restarted from what it had saved, does not.

        A synchronous gradient of such a step that comes now was sent before, and its worker has not heard that the step was
        decided: it counts, as the others were told, and is lost with the step.

        Returns:
            How many there are; they stay lost.
        """
        lost = max(0, version - self.version)
        if lost:
            self.gone = range(self.gone.start if self.gone.stop == self.version else self.version, version)
            self.version = version
            self.arrived.clear()
            self.last = None
        return lost

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"version": self.version, "own": sorted(self.own.items()), "counts": dict(self.counts),
                "backup": self.consistency.backup, "gone": [self.gone.start, self.gone.stop]}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` has written; gradients that wait for others are not in it."""
        self.version = int(state["version"])
        self.own = {int(worker): int(count) for worker, count in state["own"]}
        self.counts = {name: int(count) for name, count in state["counts"].items()}
        if self.consistency.kind == "bsp":
            self.consistency = Consistency("bsp", backup=int(state["backup"]))
        self.gone = range(*state["gone"])
        self.arrived, self.last = set(), None
