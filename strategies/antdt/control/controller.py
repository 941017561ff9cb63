"""From measurements to numbered decisions: the monitor, a solution, and what keeps its actions apart (section 2.3).

No clock, no random numbers, no input or output: the service and the simulator tell it what time it is, and drive the same object.
"""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from strategies.antdt.control.actions import Action, AdjustBatch, AdjustLR, BackupWorkers, KillRestart, NoAction, Versioned
from strategies.antdt.control.cluster_view import ClusterView, NodeView, step_seconds
from strategies.antdt.control.failures import classify, describe
from strategies.antdt.control.monitor import Monitor, Sample, Statistics, medians
from strategies.antdt.control.solutions import Solution

__all__ = ["Controller", "Sample"]

OOM_FACTOR = 0.8  # of a micro-batch for which the memory was too small
CONCURRENT_RESTARTS = 0.05  # of the nodes
USELESS_RESTARTS = 2  # in a row, after which a node is left alone
R_SMOOTHING = 0.3  # weight of a new restart in the running mean of R


@dataclass
class _Node:
    """Facts about a node beside its measurements.

    Attributes:
        role: ``worker``, ``server`` or ``spare``.
        index: Among those.
        alive: Whether it has joined and was not lost.
        device: Name of its device.
        host: Where it runs.
        pid: Its process.
        restarts: Restarts on purpose.
        useless: Of these the last ones in a row after which it was slow again.
        killed_at: Seconds when it was told to restart; None if it is not restarting.
        restarted_at: When its last restart was over, in the unit of the windows.
        judged: Whether that restart was found useful or not.
        retryable: Whether its last error might pass.
        last_cost: Seconds a sample before its last restart, which hold until there are new ones.
    """

    role: str
    index: int
    alive: bool = False
    device: str = ""
    host: str = ""
    pid: int | None = None
    restarts: int = 0
    useless: int = 0
    killed_at: float | None = None
    restarted_at: float | None = None
    judged: bool = True
    retryable: bool = True
    last_cost: float | None = None


