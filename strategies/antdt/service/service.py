"""Request handling of the data-sharding service, free of sockets and clocks.

One `Service` holds the ledger of samples and the controller of one job, and who takes part in it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from strategies.antdt.service.barrier import JoinBarrier, Waiting
from strategies.antdt.service.wire import ServiceError, error
from strategies.antdt.sharding.journal import OtherDataset, RecordedLedger
from strategies.antdt.sharding.ledger import DatasetSpec, LedgerError, StaleGeneration

__all__ = ["Peer", "Service", "SupportsControl"]

_ROLES = ("worker", "server", "spare")
_UNNUMBERED = ("status", "heartbeat", "snapshot", "shutdown", "configure")
"""Requests that may be answered twice: they change nothing, or nothing more the second time."""


class Peer(Protocol):
    """A connection."""

    def send(self, message: dict[str, Any]) -> None:
        """Give it an answer."""


class SupportsControl(Protocol):
    """Interface of a controller for the service, see `strategies.antdt.control.controller.Controller`."""

    failure: str | None
    """Why the job cannot go on."""

    @property
    def version(self) -> int:
        """Number of decisions."""

    @property
    def plan(self) -> dict[str, Any]:
        """``{"version", "batch", "cap"}``."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """All decisions."""

    def join(self, node: str, now: float, *, device: str = "", pid: int | None = None, host: str = "") -> None:
        """A node takes part."""

    def report(self, node: str, samples: Sequence[Any], now: float, *, node_state: Any = ..., errors: Sequence[Any] = ()) -> None:
        """Take a node's measurements."""

    def progress(self, remaining_samples: int, step: int) -> None:
        """Take the progress of the job."""

    def tick(self, now: float) -> list[Any]:
        """Decide, if it is time to."""

    def actions_after(self, version: int, node: str) -> list[Any]:
        """Decisions that a node with a given version has not received."""

    def applied(self, version: int, step: int, now: float) -> None:
        """A version is in effect."""

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""


@dataclass
class _Node:
    """Someone who has joined.

    Attributes:
        gen: its generation.
        peers: its connections.
        seen: when it was heard last.
        closed: when its last connection closed; None while one is open.
        answers: last numbered request and its answer, for each session.
    """

    gen: int
    seen: float
    peers: set[Any] = field(default_factory=set)
    closed: float | None = None
    answers: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)


