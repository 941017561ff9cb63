"""Straggler logic on top of the controller: from what is known of a cluster to what should be done (sections 2.3 to 2.6).

A solution reads no clock, draws no random numbers and keeps only what is in its ``state_dict``, so that a simulator drives the
same object as a job.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from strategies.antdt.control.actions import Action, AdjustBatch, AdjustLR, BackupWorkers, KillRestart
from strategies.antdt.control.affine import fit
from strategies.antdt.control.cluster_view import ClusterView, NodeView, step_seconds
from strategies.antdt.control.monitor import Windows
from strategies.antdt.control.restart_gate import server_restarts, worker_restarts
from strategies.antdt.control.solvers import balance, balance_micro
from zoo.base.hyperparameters import Configurable

__all__ = ["LBBSP", "AntDTDD", "AntDTND", "BackupWorkersSolution", "Oracle", "Solution", "StaticBSP"]


class Solution(Configurable, ABC):
    """Policy against stragglers. Derive from it to bring your own.

    The controller calls `decide` from time to time, and sees to it that at most one action for all workers is under way, that
    actions cool down, and that no node restarts too often.
    """

    #: Over what the controller's monitor looks.
    windows: Windows = Windows()

    @abstractmethod
    def decide(self, view: ClusterView, now: float) -> list[Action]:
        """Actions to take now; an empty list for none.

        Args:
            view: The cluster.
            now: Seconds.
        """

    def cooldowns(self) -> dict[str, float]:
        """Least time between two actions of a kind, in the unit of the windows."""
        return {AdjustBatch.kind: self.windows.transient, KillRestart.kind: self.windows.persistent}

    def state_dict(self) -> dict[str, Any]:
        """State that outlives the controller's process, as plain types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but is given some: {', '.join(state)}.")