class Controller:
    """Decides for a job.

    Args:
        solution: The straggler logic.
        world_size: W, workers.
        global_batch: B, samples of a step, the same whatever is decided.
        caps: Most samples of a worker's micro-batch, one for all or each; None for no limit.
        decide_every: Seconds between decisions, or steps if the solution's windows are in steps.
        group_restart: Whether a restart of one worker stops all of them (torchrun), or only that one (parameter servers).
        restart_cost: R, seconds of a restart, as long as none was seen.
        max_restarts_per_node: Restarts on purpose of one node.
        busy: Whether new nodes wait long to be scheduled, so that none is restarted.

    Raises:
        ValueError: Numbers out of range.

    Example:
        >>> from strategies.antdt.control.solutions import AntDTND
        >>> solution = AntDTND(window_transient=5, window_persistent=20, unit="steps", min_steps=1, skip_steps=0)
        >>> controller = Controller(solution, world_size=4, global_batch=64, decide_every=5)
        >>> for step in range(10):
        ...     for rank in range(4):
        ...         seconds = 16 * (0.008 if rank == 3 else 0.002)
        ...         controller.report(f"worker:{rank}", [Sample(step, 16, 0.0, seconds, 0.128)], now=0.128 * step)
        >>> controller.progress(remaining_samples=10_000, step=10)
        >>> [decision.action.batch for decision in controller.tick(now=1.28)]
        [(20, 20, 20, 4)]
    """

    def __init__(
        self,
        solution: Solution,
        *,
        world_size: int,
        global_batch: int,
        caps: int | Sequence[int | None] | None = None,
        decide_every: float = 10.0,
        group_restart: bool = True,
        restart_cost: float = 60.0,
        max_restarts_per_node: int = 3,
        busy: bool = False,
    ) -> None:
        if world_size < 1 or global_batch < 1 or not decide_every > 0 or restart_cost < 0 or max_restarts_per_node < 0:
            raise ValueError(
                f"Controller: world_size={world_size} and global_batch={global_batch} must be at least 1,"
                f" decide_every={decide_every} positive, restart_cost={restart_cost} and"
                f" max_restarts_per_node={max_restarts_per_node} not negative."
            )
        limits = [caps] * world_size if caps is None or isinstance(caps, int) else list(caps)
        if len(limits) != world_size or any(cap is not None and cap < 1 for cap in limits):
            raise ValueError(
                f"Controller: caps={caps} must be one number of at least 1, or one for each of {world_size} workers."
            )
        self.solution, self.world_size, self.global_batch = solution, world_size, global_batch
        self.decide_every, self.group_restart, self.max_restarts_per_node = decide_every, group_restart, max_restarts_per_node
        self.busy = busy
        #: Seconds of a restart, a running mean.
        self.restart_seconds = restart_cost
        #: Why the job cannot go on, if an error was reported that no restart cures.
        self.failure: str | None = None
        self._unit = solution.windows.unit
        self._nodes: dict[str, _Node] = {f"worker:{i}": _Node("worker", i) for i in range(world_size)}
        self._monitors = {"worker": Monitor(world_size, solution.windows), "server": Monitor(0, solution.windows)}
        self._version = 0
        even = [global_batch // world_size + (rank < global_batch % world_size) for rank in range(world_size)]
        self._plan = Versioned(0, AdjustBatch(tuple(even), tuple(limits)), "equal")
        self._latest: dict[str, Versioned] = {}  # of each global kind, for those that come later
        self._unapplied: list[Versioned] = []  # global decisions since the one that is in force everywhere
        self._kills: dict[str, Versioned] = {}  # under way
        self._pending: int | None = None
        self._joined_since: set[str] = set()
        self._cooled: dict[str, float] = {}  # kind: when its next may come, in the unit of the windows
        self._cap_changed = False
        self._decided: float | None = None
        self._useful = self._useless = 0
        self._remaining: int | None = None
        self._step = self._plan_step = 0
        self._now = 0.0
        self._shift = 0.0
        self._resumed = False
        self._events: list[dict[str, Any]] = []
        self._last_reason = ""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Controller":
        """Build the controller that a job asks for.

        Args:
            settings: ``solution`` (``class_path`` and ``init_args``), ``world_size``, ``global_batch``, ``caps``, and
                ``controller`` with further options of this class.

        Raises:
            ImportError: There is no such class.
            TypeError: It is no `Solution`, or an argument is unknown.
            ValueError: Numbers out of range.
        """
        path = str(settings["solution"]["class_path"])
        module, _, name = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as cause:
            raise ImportError(f"there is no solution {path}: {cause}") from cause
        if not (isinstance(found, type) and issubclass(found, Solution)):
            raise TypeError(f"{path} is no strategies.antdt.control.solutions.Solution: derive it from that class.")
        return cls(
            found(**settings["solution"].get("init_args", {})),
            world_size=settings["world_size"],
            global_batch=settings["global_batch"],
            caps=settings.get("caps"),
            **settings.get("controller", {}),
        )

    # ---- what nodes tell ----------------------------------------------------------------------------------------------

    def join(self, node: str, now: float, *, device: str = "", pid: int | None = None, host: str = "") -> None:
        """A node's process has started.

        Args:
            node: ``worker:3``, ``server:0``.
            now: Seconds.
            device: Name of its device.
            pid: Its process.
            host: Where it runs.
        """
        self._tell_time(now)
        known = self._node(node)
        if known.role in self._monitors:
            monitor = self._monitors[known.role]
            if known.killed_at is not None:
                monitor.forget(known.index, device)
            else:
                monitor.started(known.index, device)
        known.alive, known.device, known.pid, known.host, known.retryable = True, device or known.device, pid, host, True
        self._kills.pop(node, None)
        self._joined_since.add(node)
        workers = {name for name, each in self._nodes.items() if each.role == "worker"}
        if self._pending is not None and workers <= self._joined_since:
            self.applied(self._pending, self._step, now)  # a new group starts with the newest plan

    def report(
        self,
        node: str,
        samples: Sequence[Sequence[Any]],
        now: float,
        *,
        node_state: Mapping[str, Any] | None = None,
        errors: Iterable[Any] = (),
    ) -> None:
        """Take a node's measurements since its last report.

        Args:
            node: ``worker:3``, ``server:0``.
            samples: Of its steps, the newest last: `Sample` or its numbers in the same order.
            now: Seconds.
            node_state: ``{"alive": False}`` for one that is lost.
            errors: What went wrong there, as text or ``{"kind", "message"}``.
        """
        measured_at = self._tell_time(now)
        known = self._node(node)
        if known.role in self._monitors and samples:
            steps = [Sample(*sample[:5]) for sample in samples]
            cap = self._plan_cap[known.index] if known.role == "worker" and known.index < self.world_size else None
            self._monitors[known.role].add(known.index, steps, cap, measured_at)
            self._step = max(self._step, steps[-1].step + 1)
            known.alive = True
            if known.killed_at is not None and node not in self._kills:
                self._restart_over(known, measured_at - sum(step.t_wall for step in steps))
        for error in errors:
            self._failed(node, known, error)
        if node_state is not None and not node_state.get("alive", True):
            known.alive = False

    def report_step(
        self, role: str, counts: Sequence[int], micros: Sequence[int], taken: Sequence[float], wall: float, now: float
    ) -> None:
        """Take the measurements of all nodes of a role in one step: `report` for each, for simulations of many.

        Args:
            role: ``worker`` or ``server``.
            counts: n_i; 0 of those that were absent.
            micros: C_i.
            taken: T_i, seconds.
            wall: Seconds of the step.
            now: When it ended.
        """
        self._tell_time(now)
        at = self._now if self._unit == "seconds" else float(self._step)
        self._monitors[role].add_step(counts, micros, taken, wall, at)
        if role == "worker":
            self._step += 1
        for node in self._restarting():
            if node.role == role and counts[node.index] and f"{role}:{node.index}" not in self._kills:
                self._restart_over(node, self._now - wall)

    def progress(self, remaining_samples: int, step: int) -> None:
        """Take the progress of the job.

        Args:
            remaining_samples: Left to train.
            step: Optimizer steps so far.
        """
        self._remaining, self._step = remaining_samples, step

    def applied(self, version: int, step: int, now: float) -> None:
        """All workers have put into force what was decided up to a version.

        Args:
            version: Of the decision.
            step: From which on.
            now: Seconds.
        """
        self._tell_time(now)
        for decision in self._unapplied:
            if decision.version <= version:
                if decision.kind == AdjustBatch.kind:
                    self._plan_step = step
                self._cool(decision.kind)
        self._unapplied = [decision for decision in self._unapplied if decision.version > version]
        if self._pending is not None and version >= self._pending:
            self._pending = None

    # ---- decisions ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Versioned]:
        """Decide, if it is time to.

        Args:
            now: Seconds.

        Returns:
            New decisions.

        Raises:
            ValueError: The solution's batches do not sum to the global batch, or are not one for each worker.
        """
        self._tell_time(now)
        clock = self._clock()
        due = self._decided is None or clock - self._decided >= self.decide_every * (1 - 1e-9)
        if self.failure is not None or not (due or self._cap_changed):
            return []
        self._decided = clock
        for monitor in self._monitors.values():
            monitor.advance(clock)
        view = self.view(now)
        self._judge_restarts(clock, view)
        wanted = self.solution.decide(view, self._now)
        chosen = self._arbitrate(wanted, view)
        if self._cap_changed and not any(isinstance(action, AdjustBatch) for action in chosen):
            chosen = [AdjustBatch(view.batch, view.cap, "a cap was lowered")]
        self._cap_changed = False
        if not chosen:
            self._note_nothing(wanted, view)
        return [self._decide(action, view) for action in chosen]

    def _arbitrate(self, wanted: Sequence[Action], view: ClusterView) -> list[Action]:
        """Actions for nodes while there is none for all under way, and one for all."""
        chosen: list[Action] = []
        nodes = {node.node: node for node in (*view.workers, *view.servers)}
        for action in wanted:
            if isinstance(action, KillRestart) and action.kind in view.ready and len(chosen) < view.max_restarts_now:
                if action.node not in nodes:
                    raise ValueError(f"{type(self.solution).__name__} wants to restart {action.node!r}, which there is not.")
                if nodes[action.node].restartable:
                    chosen.append(action)
        for action in wanted:
            if isinstance(action, AdjustBatch):
                self._check_batch(action)
                if action.batch == view.batch and action.cap == view.cap and not view.cap_changed:
                    continue
            if isinstance(action, AdjustBatch | AdjustLR | BackupWorkers) and (action.kind in view.ready or view.cap_changed):
                return [*chosen, action]
        return chosen

    def _check_batch(self, action: AdjustBatch) -> None:
        if len(action.batch) != self.world_size or sum(action.batch) != self.global_batch:
            raise ValueError(
                f"{type(self.solution).__name__} gave batches for {len(action.batch)} workers with {sum(action.batch)} samples"
                f" in all; they must be for {self.world_size} with {self.global_batch}."
            )

    def _decide(self, action: Action, view: ClusterView) -> Versioned:
        self._version += 1
        decision = Versioned(self._version, action, action.reason)
        if isinstance(action, KillRestart):
            node = self._nodes[action.node]
            node.restarts += 1
            node.killed_at, node.judged = self._now, False
            nodes = view.workers if node.role == "worker" else view.servers
            node.last_cost = nodes[node.index].cost
            self._kills[action.node] = decision
            self._cool(decision.kind)
        else:
            self._pending = decision.version
            self._joined_since.clear()
            self._latest[decision.kind] = decision
            self._unapplied.append(decision)
            if isinstance(action, AdjustBatch):
                self._plan = decision
        self._log(decision, view)
        return decision

    def actions_after(self, version: int, node: str) -> list[Versioned]:
        """Decisions that a node has not put into force, oldest first.

        Args:
            version: The newest in force there.
            node: ``worker:3``; decisions for other nodes are not among them.
        """
        found = {decision.version: decision for decision in (*self._unapplied, *self._latest.values())}
        if node in self._kills:
            found[self._kills[node].version] = self._kills[node]
        return [found[number] for number in sorted(found) if number > version]

    @property
    def version(self) -> int:
        """Number of decisions so far."""
        return self._version

    @property
    def plan(self) -> dict[str, Any]:
        """``{"version", "batch", "cap"}``: the newest batches, and the number of the decision that made them."""
        return {"version": self._plan.version, "batch": list(self._plan_batch), "cap": list(self._plan_cap)}

    @property
    def events(self) -> list[dict[str, Any]]:
        """The log of decisions: ``{t, step, version, action, payload, reason, metrics}``, plain types."""
        return self._events

    @property
    def _plan_batch(self) -> tuple[int, ...]:
        assert isinstance(self._plan.action, AdjustBatch)
        return self._plan.action.batch

    @property
    def _plan_cap(self) -> tuple[int | None, ...]:
        assert isinstance(self._plan.action, AdjustBatch)
        return self._plan.action.cap

    # ---- what the solution sees ---------------------------------------------------------------------------------------

    def view(self, now: float) -> ClusterView:
        """The cluster as it is now."""
        self._tell_time(now)
        clock = self._clock()
        found = {role: monitor.statistics(clock) for role, monitor in self._monitors.items()}
        views = {role: self._node_views(role, found[role], clock) for role in found}
        allowed = math.ceil(CONCURRENT_RESTARTS * sum(map(len, views.values())))
        return ClusterView(
            workers=views["worker"],
            servers=views["server"],
            batch=self._plan_batch,
            cap=self._plan_cap,
            global_batch=self.global_batch,
            step=self._step,
            steps_since_plan=self._step - self._plan_step,
            remaining=self._remaining,
            throughput=found["worker"].rate,
            step_seconds=found["worker"].wall,
            restart_seconds=self.restart_seconds,
            restart_success=(self._useful + 2) / (self._useful + self._useless + 2),
            group_restart=self.group_restart,
            max_restarts_now=max(0, allowed - len(self._restarting())),
            busy=self.busy,
            ready=self._ready(clock),
            cap_changed=self._cap_changed,
            moments=self._monitors["worker"].columns(),
        )

    def _node_views(self, role: str, found: Statistics, clock: float) -> tuple[NodeView, ...]:
        unit = 1.0 if self._unit == "seconds" else found.wall or 0.0  # seconds of it
        names = [f"{role}:{index}" for index in range(len(found.cost))]
        nodes = [self._nodes[name] for name in names]
        return tuple(
            map(
                NodeView,
                names,
                range(len(nodes)),
                [node.alive for node in nodes],
                [node.device for node in nodes],
                [node.last_cost if cost is None else cost for cost, node in zip(found.cost, nodes, strict=True)],
                found.fixed,
                found.seconds,
                found.steps,
                found.persistence,
                [slow * unit for slow in found.slow_for],
                [node.restarts for node in nodes],
                [node.killed_at is not None for node in nodes],
                [self._restartable(node, clock) for node in nodes],
            )
        )

    def _restartable(self, node: _Node, clock: float) -> bool:
        return (
            node.alive
            and node.retryable
            and node.killed_at is None
            and node.restarts < self.max_restarts_per_node
            and node.useless < USELESS_RESTARTS
            and (node.restarted_at is None or clock - node.restarted_at >= 2 * self.solution.windows.persistent)
        )

    def _ready(self, clock: float) -> frozenset[str]:
        if self._pending is not None:
            return frozenset()
        kinds = (AdjustBatch.kind, AdjustLR.kind, BackupWorkers.kind, KillRestart.kind)
        return frozenset(kind for kind in kinds if clock >= self._cooled.get(kind, -math.inf))

    # ---- nodes --------------------------------------------------------------------------------------------------------

    def _node(self, name: str) -> _Node:
        if name not in self._nodes:
            role, _, number = name.partition(":")
            if role not in ("worker", "server", "spare") or not number.isdecimal():
                raise ValueError(f"{name!r} is no node: they are called worker:0, server:0 or spare:0, and so on.")
            if role == "worker" and int(number) >= self.world_size:
                raise ValueError(f"{name}: the job has {self.world_size} workers, worker:0 to worker:{self.world_size - 1}.")
            if role == "server":
                for index in range(self._monitors["server"].size, int(number) + 1):
                    self._nodes[f"server:{index}"] = _Node("server", index)
                self._monitors["server"].grow(int(number) + 1)
            else:
                self._nodes[name] = _Node(role, int(number))
        return self._nodes[name]

    def _restarting(self) -> list[_Node]:
        return [node for node in self._nodes.values() if node.killed_at is not None]

    def _restart_over(self, node: _Node, since: float) -> None:
        """A restarted node works again, since a time."""
        assert node.killed_at is not None
        taken = max(since - node.killed_at, 0.0)
        self.restart_seconds += R_SMOOTHING * (taken - self.restart_seconds)
        node.killed_at, node.restarted_at = None, self._clock()

    def _judge_restarts(self, clock: float, view: ClusterView) -> None:
        """Find out whether a restart was of use: whether the node was quick in the first short window thereafter.

        Later, slowness could have ended by itself, or begun anew.
        """
        wait = self.solution.windows.transient + self.solution.windows.width
        for nodes in (view.workers, view.servers):
            due = [
                seen
                for seen in nodes
                if (node := self._nodes[seen.node]).killed_at is None
                and not node.judged
                and node.restarted_at is not None
                and clock - node.restarted_at >= wait
                and seen.steps
            ]
            usual = medians([node.cost for node in nodes], [node.device for node in nodes]) if due else {}
            for seen in due:
                node = self._nodes[seen.node]
                node.judged = True
                if (seen.cost or 0.0) > self.solution.windows.slow_factor * usual[seen.device]:
                    node.useless, self._useless = node.useless + 1, self._useless + 1
                else:
                    node.useless, self._useful = 0, self._useful + 1

    def _failed(self, name: str, node: _Node, error: Any) -> None:
        what, text = classify(error), f"{name}: {describe(error)}"
        if what == "memory" and node.role == "worker":
            cap = self._plan_cap[node.index]
            tried = self._plan_batch[node.index] if cap is None else min(cap, self._plan_batch[node.index])
            if tried > 1:
                lowered = max(1, int(OOM_FACTOR * tried))
                caps = (*self._plan_cap[: node.index], lowered, *self._plan_cap[node.index + 1 :])
                self._plan = replace(self._plan, action=AdjustBatch(self._plan_batch, caps))
                self._cap_changed = True
                return
            what, text = "unretryable", f"{text} (with one sample)"
        node.retryable = what == "retryable"
        if what == "unretryable" and self.failure is None:
            self.failure = f"{text}: another attempt would end the same way."
            self._events.append(
                {"t": self._now, "step": self._step, "version": self._version, "action": "FAIL", "payload": {"node": name},
                 "reason": self.failure, "metrics": {}}
            )  # fmt: skip

    # ---- time ---------------------------------------------------------------------------------------------------------

    def _tell_time(self, now: float) -> float:
        """Seconds as this controller counts them; they go on where they were when its process, and so its clock, is replaced."""
        if self._resumed:
            self._shift, self._resumed = max(self._now - now, 0.0), False
        self._now = max(self._now, now + self._shift)
        return now + self._shift

    def _clock(self) -> float:
        return self._now if self._unit == "seconds" else float(self._step)

    def _cool(self, kind: str) -> None:
        self._cooled[kind] = self._clock() + self.solution.cooldowns().get(kind, 0.0)

    # ---- log and state ------------------------------------------------------------------------------------------------

    def _log(self, decision: Versioned, view: ClusterView) -> None:
        self._events.append({"t": self._now, "step": self._step, **decision.to_json(), "metrics": self._metrics(view)})
        self._last_reason = ""

    def _note_nothing(self, wanted: Sequence[Action], view: ClusterView) -> None:
        """A solution's reason for doing nothing is logged once, not at each decision."""
        reason = next((action.reason for action in wanted if isinstance(action, NoAction)), "")
        if reason and reason != self._last_reason:
            self._log(Versioned(self._version, NoAction(), reason), view)
            self._last_reason = reason

    def _metrics(self, view: ClusterView) -> dict[str, float | None]:
        costs = view.costs()
        times = [] if costs is None else step_seconds(*costs, view.batch, view.cap)
        return {
            "slowest": max(times, default=None),
            "mean": math.fsum(times) / len(times) if times else None,
            "step_seconds": view.step_seconds,
            "throughput": view.throughput,
            "remaining": view.remaining,
            "restart_seconds": view.restart_seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it but the log, plain types."""
        return {
            "world_size": self.world_size,
            "global_batch": self.global_batch,
            "version": self._version,
            "plan": self._plan.to_json(),
            "latest": [decision.to_json() for decision in self._latest.values()],
            "unapplied": [decision.to_json() for decision in self._unapplied],
            "kills": [decision.to_json() for decision in self._kills.values()],
            "pending": self._pending,
            "joined_since": sorted(self._joined_since),
            "cooled": dict(self._cooled),
            "cap_changed": self._cap_changed,
            "decided": self._decided,
            "useful": self._useful,
            "useless": self._useless,
            "restart_seconds": self.restart_seconds,
            "remaining": self._remaining,
            "step": self._step,
            "plan_step": self._plan_step,
            "now": self._now,
            "nodes": {name: asdict(node) for name, node in self._nodes.items()},
            "monitors": {role: monitor.state_dict() for role, monitor in self._monitors.items()},
            "solution": self.solution.state_dict(),
            "failure": self.failure,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        A controller that has decided more than the state knows of keeps what it has: it has lived on while the workers went
        back to a checkpoint. Of a job with other workers or another global batch, only what restarts take is kept.
        """
        if self._version > int(state["version"]):
            return
        self.restart_seconds = float(state["restart_seconds"])
        self._useful, self._useless = int(state["useful"]), int(state["useless"])
        self._version = int(state["version"])
        if (state["world_size"], state["global_batch"]) != (self.world_size, self.global_batch):
            return
        self._plan = Versioned.from_json(state["plan"])
        self._latest = {decision.kind: decision for decision in map(Versioned.from_json, state["latest"])}
        self._unapplied = [Versioned.from_json(each) for each in state["unapplied"]]
        self._kills = {str(d.node): d for d in map(Versioned.from_json, state["kills"])}
        self._pending, self._joined_since = state["pending"], set(state["joined_since"])
        self._cooled = dict(state["cooled"])
        self._cap_changed, self._decided = bool(state["cap_changed"]), state["decided"]
        self._remaining, self._step, self._plan_step = state["remaining"], int(state["step"]), int(state["plan_step"])
        present = {name: node for name, node in self._nodes.items() if node.alive}
        self._nodes = {name: _Node(**node) for name, node in state["nodes"].items()}
        for role, monitor in self._monitors.items():
            monitor.load_state_dict(state["monitors"][role])
        self.solution.load_state_dict(state["solution"])
        self.failure = state["failure"]
        gained = max(float(state["now"]) - self._now, 0.0)
        self._now += gained
        if present:
            self._shift += gained
        else:
            self._resumed = True
        for name, node in present.items():  # they have joined before the state was found
            self.join(name, self._now - self._shift, device=node.device, pid=node.pid, host=node.host)