class _Applied:
    """The decision that all workers know: the lowest that any of them has reported, once all have reported."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._count: Counter[int] = Counter()
        self._effective = 0

    def note(self, name: str, version: int, of: int) -> int | None:
        """A worker, one of ``of``, knows a version; the version that all know, if that has become another."""
        if self._of.get(name) != version:
            self.forget(name)
            self._of[name] = version
            self._count[version] += 1
        lowest = min(self._count)
        if len(self._of) < of or lowest <= self._effective:
            return None
        self._effective = lowest
        return lowest

    def forget(self, name: str) -> None:
        """A worker has gone, or starts anew."""
        version = self._of.pop(name, None)
        if version is not None:
            self._count[version] -= 1
            if not self._count[version]:
                del self._count[version]


class Service:
    """The service of one job.

    Args:
        recorded: the ledger, replayed from its journal if there is one.
        build_controller: makes a controller from the settings of ``configure``; raises ValueError, TypeError or ImportError
            with a message for the user.
        event: called with each thing worth a line of the log, plain types.
        now: seconds of the clock that all calls use.
        disconnect_grace: seconds for which a worker whose connection has closed may come back.

    Attributes:
        stopping: whether someone has asked for the end.
    """

    def __init__(
        self,
        recorded: RecordedLedger,
        build_controller: Callable[[dict[str, Any]], SupportsControl],
        event: Callable[[dict[str, Any]], None],
        now: float,
        disconnect_grace: float = 5.0,
    ) -> None:
        self._recorded, self._build_controller, self._event = recorded, build_controller, event
        self._disconnect_grace = disconnect_grace
        self._barrier: JoinBarrier[Any] = JoinBarrier(self._refuse_join)
        self._about_joining: dict[int, dict[str, Any]] = {}
        self._nodes: dict[str, _Node] = {}
        self._names: dict[Any, set[str]] = {}  # of the nodes behind each connection
        self._controller: SupportsControl | None = None
        self._logged, self._started = 0, now
        self._applied = _Applied()
        self._step = 0
        self.stopping = False
        if recorded.settings is not None:
            self._make_controller(recorded.settings, recorded.controller)
            for worker, gen in recorded.ledger.members.items():
                # They were there when the former server ended; they have as long to come back as they have to be silent.
                self._nodes[f"worker:{worker}"] = _Node(gen, seen=now)
        self._operations: dict[str, Callable[[dict[str, Any], Any, float], dict[str, Any] | None]] = {
            name: getattr(self, f"_{name}")
            for name in ("configure", "join", "fetch", "commit", "release", "report", "snapshot", "restore", "leave",
                         "heartbeat", "status", "shutdown")
        }  # fmt: skip

    # ---- requests -----------------------------------------------------------------------------------------------------

    def handle(self, request: dict[str, Any], peer: Peer, now: float) -> None:
        """Answer a request; that of a worker at the barrier later."""
        try:
            answer = self._answer(request, peer, now)
        except StaleGeneration as refusal:
            answer = error("stale", str(refusal))
        except OtherDataset as refusal:
            answer = error("other_dataset", str(refusal))
        except ServiceError as refusal:
            answer = error(refusal.kind, str(refusal))
        except (LedgerError, KeyError, TypeError, ValueError) as refusal:
            what = f"{refusal} is missing" if isinstance(refusal, KeyError) else str(refusal)
            answer = error("bad_request", f"{request.get('op')}: {what}" if isinstance(refusal, KeyError) else what)
        if answer is not None:
            peer.send(answer)

    def _answer(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any] | None:
        op = request.get("op")
        operation = self._operations.get(op) if isinstance(op, str) else None
        if operation is None:
            raise ServiceError("bad_request", f"there is no request {op!r}; there are {', '.join(self._operations)}.")
        if not self._recorded.configured and op not in ("configure", "status", "shutdown"):
            raise ServiceError("not_configured", f"{op}: nobody has configured this server with a data set yet.")
        if op in _UNNUMBERED:
            if op != "configure":  # which a new process asks before it has joined
                self._touch(request, peer, now)
            return operation(request, peer, now)
        session, seq = str(request.get("session", "")), int(request["seq"])
        if op == "join":
            return self._join(request, peer, now)
        node = self._member(request, peer, now)
        last = node.answers.get(session) or self._recorded_answer(request, session)
        if last is not None and last[0] == seq:
            return last[1]
        if last is not None and seq < last[0]:
            raise ServiceError("bad_request", f"{op}: request {seq} comes after request {last[0]} of the same client.")
        answer = operation(request, peer, now)
        if answer is not None:
            node.answers[session] = (seq, answer)
        return answer

    @staticmethod
    def _name(request: dict[str, Any]) -> str:
        role = request.get("role", "worker")
        if role not in _ROLES:
            raise ServiceError("bad_request", f"role is {role!r}; it must be one of {', '.join(_ROLES)}.")
        return f"{role}:{int(request['worker'])}"

    def _touch(self, request: dict[str, Any], peer: Peer, now: float) -> None:
        """A sign of life."""
        node = self._nodes.get(self._name(request)) if "worker" in request else None
        if node is not None and request.get("gen") == node.gen:
            self._hear(self._name(request), node, peer, now)

    def _hear(self, name: str, node: _Node, peer: Peer, now: float) -> None:
        node.seen, node.closed = now, None
        node.peers.add(peer)
        self._names.setdefault(peer, set()).add(name)

    def _member(self, request: dict[str, Any], peer: Peer, now: float) -> _Node:
        name, gen = self._name(request), int(request["gen"])
        node = self._nodes.get(name)
        if node is None and not name.startswith("worker:") and gen > 0:
            # Parameter servers and spares are not in the journal: after a restart of this server their word is taken.
            node = self._nodes[name] = _Node(gen, now)
        if node is None or node.gen != gen:
            state = "is not known here, or was declared lost" if node is None else f"is in generation {node.gen}"
            raise StaleGeneration(
                f"{name} asks as a member of generation {gen}, but it {state}; a process of a former group must exit, a live one"
                " join again."
            )
        self._touch(request, peer, now)
        return node

    def _recorded_answer(self, request: dict[str, Any], session: str) -> tuple[int, dict[str, Any]] | None:
        if request.get("role", "worker") != "worker":
            return None
        return self._recorded.answers.get(int(request["worker"]), {}).get(session)

    # ---- the job ------------------------------------------------------------------------------------------------------

    def _configure(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        settings = {
            "dataset": asdict(DatasetSpec(**request["dataset"])),
            "semantics": request.get("semantics", "exactly_once"),
            "tail_factor": float(request.get("tail_factor", 2.0)),
            "solution": request["solution"],
            "controller": request.get("controller", {}),
            "world_size": int(request["world_size"]),
            "global_batch": int(request["global_batch"]),
            "caps": request.get("caps"),
            "heartbeat_timeout": float(request.get("heartbeat_timeout", 60.0)),
        }
        former = self._recorded.settings
        if settings == former:
            return {"ok": True}
        self._recorded.check_dataset(settings)
        present = sorted(name for name, node in self._nodes.items() if node.peers)
        if former is not None and present:
            differs = [
                f"{key} is {settings[key]!r} instead of {former[key]!r}" for key in settings if settings[key] != former[key]
            ]
            raise ServiceError(
                "conflict", f"configure: while {', '.join(present[:5])} take part in the job, {'; '.join(differs)}."
            )
        try:
            controller = self._build_controller(settings)
        except (ValueError, TypeError, ImportError, AttributeError) as cause:
            raise ServiceError("bad_request", f"configure: the controller cannot be built: {cause}") from cause
        self._recorded.configure(settings)
        if self._controller is not None and former is not None and former["solution"] == settings["solution"]:
            controller.load_state_dict(self._controller.state_dict())  # of which it takes what fits its group
        self._take(controller)
        self._event({"t": now, "kind": "configure", **settings})
        return {"ok": True}

    def _make_controller(self, settings: dict[str, Any], state: dict[str, Any] | None) -> None:
        controller = self._build_controller(settings)
        if state is not None:
            controller.load_state_dict(state)
        self._take(controller)

    def _take(self, controller: SupportsControl) -> None:
        self._controller, self._logged = controller, len(controller.events)
        self._applied = _Applied()

    @property
    def _control(self) -> SupportsControl:
        assert self._controller is not None
        return self._controller

    def _join(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any] | None:
        name, worker = self._name(request), int(request["worker"])
        session, seq = str(request.get("session", "")), int(request["seq"])
        role = request.get("role", "worker")
        known = self._nodes.get(name)
        last = known.answers.get(session) if known is not None else None
        last = last or self._recorded_answer(request, session)
        if last is not None and last[0] == seq and known is not None:  # the answer got lost
            self._hear(name, known, peer, now)
            return self._joined(known.gen)
        about = {key: request.get(key) for key in ("pid", "host", "device")}
        if role == "worker" and request.get("barrier"):
            waiting = Waiting(peer, session, seq, now + float(request.get("timeout", 300.0)))
            self._event({"t": now, "kind": "waits", "node": name, **about})
            self._about_joining[worker] = about | {"survived": request.get("survived")}
            group = self._barrier.enter(worker, int(request["world_size"]), waiting)
            if group is not None:
                self._begin(group, now)
            return None
        former = known.gen if known is not None else 0
        gen = self._recorded.join(worker, session, seq) if role == "worker" else former + 1
        self._admit(name, gen, peer, session, seq, about, now)
        return self._joined(gen)

    def _begin(self, group: Mapping[int, Waiting[Any]], now: float) -> None:
        try:
            self._settle([self._about_joining.get(worker, {}).pop("survived", None) for worker in group])
        except LedgerError as refusal:
            for waiting in group.values():
                waiting.peer.send(error("bad_request", f"join: {refusal}"))
            return
        gen = self._recorded.begin({worker: (waiting.session, waiting.seq) for worker, waiting in group.items()})
        for name in [name for name in self._nodes if name.startswith("worker:")]:
            del self._nodes[name]
        self._applied = _Applied()
        for worker, waiting in group.items():
            about = self._about_joining.pop(worker, {})
            self._admit(f"worker:{worker}", gen, waiting.peer, waiting.session, waiting.seq, about, now)
        self._event({"t": now, "kind": "generation", "gen": gen, "world_size": len(group)})
        for waiting in group.values():
            waiting.peer.send(self._joined(gen))

    def _settle(self, survived: Sequence[Mapping[str, Any] | None]) -> None:
        """Commit what was trained when the former group broke, as the survivor that was furthest knows it."""
        known = [each for each in survived if each is not None]
        if known:
            newest = max(known, key=lambda each: int(each["step"]))
            self._recorded.settle({worker: int(count) for worker, count in enumerate(newest["trained"])})

    def _admit(self, name: str, gen: int, peer: Peer, session: str, seq: int, about: dict[str, Any], now: float) -> None:
        self._nodes[name] = node = _Node(gen, now, answers={session: (seq, {"gen": gen})})
        self._hear(name, node, peer, now)
        self._applied.forget(name)
        self._control.join(name, now, device=about.get("device") or "", pid=about.get("pid"), host=about.get("host") or "")
        self._event({"t": now, "kind": "join", "node": name, "gen": gen, **about})

    def _joined(self, gen: int) -> dict[str, Any]:
        ledger = self._recorded.ledger
        snapshot = ledger.counts()[ledger.epoch]
        return {"gen": gen, "plan": self._control.plan, "epoch": ledger.epoch, "consumed": snapshot["done"]}

    def _refuse_join(self, worker: int, waiting: Waiting[Any], reason: str) -> None:
        self._about_joining.pop(worker, None)
        waiting.peer.send(error("timeout", f"join: {reason}"))

    # ---- work ---------------------------------------------------------------------------------------------------------

    def _fetch(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        return self._recorded.fetch(
            int(request["worker"]),
            int(request["gen"]),
            str(request.get("session", "")),
            int(request["seq"]),
            int(request["epoch"]),
            [int(number) for number in request["share"]],
            int(request["max"]),
        )

    def _commit(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        self._recorded.commit(int(request["worker"]), int(request["gen"]), request["items"])
        return {"ok": True}

    def _release(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        self._recorded.release(int(request["worker"]), int(request["gen"]), int(request["sid"]), int(request["from"]))
        return {"ok": True}

    def _report(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        name, version, step = self._name(request), int(request.get("version", 0)), int(request.get("step", 0))
        if name.startswith("worker:"):
            self._recorded.commit(int(request["worker"]), int(request["gen"]), request.get("items", []))
        samples = request.get("samples", [])
        self._step = max(self._step, step)
        control = self._control
        control.report(name, samples, now, node_state=request.get("node", {}), errors=request.get("errors", []))
        control.progress(self._recorded.ledger.remaining, self._step)
        if name.startswith("worker:"):
            effective = self._applied.note(name, version, of=len(self._recorded.ledger.members))
            if effective is not None:
                control.applied(effective, step, now)
        self._decide(now)
        actions = [action.to_json() for action in control.actions_after(version, name)]
        answer = {"actions": actions, "version": control.version}
        return answer | ({"failure": control.failure} if control.failure is not None else {})

    def _decide(self, now: float) -> None:
        control = self._control
        decided = bool(control.tick(now))
        for line in control.events[self._logged :]:
            self._event({"kind": "decision", **line})
        self._logged = len(control.events)
        if decided:
            self._recorded.keep_controller(control.state_dict())

    def _snapshot(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        state = self._control.state_dict()
        self._recorded.controller = state
        return {"ledger": self._recorded.snapshot(), "controller": state}

    def _restore(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        if self._name(request) != "worker:0":
            raise ServiceError("bad_request", f"restore: only worker 0 may, not {self._name(request)}.")
        self._recorded.restore(request["ledger"])
        if request.get("controller") is not None:
            self._control.load_state_dict(request["controller"])
            self._logged = len(self._control.events)
            self._recorded.keep_controller(request["controller"])
        ledger = self._recorded.ledger
        self._event({"t": now, "kind": "restore", "epoch": ledger.epoch, "consumed": ledger.counts()[ledger.epoch]["done"]})
        return {"ok": True}

    def _leave(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        name, graceful = self._name(request), bool(request.get("graceful", True))
        if name.startswith("worker:"):
            if graceful:
                self._recorded.leave(int(request["worker"]), int(request["gen"]))
            else:
                self._recorded.fail(int(request["worker"]))
        self._forget(name, "leaves" if graceful else "fails", now)
        return {"ok": True}

    def _heartbeat(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        return {"ok": True}

    def _shutdown(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        self.stopping = True
        self._event({"t": now, "kind": "shutdown"})
        return {"ok": True}

    def _status(self, request: dict[str, Any], peer: Peer, now: float) -> dict[str, Any]:
        """Status for people and tests."""
        status: dict[str, Any] = {"configured": self._recorded.configured, "uptime": now - self._started}
        if self._recorded.settings is not None:
            ledger = self._recorded.ledger
            status |= {
                "settings": self._recorded.settings,
                "generation": ledger.generation,
                "epoch": ledger.epoch,
                "remaining": ledger.remaining,
                "counts": {str(number): counts for number, counts in ledger.counts().items()},
                "plan": self._control.plan,
                "failure": self._control.failure,
                "at_barrier": self._barrier.workers,
                "nodes": {
                    name: {"gen": node.gen, "silent": now - node.seen, "connected": bool(node.peers)}
                    for name, node in sorted(self._nodes.items())
                },
            }
        return status

    # ---- time and connections -----------------------------------------------------------------------------------------

    def disconnected(self, peer: Peer, now: float) -> None:
        """A connection has closed."""
        self._barrier.withdraw(peer)
        for name in self._names.pop(peer, ()):
            node = self._nodes.get(name)
            if node is not None and peer in node.peers:
                node.peers.discard(peer)
                node.closed = now if not node.peers else None

    def tick(self, now: float) -> None:
        """Do what is due: end waiting, declare the silent lost, decide."""
        self._barrier.expire(now)
        settings = self._recorded.settings
        if settings is None:
            return
        for name, node in list(self._nodes.items()):
            gone = node.closed is not None and now - node.closed >= self._disconnect_grace
            silent = now - node.seen >= settings["heartbeat_timeout"]
            if gone or silent:
                # A group in lockstep stands still without it. What it holds is settled when the next one begins, by survivors
                # who know how far it came, or put back.
                if name.startswith("worker:") and settings["semantics"] != "exactly_once":
                    self._recorded.fail(int(name.partition(":")[2]))
                self._forget(name, "is gone" if gone else "is silent", now)
        self._decide(now)

    def close(self, job_is_over: bool) -> None:
        """Write down what is known and let go of the journal; leave nothing to replay if the job is over."""
        if self._controller is not None:
            self._recorded.controller = self._controller.state_dict()
        self._recorded.close(job_is_over)

    def _forget(self, name: str, why: str, now: float) -> None:
        del self._nodes[name]
        self._applied.forget(name)
        self._event({"t": now, "kind": "leave", "node": name, "why": why})
        if why != "leaves":
            self._control.report(name, [], now, node_state={"alive": False, "why": why})
