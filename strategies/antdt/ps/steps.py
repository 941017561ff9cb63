"""Weights out, gradients in: the steps of a server's part of the model.

On the clock (server 0) also when a step may begin, which gradients are in it, and that their samples are committed with it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strategies.antdt.ps.clock import Clock, Consistency, Decision
from strategies.antdt.ps.commits import Commits, Trained
from strategies.antdt.ps.deferred import Answer, Deferred
from strategies.antdt.ps.frames import Frame, FrameProtocol
from strategies.antdt.ps.meeting import Meetings
from strategies.antdt.ps.pending import PendingGradients
from strategies.antdt.ps.reports import Reports
from strategies.antdt.ps.settings import Settings
from strategies.antdt.ps.slices import Gradient, Slices
from strategies.antdt.service.wire import ServiceError

__all__ = ["Delay", "Steps"]

Delay = Callable[[int, int, int], float]
"""Seconds by which applying a gradient takes longer, given step, samples and the server's number."""


@dataclass
class _Push:
    """The last gradient of a worker, by which the same one, sent again, is known."""

    session: str
    number: int
    version: int
    items: list[Any]
    gen: int
    reply: dict[str, Any] | None = None


class Steps:
    """One server's part, the gradients that change it, and the clock.

    Args:
        index: number of the server; 0 is the clock.
        meetings: who takes part.
        deferred: requests that wait.
        commits: of samples.
        reports: of what applying a gradient takes.
        event: takes lines of the log.
        delay: makes applying slower, for tests and benchmarks.

    Attributes:
        clock: says when steps begin; in use on server 0.
        slices: this server's part; None until a worker has given it.
        settings: what the workers have agreed on; None until then.
        version: steps applied to this server's part.
        lost: steps that were applied once, and were not in the file from which this server was started again.
        plan: newest decision of the controller about batches, ``[version, action]``.
        unsaved: whether this part has changed since it was saved; whoever saves it says so.
    """

    def __init__(
        self,
        index: int,
        meetings: Meetings,
        deferred: Deferred,
        commits: Commits,
        reports: Reports,
        event: Callable[[dict[str, Any]], None],
        delay: Delay | None = None,
    ) -> None:
        self.index = index
        self._meetings, self._deferred, self._commits, self._reports = meetings, deferred, commits, reports
        self._event, self._delay = event, delay
        self.clock = Clock(Consistency())
        self.slices: Slices | None = None
        self.settings: Settings | None = None
        self.version = self.lost = 0
        self.plan: list[Any] = [0, None]
        self.unsaved = False
        self._pending = PendingGradients()
        self._pushes: dict[int, _Push] = {}

    # ---- beginning ----------------------------------------------------------------------------------------------------

    def configure(self, slices: Slices, settings: Settings, version: int) -> None:
        """Begin with this part, and so many steps done."""
        self.slices, self.settings, self.version, self.lost = slices, settings, version, 0
        self.clock = Clock(settings.consistency)
        self.clock.version = version
        self._pending, self._pushes = PendingGradients(), {}

    @property
    def ready(self) -> tuple[Slices, Settings]:
        """What there is once a worker has given it.

        Raises:
            ServiceError: ``not_configured``: none has.
        """
        if self.slices is None or self.settings is None:
            raise ServiceError("not_configured", f"server {self.index} holds no parameters; the run must begin anew.")
        return self.slices, self.settings

    def state_dict(self) -> dict[str, Any]:
        """JSON types beside `slices`: what a server that is started again must know of its steps."""
        settings = self.ready[1]
        answered = {worker: push for worker, push in self._pushes.items() if push.reply is not None}
        return {
            "version": self.version,
            "clock": self.clock.state_dict(),
            "settings": settings.raw,
            "lost": self.lost,
            "pushes": {str(w): [p.session, p.number, p.version, p.items, p.gen, p.reply] for w, p in answered.items()},
        }

    def restore(self, slices: Slices, state: Mapping[str, Any]) -> None:
        """Go on from `slices` and what `state_dict` has given."""
        self.slices, self.settings = slices, Settings.of(state["settings"])
        self.version, self.lost = int(state["version"]), int(state["lost"])
        self.clock = Clock(self.settings.consistency)
        self.clock.load_state_dict(state["clock"])
        if self.index == 0:
            self.clock.version = self.version  # a step that was decided, but not applied: who was told of it says so
        self._pushes = {
            int(worker): _Push(session, number, version, items, gen, reply)
            for worker, (session, number, version, items, gen, reply) in state["pushes"].items()
        }

    def forget_workers(self) -> None:
        """Another run begins, with other workers."""
        self._pushes.clear()
        self.plan = [0, None]

    # ---- who asks, and what is known ----------------------------------------------------------------------------------

    def member(self, peer: FrameProtocol) -> int:
        """Rank of the worker that asks.

        Raises:
            MeetingError: it does not take part, as the clock knows.
        """
        worker: int = peer.about.worker
        if self.index == 0:
            self._meetings.confirm(worker, peer.about.session)
        return worker

    def about(self) -> dict[str, Any]:
        """What travels with each answer of the clock."""
        if self.index:
            return {"version": self.version}
        last = self.clock.last
        return {
            "version": self.clock.version,
            "last": None if last is None else last.to_json(),
            "requests": self._meetings.requests,
            "plan": self.plan,
        }

    # ---- weights out --------------------------------------------------------------------------------------------------

    def pull(self, peer: FrameProtocol, frame: Frame) -> Answer | None:
        """``{decision, scale, known, gate}``: values of the dense parameters, once the worker may begin."""
        slices, settings = self.ready
        worker, header = self.member(peer), frame.header
        if header.get("decision") is not None:
            self._apply_decision(Decision.from_json(header["decision"]), header.get("scale"))
        self._advance(int(header.get("known", 0)), settings)
        if self.index or not header.get("gate", True):
            return self.about(), slices.dense()
        self.clock.enter([worker])

        def begin() -> Answer | None:
            return (self.about(), slices.dense()) if self.clock.may_begin(worker) else None

        answer = begin()
        if answer is None:
            self._deferred.add(peer, begin)
        return answer

    def norm(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """``{decision}``: sum of squares of this server's part of a synchronous step's gradient."""
        return {"square": self._pending.square_norm(Decision.from_json(frame.header["decision"]))}, []

    def _advance(self, known: int, settings: Settings) -> None:
        """A worker has seen later steps than this server, which was started again, knows of."""
        if self.index:
            if settings.consistency.kind != "bsp":
                return
            lost = max(0, known - self.version)
            self.version = max(self.version, known)
        else:
            lost = self.clock.advance(known)
            self.version = max(self.version, self.clock.version - (self.clock.last is not None)) if lost else self.version
        if lost:
            self._lose_steps(lost)
            # Gradients that waited for a step which the others have behind them.
            late = [(w, p) for w, p in self._pushes.items() if p.reply is None and p.version < self.clock.version]
            if self.index == 0 and settings.consistency.kind == "bsp" and late:
                self._finish(late, accepted=True)

    def _lose_steps(self, count: int) -> None:
        self.lost += count
        self._event({"kind": "lost steps", "server": self.index, "steps": count, "version": self.version})
        print(f"{count} steps that were applied before this server was started again are lost", flush=True)

    def _apply_decision(self, decision: Decision, scale: float | None) -> None:
        """Apply a synchronous step, of which the first worker that tells makes it so."""
        settings = self.ready[1]
        if decision.version < self.version:
            return
        lost = decision.version - self.version
        gradient, missing = self._pending.mean(decision), self._pending.missing(decision)
        if missing:
            print(f"step {decision.version}: gradients of workers {missing} were lost with the former process", flush=True)
        if gradient is not None:
            if scale is not None:
                gradient.scale_(scale)
            if settings.clip and not settings.clip_norm:
                gradient.clamp_(settings.clip)
            self._apply(gradient, self._pending.hyperparameters(decision))
        else:
            lost += 1
        if lost and self.index:  # the clock counts what it has lost itself, see `_advance`
            self._lose_steps(lost)
        self.version = decision.version + 1
        self._pending.done(decision.version)

    def _apply(self, gradient: Gradient, hyperparameters: Sequence[Mapping[str, Any]]) -> None:
        slices, _ = self.ready
        begun = time.monotonic()
        slices.apply(gradient, hyperparameters)
        if self._delay is not None:
            time.sleep(max(0.0, self._delay(self.version, int(gradient.samples), self.index)))
        self._reports.measure(self.version, gradient.samples, begun, time.monotonic())
        self.unsaved = True

    # ---- gradients in -------------------------------------------------------------------------------------------------

    def push(self, peer: FrameProtocol, frame: Frame) -> Answer | None:
        """``{number, version, samples, hyperparameters, absent, tables, items, gen}`` with dense ranges, rows and values."""
        slices, settings = self.ready
        worker, header = self.member(peer), frame.header
        version, number, session = int(header["version"]), int(header["number"]), peer.about.session
        known = self._pushes.get(worker)
        if known is not None and (known.session, known.number) == (session, number):
            if known.reply is not None:
                return known.reply, []
            self._deferred.add(peer, lambda: None if known.reply is None else (known.reply, []))
            return None
        gradient = _gradient(slices, header, frame.tensors)
        slices.check(gradient)
        push = self._pushes[worker] = _Push(session, number, version, header.get("items", []), int(header.get("gen", 0)))
        synchronous = settings.consistency.kind == "bsp"
        if self.index:
            if synchronous:
                if version >= self.version:
                    self._pending.put(version, worker, gradient, header["hyperparameters"])
            else:
                self._apply(gradient, header["hyperparameters"])
                self.version += 1
            push.reply = self.about()
            return push.reply, []
        self._advance(version, settings)
        if synchronous:
            self._push_synchronous(peer, worker, push, gradient, header["hyperparameters"])
        else:
            self._push_asynchronous(peer, worker, push, gradient, header["hyperparameters"])
        return None

    def _push_asynchronous(
        self, peer: FrameProtocol, worker: int, push: _Push, gradient: Gradient, hyperparameters: list[Any]
    ) -> None:
        """Commit the samples, and take the gradient with that."""

        def take(failure: BaseException | None) -> None:
            if failure is not None:
                self._pushes.pop(worker, None)  # the worker may have been declared lost meanwhile
                peer.deny(getattr(failure, "kind", "unreachable"), f"the samples could not be committed: {failure}")
                return
            try:
                self._apply(gradient, hyperparameters)
            except (ValueError, TypeError, RuntimeError) as refusal:
                self._pushes.pop(worker, None)
                peer.deny("bad_request", f"push: {refusal!r}")
                return
            self.clock.push(worker, push.version)
            self.version = self.clock.version
            push.reply = {**self.about(), "accepted": True}
            peer.send(push.reply)
            self._deferred.settle()

        self._commits.commit(Trained(worker, push.gen, push.items), take)

    def _push_synchronous(
        self, peer: FrameProtocol, worker: int, push: _Push, gradient: Gradient, hyperparameters: list[Any]
    ) -> None:
        """Keep the gradient for its step, or drop it; its samples are committed when the step is complete."""
        settings = self.ready[1]
        if push.version == self.clock.version:
            self._pending.put(push.version, worker, gradient, hyperparameters)
        outcome = self.clock.push(worker, push.version)
        self._deferred.add(peer, lambda: None if push.reply is None else (push.reply, []))
        if outcome.accepted is False:
            self._event({"kind": "dropped", "worker": worker, "version": push.version, "samples": gradient.samples})
            if settings.on_drop == "lose":
                self._finish([(worker, push)], accepted=False)
            else:
                push.reply = {**self.about(), "accepted": False}
        elif outcome.accepted and outcome.decision is None:
            self._finish([(worker, push)], accepted=True)
        else:
            self._decided(outcome.decision)

    def _decided(self, decision: Decision | None) -> None:
        """A synchronous step may be complete: commit its samples, then tell those who wait."""
        if decision is not None:
            accepted = [(worker, self._pushes[worker]) for worker in decision.accepted if worker in self._pushes]
            self._finish(accepted, accepted=True)

    def _finish(self, pushes: list[tuple[int, _Push]], accepted: bool) -> None:
        def reply(failure: BaseException | None) -> None:
            if failure is not None:
                print(f"samples could not be committed: {failure}", flush=True)
            about = self.about()
            for _, push in pushes:
                push.reply = {**about, "accepted": accepted}
            self._deferred.settle()

        self._commits.commit_all([Trained(worker, push.gen, push.items) for worker, push in pushes], reply)

    # ---- who is waited for --------------------------------------------------------------------------------------------

    def idle(self, worker: int) -> None:
        """A worker has nothing to train: others need not wait for it."""
        self._decided(self.clock.idle(worker))

    def leave(self, worker: int) -> None:
        """A worker has done with the run."""
        self._pushes.pop(worker, None)
        self.idle(worker)

    def lose(self, worker: int) -> None:
        """A worker is gone: its gradient of the step that is not complete does not count, and its samples are given to others."""
        push = self._pushes.pop(worker, None)
        decision = self.clock.idle(worker)
        if push is not None:
            self._pending.drop(self.clock.version, worker)
            self._commits.give_up(Trained(worker, push.gen, push.items))
        self._decided(decision)

    def set_backup(self, count: int) -> None:
        """Synchronous steps wait for so many gradients fewer than there are workers; other steps wait for none."""
        if self.clock.consistency.kind == "bsp":
            self._decided(self.clock.set_backup(count))


def _gradient(slices: Slices, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Gradient:
    """What a worker has sent: dense ranges, then rows and values of each table."""
    count = len(slices.flat)
    values = iter(tensors[count:])
    return Gradient(
        dict(zip(slices.layout.dtypes, tensors[:count], strict=True)),
        frozenset(int(number) for number in header["absent"]),
        {int(table): (next(values), next(values)) for table in header["tables"]},
        float(header["samples"]),
    )