class AntDTND(Solution):
    """AntDT for clusters that are shared with others (non-dedicated): balance at once, restart what stays slow.

    Workers: if the slowest takes more than ``lambda_transient`` times the mean, batches are solved anew, and taken if the slowest
    step gets shorter by ``min_gain``. Workers and servers that were slow during ``persistent_fraction`` of the long window are
    restarted, if that pays in what is left of the job.

    Args:
        lambda_transient: Slowest over mean from which on batches are solved anew.
        lambda_persistent: Times the median from which on a sub-sample counts as slow.
        persistent_fraction: Share of the long window from which on a node is restarted.
        window_transient: Length of the short window.
        window_persistent: Length of the long window.
        unit: Of the windows.
        min_gain: Least relative gain for which batches are changed.
        kill_restart: Whether nodes are restarted at all; otherwise only batches are balanced.
        cost_gate: Restart only what pays; otherwise everything persistent.
        min_local_batch: Least samples of a worker.
        min_steps: Steps that the short window spans at least.
        skip_steps: First steps of a process that do not count.

    Raises:
        ValueError: Numbers out of range.
    """

    def __init__(
        self,
        lambda_transient: float = 1.2,
        lambda_persistent: float = 1.5,
        persistent_fraction: float = 0.8,
        window_transient: float = 60.0,
        window_persistent: float = 300.0,
        unit: Literal["seconds", "steps"] = "seconds",
        min_gain: float = 0.05,
        kill_restart: bool = True,
        cost_gate: bool = True,
        min_local_batch: int = 1,
        min_steps: int = 20,
        skip_steps: int = 3,
    ) -> None:
        if lambda_transient < 1 or not 0 < persistent_fraction <= 1 or not 0 <= min_gain < 1 or min_local_batch < 0:
            raise ValueError(
                f"AntDTND: lambda_transient={lambda_transient} must be at least 1, persistent_fraction={persistent_fraction} in"
                f" (0, 1], min_gain={min_gain} in [0, 1), min_local_batch={min_local_batch} not negative."
            )
        self.windows = Windows(window_transient, window_persistent, unit, min_steps, lambda_persistent, skip_steps)
        self.lambda_transient, self.persistent_fraction, self.min_gain = lambda_transient, persistent_fraction, min_gain
        self.kill_restart, self.cost_gate, self.min_local_batch = kill_restart, cost_gate, min_local_batch
        self._restarts = 0

    def decide(self, view: ClusterView, now: float) -> list[Action]:
        """Balance; restart."""
        return [*self._balance(view), *self._restart(view)]

    def _balance(self, view: ClusterView) -> list[Action]:
        costs = view.costs()
        restarts = sum(worker.restarts for worker in view.workers)
        if costs is None or not (view.cap_changed or AdjustBatch.kind in view.ready):
            return []
        fixed, cost = costs
        times = step_seconds(fixed, cost, view.batch, view.cap)
        slowest, mean = max(times), math.fsum(times) / len(times)
        # Whoever was restarted is quick again, but has the batch of a slow one until batches are solved anew.
        back = all(w.steps >= self.windows.min_steps and not w.restarting for w in view.workers if w.restarts)
        moved = restarts > self._restarts and back
        if not (view.cap_changed or moved or slowest > self.lambda_transient * mean):
            return []
        batch = bounded_balance(fixed, cost, view, self.min_local_batch)
        after = max(step_seconds(fixed, cost, batch, view.cap))
        gain = 1 - after / slowest
        if not (view.cap_changed or (moved and gain > 0) or gain >= self.min_gain):
            return []
        self._restarts = restarts
        why = "a cap was lowered" if view.cap_changed else f"the slowest step {slowest:.3g} s, the mean {mean:.3g} s"
        return [AdjustBatch(tuple(batch), view.cap, f"{why}: balanced {after:.3g} s")]

    def _restart(self, view: ClusterView) -> list[Action]:
        if not self.kill_restart or view.busy or KillRestart.kind not in view.ready or view.max_restarts_now < 1:
            return []
        chosen: list[NodeView] = []
        for nodes, gate in ((view.workers, worker_restarts), (view.servers, server_restarts)):
            bad = [node for node in nodes if node.restartable and node.persistence >= self.persistent_fraction]
            bad.sort(key=lambda node: (-((node.seconds if node.node.startswith("server") else node.cost) or 0.0), node.number))
            bad = bad[: view.max_restarts_now - len(chosen)]
            if bad:
                chosen += bad[: gate(view, bad, self.min_local_batch)] if self.cost_gate else bad
        return [
            KillRestart(
                node.node, f"slow during {node.persistence:.0%} of the last {self.windows.persistent:g} {self.windows.unit}"
            )
            for node in chosen
        ]

    def state_dict(self) -> dict[str, Any]:
        """Number of restarts that the present batches account for."""
        return {"restarts": self._restarts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._restarts = int(state["restarts"])


class AntDTDD(Solution):
    """AntDT for mixed devices of one's own (dedicated): batches and micro-batches for each class of devices, once.

    What a class can do does not change, so that batches are solved after a warm-up; once more when batches of two sizes have
    told the cost of a micro-batch from that of a sample; and again only if a class drifts from what was predicted.

    Args:
        warmup_steps: Steps that are measured before batches are solved, and after that before they are refined.
        skip_steps: First steps, which are not measured.
        drift: Relative deviation of a class's seconds from what was predicted, from which on batches are solved anew.
        classes: What makes a class: the device's name, or similar seconds a sample.
        caps: Most samples of a micro-batch for each device name, instead of the job's (leave a tenth of the memory free).
        min_gain: Least relative gain for which batches are refined.
        similar: Seconds a sample in a class differ by this factor at most (``classes: cluster``).

    Raises:
        ValueError: Numbers out of range.
    """

    def __init__(
        self,
        warmup_steps: int = 20,
        skip_steps: int = 5,
        drift: float = 0.1,
        classes: Literal["device_name", "cluster"] = "device_name",
        caps: dict[str, int] | None = None,
        min_gain: float = 0.01,
        similar: float = 1.25,
    ) -> None:
        if warmup_steps < 1 or not drift > 0 or not similar > 1 or not 0 <= min_gain < 1:
            raise ValueError(
                f"AntDTDD: warmup_steps={warmup_steps} must be at least 1, drift={drift} positive, similar={similar} above 1,"
                f" min_gain={min_gain} in [0, 1)."
            )
        if classes not in ("device_name", "cluster"):
            raise ValueError(f"AntDTDD: classes={classes!r} must be device_name or cluster.")
        if any(cap < 1 for cap in (caps or {}).values()):
            raise ValueError(f"AntDTDD: caps={caps} must be at least 1.")
        self.windows = Windows(warmup_steps, max(warmup_steps, 30), "steps", 1, 1.5, skip_steps)
        self.warmup_steps, self.drift, self.classes, self.caps = warmup_steps, drift, classes, caps
        self.min_gain, self.similar = min_gain, similar
        self._solved = 0  # 1: from the seconds of equal batches; 2: with the cost of a micro-batch, if it is known
        self._lines: list[list[float]] = []  # of all workers: a, c
        self._members: list[str] = []

    def cooldowns(self) -> dict[str, float]:
        """The warm-up, measured by the solution itself."""
        return {AdjustBatch.kind: 0.0}

    def decide(self, view: ClusterView, now: float) -> list[Action]:
        """Solve when there is something new to know."""
        cap = self._caps(view)
        if view.cap_changed and self._lines:
            return self._solve(view, cap, self._lines, "a cap was lowered")
        measured = min((worker.steps for worker in view.workers), default=0)
        if AdjustBatch.kind not in view.ready or min(measured, view.steps_since_plan) < self.warmup_steps:
            return []
        members = [f"{worker.node} {worker.device}" for worker in view.workers]
        if members != self._members:
            self._solved, self._members = 0, members
        groups = self._groups(view)
        if self._solved < 2:
            self._solved += 1
            return self._solve(view, cap, self._fit(view, groups), ("warmed up", "refined")[self._solved - 1], self._solved == 2)
        drift = self._drift(view, groups, cap)
        if drift <= self.drift:
            return []
        self._solved = 1  # and refine that
        return self._solve(view, cap, self._fit(view, groups), f"a class has drifted by {drift:.0%}")

    def _solve(
        self, view: ClusterView, cap: Sequence[int | None], lines: list[list[float]], why: str, refine: bool = False
    ) -> list[Action]:
        fixed, cost = [a for a, _ in lines], [c for _, c in lines]
        low = [min(1, view.global_batch // len(cost))] * len(cost)
        batch, micros = balance_micro(fixed, cost, cap, view.global_batch, low)
        before = max(step_seconds(fixed, cost, view.batch, cap))
        after = max(step_seconds(fixed, cost, batch, cap))
        self._lines = lines
        if tuple(cap) == view.cap and (tuple(batch) == view.batch or (refine and 1 - after / before < self.min_gain)):
            return []
        shapes = ", ".join(f"{n} in {c}" for n, c in dict.fromkeys(zip(batch, micros, strict=True)))
        return [AdjustBatch(tuple(batch), tuple(cap), f"{why}: samples in micro-batches {shapes}; predicted {after:.3g} s")]

    def _caps(self, view: ClusterView) -> tuple[int | None, ...]:
        """The job's, or the device's where that is smaller; the job's are lowered after lack of memory."""
        if self.caps is None:
            return view.cap
        own = [self.caps.get(worker.device) for worker in view.workers]
        return tuple(
            mine if theirs is None else theirs if mine is None else min(mine, theirs)
            for mine, theirs in zip(own, view.cap, strict=True)
        )

    def _groups(self, view: ClusterView) -> list[list[int]]:
        """Workers of each class, by their numbers."""
        groups: dict[Any, list[int]] = {}
        if self.classes == "device_name":
            for worker in view.workers:
                groups.setdefault(worker.device, []).append(worker.number)
            return list(groups.values())
        _, cost = view.costs() or ([], [1.0] * len(view.workers))
        begin = 0.0
        for number in sorted(range(len(cost)), key=lambda i: (cost[i], i)):
            begin = begin if groups and cost[number] <= self.similar * begin else cost[number]
            groups.setdefault(begin, []).append(number)
        return list(groups.values())

    def _fit(self, view: ClusterView, groups: Sequence[Sequence[int]]) -> list[list[float]]:
        """Lines of all workers, one for each class."""
        lines: list[list[float]] = [[] for _ in view.workers]
        _, cost = view.costs() or ([], [1.0] * len(view.workers))
        for group in groups:
            moments = view.moments_of(group)
            line = fit(moments)
            if line is not None and line.fixed > 2 * line.fixed_error:
                found = [line.fixed, line.cost]
            elif moments.nn:
                found = [0.0, moments.nt / moments.nn]
            else:
                found = [0.0, math.fsum(cost[number] for number in group) / len(group)]
            for number in group:
                lines[number] = found
        return lines

    def _drift(self, view: ClusterView, groups: Sequence[Sequence[int]], cap: Sequence[int | None]) -> float:
        """Largest relative deviation of a class's measured seconds from those predicted."""
        predicted = step_seconds([a for a, _ in self._lines], [c for _, c in self._lines], view.batch, cap)
        largest = 0.0
        for group in groups:
            pairs = [(seconds, predicted[i]) for i in group if (seconds := view.workers[i].seconds) is not None]
            if pairs:
                largest = max(largest, abs(sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs) - 1))
        return largest

    def state_dict(self) -> dict[str, Any]:
        """Record of a solution and its inputs."""
        return {"solved": self._solved, "lines": self._lines, "members": self._members}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._solved, self._members = int(state["solved"]), list(state["members"])
        self._lines = [list(line) for line in state["lines"]]


class LBBSP(Solution):
    """Balancing alone: batches in proportion to speed at every decision, speeds smoothed (LB-BSP, arXiv 1806.02508).

    Args:
        smoothing: Weight of the newest measurement in the predicted speed, in (0, 1].
        window: Seconds or steps over which it is measured.
        unit: Of the window.
        min_local_batch: Least samples of a worker.
        skip_steps: First steps of a process that do not count.

    Raises:
        ValueError: A smoothing out of range.
    """

    def __init__(
        self,
        smoothing: float = 0.5,
        window: float = 10.0,
        unit: Literal["seconds", "steps"] = "seconds",
        min_local_batch: int = 1,
        skip_steps: int = 3,
    ) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"LBBSP: smoothing={smoothing} must lie in (0, 1].")
        self.windows = Windows(window, max(window, 30.0), unit, 1, 1.5, skip_steps)
        self.smoothing, self.min_local_batch = smoothing, min_local_batch
        self._speeds: list[float] = []

    def cooldowns(self) -> dict[str, float]:
        """None: at every decision."""
        return {AdjustBatch.kind: 0.0}

    def decide(self, view: ClusterView, now: float) -> list[Action]:
        """Batches in proportion to the predicted speeds."""
        costs = view.costs()
        if costs is None:
            return []
        # As LB-BSP has it, without fixed costs: samples a second of the batch at hand.
        times = step_seconds(*costs, view.batch, view.cap)
        speeds = [max(n, 1) / t for n, t in zip(view.batch, times, strict=True)]
        if len(self._speeds) == len(speeds):
            w = self.smoothing
            speeds = [w * new + (1 - w) * old for new, old in zip(speeds, self._speeds, strict=True)]
        self._speeds = speeds
        if not (view.cap_changed or AdjustBatch.kind in view.ready):
            return []
        batch = bounded_balance([0.0] * len(speeds), [1 / v for v in speeds], view, self.min_local_batch)
        return [] if tuple(batch) == view.batch else [AdjustBatch(tuple(batch), view.cap, "in proportion to speed")]

    def state_dict(self) -> dict[str, Any]:
        """The predicted speeds."""
        return {"speeds": self._speeds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._speeds = list(state["speeds"])


class StaticBSP(Solution):
    """Equal batches, everybody waits for everybody: plain data parallelism."""

    def decide(self, view: ClusterView, now: float) -> list[Action]:
        """Nothing."""
        return []


class BackupWorkersSolution(Solution):
    """Equal batches; a step takes the first W - b gradients and drops the rest (parameter servers only).

    Args:
        count: b.
        lr_rule: How the learning rate follows the samples of a step: ``linear`` for SGD, ``sqrt`` for Adam; None: not at all.

    Raises:
        ValueError: A negative count, or an unknown rule.
    """

    def __init__(self, count: int, lr_rule: Literal["linear", "sqrt"] | None = "linear") -> None:
        if count < 0:
            raise ValueError(f"BackupWorkersSolution: count={count} must not be negative.")
        if lr_rule not in (None, "linear", "sqrt"):
            raise ValueError(f"BackupWorkersSolution: lr_rule={lr_rule!r} must be linear, sqrt or null.")
        self.count, self.lr_rule = count, lr_rule
        self._said = 0

    def cooldowns(self) -> dict[str, float]:
        """None."""
        return {}

    def decide(self, view: ClusterView, now: float) -> list[Action]:
        """Once the number of backup workers, then the learning rate."""
        if self._said == 0 and BackupWorkers.kind in view.ready and self.count:
            if self.count >= len(view.workers):
                raise ValueError(f"BackupWorkersSolution: count={self.count} must be less than the {len(view.workers)} workers.")
            self._said = 1
            return [BackupWorkers(self.count, f"{self.count} of {len(view.workers)} gradients are not waited for")]
        if self._said == 1 and AdjustLR.kind in view.ready and self.lr_rule is not None:
            self._said = 2
            share = 1 - self.count / len(view.workers)
            factor = share if self.lr_rule == "linear" else math.sqrt(share)
            return [AdjustLR(factor, f"steps average over {share:.1%} of the samples")]
        return []

    def state_dict(self) -> dict[str, Any]:
        """The text of the record."""
        return {"said": self._said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._said = int(state["said"])


class Oracle(Solution):
    """Balancing with the true seconds a sample, which only an experimenter knows: the bound for the others.

    Args:
        cost: True c_i.
        fixed: True a_i; None for none.
        min_local_batch: Least samples of a worker.
    """

    def __init__(self, cost: list[float], fixed: list[float] | None = None, min_local_batch: int = 1) -> None:
        self.cost, self.fixed, self.min_local_batch = cost, fixed, min_local_batch

    def cooldowns(self) -> dict[str, float]:
        """None."""
        return {}

    def reveal(self, cost: Sequence[float]) -> None:
        """The truth has changed (a simulator tells it)."""
        self.cost = list(cost)

    def decide(self, view: ClusterView, now: float) -> list[Action]:
        """The best batches."""
        if not (view.cap_changed or AdjustBatch.kind in view.ready):
            return []
        if len(self.cost) != len(view.workers):
            raise ValueError(f"Oracle: cost is for {len(self.cost)} workers, there are {len(view.workers)}.")
        batch = bounded_balance(self.fixed or [0.0] * len(self.cost), self.cost, view, self.min_local_batch)
        return [] if tuple(batch) == view.batch else [AdjustBatch(tuple(batch), view.cap, "from the true costs")]


def bounded_balance(fixed: Sequence[float], cost: Sequence[float], view: ClusterView, min_local_batch: int) -> list[int]:
    """`balance` within the caps, if they together hold the global batch; else micro-batches make room for more."""
    total, count = view.global_batch, len(cost)
    low = [min(min_local_batch, total // count)] * count
    caps = [total if cap is None else cap for cap in view.cap]
    high = [max(cap, least) for cap, least in zip(caps, low, strict=True)]
    return balance(fixed, cost, total, low, high if sum(high) >= total else [None] * count)
