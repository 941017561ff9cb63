"""Workers come to a run, meet one another, fall silent, and leave; the clock knows of all that."""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from torch import Tensor

from strategies.antdt.ps.deferred import Answer, Deferred
from strategies.antdt.ps.dispatch import Caller
from strategies.antdt.ps.frames import Frame, FrameProtocol
from strategies.antdt.ps.meeting import Meetings
from strategies.antdt.ps.steps import Steps

__all__ = ["Membership"]

_UNCONFIGURED_TIMEOUT = 300.0  # seconds of silence, until the workers have agreed on another number


class Membership:
    """Requests of workers that do something together, and what becomes of those who are not heard of.

    Args:
        meetings: who takes part.
        steps: who is waited for.
        deferred: requests that wait.
        event: takes lines of the log.
        new_run: called when the first worker of another run has come.
        grace: seconds for which a worker whose connection has closed may come back.
        start_timeout: seconds in which all workers of a run must have come.
    """

    def __init__(
        self,
        meetings: Meetings,
        steps: Steps,
        deferred: Deferred,
        event: Callable[[dict[str, Any]], None],
        new_run: Callable[[], None],
        grace: float,
        start_timeout: float,
    ) -> None:
        self._meetings, self._steps, self._deferred = meetings, steps, deferred
        self._event, self._new_run, self._grace, self._start_timeout = event, new_run, grace, start_timeout
        self._began = time.monotonic()
        self._seen: dict[int, float] = {}
        self._closed: dict[int, float] = {}

    # ---- coming and going ---------------------------------------------------------------------------------------------

    def hello(self, caller: Caller, header: dict[str, Any]) -> dict[str, Any]:
        """``{world_size, run, group, joins}``: a process presents itself, or comes back over a new connection.

        Returns:
            ``{run, late, epoch}``.

        Raises:
            MeetingError: it cannot take part.
        """
        meetings, worker = self._meetings, caller.worker
        former, known, group = meetings.run, meetings.members.get(worker), str(header.get("group", ""))
        if known is not None and known.session != caller.session and group == meetings.group and not meetings.over:
            self._lose(worker, "is replaced by a new process")
        member = meetings.hello(
            worker,
            int(header["world_size"]),
            caller.session,
            str(header.get("run", "")),
            group,
            str(header.get("joins", "")),
        )
        if meetings.run != former:
            self._began = time.monotonic()
            self._seen.clear()
            self._closed.clear()
            self._new_run()
        self._closed.pop(worker, None)
        self._seen[worker] = time.monotonic()
        self._event({"kind": "hello", "worker": worker, "late": member.late, "run": meetings.run})
        return {"run": meetings.run, "late": member.late, "epoch": meetings.epoch}

    def heard(self, caller: Caller) -> None:
        """Somebody has asked for something, or given a sign of life: who was expected back lives, and may compute for long."""
        if self._takes_part(caller):
            now = self._seen[caller.worker] = time.monotonic()
            if self._closed.get(caller.worker, now) > now:
                del self._closed[caller.worker]

    def gone(self, caller: Caller) -> None:
        """All connections of a process have closed."""
        if self._takes_part(caller):
            self._closed[caller.worker] = time.monotonic()

    def expect_back(self, within: float) -> None:
        """All members have lost this server, and look for it; they have so many seconds more than the grace to find it again."""
        self._closed = dict.fromkeys(self._meetings.members, time.monotonic() + within)
        self._steps.clock.expect_back(self._meetings.members)

    def tick(self, now: float) -> None:
        """Declare those lost who are silent, and give up a run to which not all have come.

        Args:
            now: ``time.monotonic``.
        """
        meetings, settings = self._meetings, self._steps.settings
        if meetings.members and not meetings.complete and now - self._began > self._start_timeout:
            meetings.give_up(self._start_timeout)
        timeout = settings.heartbeat_timeout if settings is not None else _UNCONFIGURED_TIMEOUT
        for worker in list(meetings.members):
            if worker in self._closed and now - self._closed[worker] >= self._grace:
                self._lose(worker, "is gone")
            elif now - self._seen.setdefault(worker, now) >= timeout:
                self._lose(worker, f"has been silent for {timeout:g} s")
        self._deferred.settle()

    def _takes_part(self, caller: Caller) -> bool:
        member = self._meetings.members.get(caller.worker)
        return member is not None and member.session == caller.session

    def _lose(self, worker: int, why: str) -> None:
        """A worker is gone: nobody waits for it, and its samples are given to others."""
        self._event({"kind": "lost", "worker": worker, "why": why, "version": self._steps.clock.version})
        print(f"worker {worker} {why}", flush=True)
        self._meetings.lost(worker)
        self._seen.pop(worker, None)
        self._closed.pop(worker, None)
        self._steps.lose(worker)

    # ---- together -----------------------------------------------------------------------------------------------------

    def bring(self, peer: FrameProtocol, frame: Frame) -> None:
        """``{meeting, value}``: what all others have brought, when they have."""
        worker, number = self._steps.member(peer), int(frame.header["meeting"])
        self._meetings.bring(worker, number, (frame.header["value"], frame.tensors))
        # Who waits for others here must not be waited for there.
        paused = self._steps.clock.own.get(worker)
        self._steps.idle(worker)

        def collect() -> Answer | None:
            found = self._meetings.result(worker, number)
            if found is None:
                return None
            if paused is not None:  # all come back together: their answers are given in one go
                self._steps.clock.resume(worker, paused)
            tensors: list[Tensor] = []
            counts = []
            for _, own in found.values():
                tensors += own
                counts.append(len(own))
            return {"ranks": list(found), "values": [value for value, _ in found.values()], "counts": counts}, tensors

        self._deferred.add(peer, collect)

    def remember(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """``{epoch, requests, meeting, ranks, values, counts}`` with tensors: what a worker was told by the process before."""
        worker, header = self._steps.member(peer), frame.header
        tensors, found = iter(frame.tensors), {}
        for rank, own, count in zip(header["ranks"], header["values"], header["counts"], strict=True):
            found[int(rank)] = own, list(islice(tensors, int(count)))
        self._meetings.remember(worker, header, found or None)
        return {"ok": True}, []

    def enter(self, peer: FrameProtocol, frame: Frame) -> None:
        """``{epoch}``: begin to train it, together with all others; a late worker: the one that is going on."""
        worker, meetings = self._steps.member(peer), self._meetings
        if worker in self._steps.clock.awaited:
            self._steps.idle(worker)
        meetings.enter(worker, int(frame.header["epoch"]))

        def begin() -> Answer | None:
            if not meetings.entered(worker):
                return None
            # All at once: a synchronous step must wait for the last of them.
            self._steps.clock.enter(meetings.present())
            return {**self._steps.about(), "epoch": meetings.epoch, "meeting": meetings.members[worker].met,
                    "present": meetings.present()}, []  # fmt: skip

        self._deferred.add(peer, begin)

    def ask(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """``{request, seen}``: want all to do something."""
        self._steps.member(peer)
        self._meetings.ask(str(frame.header["request"]), int(frame.header["seen"]))
        return self._steps.about(), []

    def leave(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """``{over}``: end taking part; with ``over`` nobody may come to this run any more."""
        caller: Caller = peer.about
        if self._takes_part(caller):
            self._meetings.over |= bool(frame.header.get("over"))
            self._meetings.leave(caller.worker)
            self._seen.pop(caller.worker, None)
            self._steps.leave(caller.worker)
        return {"ok": True}, []
