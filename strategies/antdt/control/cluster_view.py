"""View of a cluster for solutions: frozen, plain numbers (section 2.3)."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from strategies.antdt.control.affine import Moments

__all__ = ["ClusterView", "NodeView", "step_seconds"]


class NodeView(NamedTuple):
    """A worker or server.

    Attributes:
        node: Name, such as ``worker:3``.
        number: Its number among those of its role.
        alive: Whether it has joined and was not lost since.
        device: Name of its device.
        cost: c_i, seconds a sample over the short window, fixed cost taken off; None while nothing was reported.
        fixed: a_i, seconds a micro-batch.
        seconds: Mean seconds of a step over the short window; None while nothing was reported.
        steps: Steps counted since it joined, those skipped at the beginning not among them.
        persistence: p_i, share of the long window during which it was slow, in [0, 1].
        slow_seconds: How long it has been slow without a break; 0 if it is not.
        restarts: How often it was restarted on purpose.
        restarting: Whether that is going on.
        restartable: Whether it may be restarted now: alive, not too often and not too recently, its errors could pass by
            themselves, and earlier restarts were of use.
    """

    node: str
    number: int
    alive: bool
    device: str
    cost: float | None
    fixed: float
    seconds: float | None
    steps: int
    persistence: float
    slow_seconds: float
    restarts: int
    restarting: bool
    restartable: bool


@dataclass(frozen=True)
class ClusterView:
    """The whole cluster at one time.

    Attributes:
        workers: In the order of their ranks.
        servers: Parameter servers, if any.
        batch: B_i now.
        cap: Most samples of a micro-batch, worker by worker; None for no limit.
        global_batch: B.
        step: Optimizer steps so far.
        steps_since_plan: Of these, with the current batches.
        remaining: Samples that are left to train; None if not known.
        throughput: Samples a second of all workers over the short window; None while nothing was reported.
        step_seconds: Mean seconds of a step, waiting included, over the short window; None while nothing was reported.
        restart_seconds: R, what a restart takes.
        restart_success: Probability that a restart helps, from those that were seen.
        group_restart: Whether a restart of one worker stops all of them.
        max_restarts_now: How many nodes may be told to restart now.
        busy: Whether new nodes wait long to be scheduled.
        ready: Kinds of actions that may be taken now: not in flight, cooled down.
        cap_changed: A cap was lowered after lack of memory: batches must be solved anew.
        moments: Of the workers, for a fit over several: a column for each field of `Moments`.
    """

    workers: tuple[NodeView, ...]
    servers: tuple[NodeView, ...]
    batch: tuple[int, ...]
    cap: tuple[int | None, ...]
    global_batch: int
    step: int
    steps_since_plan: int
    remaining: int | None
    throughput: float | None
    step_seconds: float | None
    restart_seconds: float
    restart_success: float
    group_restart: bool
    max_restarts_now: int
    busy: bool
    ready: frozenset[str]
    cap_changed: bool = False
    moments: tuple[tuple[float, ...], ...] = ()

    @property
    def horizon(self) -> float | None:
        """H, seconds that the job takes from now on at its present speed; None if not known."""
        if self.remaining is None or not self.throughput:
            return None
        return self.remaining / self.throughput

    def moments_of(self, numbers: Iterable[int]) -> Moments:
        """Of several workers together, as if they were one."""
        return Moments.sum(Moments(*(column[number] for column in self.moments)) for number in numbers)

    def costs(self) -> tuple[list[float], list[float]] | None:
        """Fixed seconds and seconds a sample of all workers; those that are silent get the median. None if all are."""
        known = [worker.cost for worker in self.workers if worker.cost is not None]
        if not known:
            return None
        cost = statistics.median(known)
        fixed = statistics.median(worker.fixed for worker in self.workers if worker.cost is not None)
        return (
            [fixed if worker.cost is None else worker.fixed for worker in self.workers],
            [cost if worker.cost is None else worker.cost for worker in self.workers],
        )


def step_seconds(fixed: Sequence[float], cost: Sequence[float], batch: Sequence[int], cap: Sequence[int | None]) -> list[float]:
    """T_i = C_i a_i + c_i n_i of each worker, ``C_i = ceil(n_i / cap_i)``."""
    return [
        (1 if limit is None else max(1, -(-n // limit))) * a + c * n
        for a, c, n, limit in zip(fixed, cost, batch, cap, strict=True)
    ]
