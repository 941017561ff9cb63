"""A parameter server: ``python -m strategies.antdt.ps.server --folder runs/flights/antdt --index 0 --servers 2``.

One process, one asyncio loop, no threads but for the disk and for calls to the data-sharding server: gradients are applied one
after another. Server 0 is also the *clock*: it says when a step may begin, which gradients count, who takes part, and commits the
samples of a gradient together with taking it.
"""

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.antdt.address import Address
from strategies.antdt.client import Client
from strategies.antdt.ps.clock import Clock, Consistency, Decision
from strategies.antdt.ps.frames import STRANGER_LIMIT, Frame, FrameProtocol, pack, unpack
from strategies.antdt.ps.meeting import MeetingError, Meetings
from strategies.antdt.ps.partition import Layout
from strategies.antdt.ps.remote_optimizer import OptimizerSpec
from strategies.antdt.ps.slices import Gradient, Slices, merge
from strategies.antdt.wire import ServiceError, same_token

__all__ = ["FRAME_LIMIT", "ParameterServer", "ServerThread", "main", "serve"]

FRAME_LIMIT = 2**32
"""Largest frame, in bytes, between those who share the token, unless told otherwise."""
_REMEMBERED = 16  # decisions, and versions of gradients that wait for one
_SAMPLES = 1000  # measurements that are kept for the next report

Delay = Callable[[int, int, int], float]


class Refusal(RuntimeError):
    """A request cannot be answered; `kind` is that of `ServiceError`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class _Connected:
    """Who is at the other end of a connection."""

    worker: int
    session: str
    pulse: bool


@dataclass
class _Waiting:
    """A request that is answered later, when ``answer`` gives something."""

    peer: FrameProtocol
    answer: Callable[[], tuple[dict[str, Any], list[Tensor]] | None]


@dataclass
class _Push:
    """The last gradient of a worker, by which the same one, sent again, is known."""

    session: str
    number: int
    version: int
    items: list[Any]
    gen: int
    reply: dict[str, Any] | None = None


@dataclass
class _Settings:
    """What the workers have agreed on."""

    consistency: Consistency
    clip: float = 0.0
    clip_norm: bool = True
    on_drop: str = "lose"
    heartbeat_timeout: float = 60.0
    save_every: float = 30.0
    report_every: float = 2.0
    data: Address | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "_Settings":
        data = raw.get("data")
        return cls(
            Consistency(raw["mode"], int(raw.get("staleness", 0)), int(raw.get("backup", 0))),
            float(raw.get("clip", 0.0)),
            bool(raw.get("clip_norm", True)),
            raw.get("on_drop", "lose"),
            float(raw.get("heartbeat_timeout", 60.0)),
            float(raw.get("save_every", 30.0)),
            float(raw.get("report_every", 2.0)),
            None if data is None else Address(data[0], int(data[1]), data[2]),
            dict(raw),
        )


class ParameterServer:
    """Answers requests; it knows no sockets but through `FrameProtocol`.

    Args:
        index: number of this server; 0 is the clock.
        token: that connections must show.
        slice_file: where it keeps its part; None: nowhere, so that it cannot be started again.
        frame_limit: largest frame, in bytes.
        delay: seconds by which applying a gradient takes longer, given step, samples and this server's number (for tests and
            benchmarks: a server that is slow).
        event: takes lines of the log.
        grace: seconds for which a worker whose connection has closed may come back.
        ends: called when the run is over, so that nothing is kept.
        start_timeout: seconds in which all workers of a run must have come.

    Attributes:
        stopping: whether it has been told to end.
        restart: whether it has been told to end so that it is started again.
    """

    def __init__(
        self,
        index: int,
        token: str,
        slice_file: Path | None = None,
        frame_limit: int = FRAME_LIMIT,
        delay: Delay | None = None,
        event: Callable[[dict[str, Any]], None] = lambda line: None,
        grace: float = 5.0,
        ends: Callable[[], None] = lambda: None,
        start_timeout: float = 300.0,
    ) -> None:
        self._ends, self._start_timeout, self._began = ends, start_timeout, time.monotonic()
        self.index, self._token, self._file, self._frame_limit = index, token, slice_file, frame_limit
        self._delay, self._event, self._grace = delay, event, grace
        self._connections: set[FrameProtocol] = set()
        self._waiting: list[_Waiting] = []
        self._seen: dict[int, float] = {}
        self._closed: dict[int, float] = {}
        self.meetings = Meetings()
        self.clock = Clock(Consistency())
        self.slices: Slices | None = None
        self.version = 0
        """Steps applied to this server's part."""
        self.lost = 0
        """Steps that were applied once, and were not in the file from which this server was started again."""
        self._settings: _Settings | None = None
        self._pending: dict[int, dict[int, tuple[Gradient, list[Any]]]] = {}
        self._norms: dict[int, float] = {}
        self._merged: dict[int, Gradient] = {}
        self._decisions: dict[int, Decision] = {}
        self._pushes: dict[int, _Push] = {}
        self._plan: list[Any] = [0, None]
        self._samples: list[list[float]] = []
        self._applied_at: float | None = None
        self._data_clients: dict[int, Client] = {}
        self._monitor: Client | None = None
        self._known_action = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="antdt-ps-data")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="antdt-ps-disk")
        self._reports = ThreadPoolExecutor(1, thread_name_prefix="antdt-ps-report")
        self._reporting: Future[Any] | None = None
        self._saving: Future[None] | None = None
        self._saved_at = self._reported_at = time.monotonic()
        self._dirty = False
        self.last_client = time.monotonic()
        self.stopping = self.restart = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._operations = {
            name: getattr(self, f"_{name}")
            for name in ("configure", "pull", "rows", "norm", "push", "idle", "bring", "enter", "leave", "ask", "look", "export",
                         "status", "pulse", "shutdown")
        }  # fmt: skip
        if slice_file is not None and slice_file.exists():
            self._restore(slice_file)

    # ---- connections --------------------------------------------------------------------------------------------------

    def connect(self) -> FrameProtocol:
        """Asyncio's factory of connections."""
        self._loop = asyncio.get_running_loop()
        peer = FrameProtocol(self.received, self.disconnected, STRANGER_LIMIT)
        self._connections.add(peer)
        return peer

    @property
    def known_connections(self) -> int:
        """Connections that have shown the token."""
        return sum(peer.about is not None for peer in self._connections)

    def received(self, peer: FrameProtocol, frame: Frame) -> None:
        """Answer a request, now or later."""
        header = frame.header
        if self.stopping and self.restart:
            # What is applied now would be lost with this process: it is sent again, to the next one.
            if peer.transport is not None:
                peer.transport.close()
            return
        try:
            if peer.about is None:
                if header.get("op") != "hello" or not same_token(header.get("token"), self._token):
                    peer.refuse("token", "the token is wrong; it is in server.json of the server's folder.")
                    return
                self._answer(peer, self._hello(peer, header))
            else:
                self._touch(peer)
                operation = self._operations.get(str(header.get("op")))
                if operation is None:
                    raise Refusal("bad_request", f"there is no request {header.get('op')!r}.")
                answer = operation(peer, frame)
                if answer is not None:
                    self._answer(peer, answer)
            self._settle()
        except Refusal as refusal:
            self._error(peer, refusal.kind, str(refusal))
        except MeetingError as refusal:
            self._error(peer, refusal.kind, str(refusal))
        except (ValueError, TypeError, KeyError, RuntimeError, IndexError) as refusal:
            self._error(peer, "bad_request", f"{header.get('op')}: {refusal!r}")

    def disconnected(self, peer: FrameProtocol) -> None:
        """A connection has closed."""
        self._connections.discard(peer)
        self._waiting = [waiting for waiting in self._waiting if waiting.peer is not peer]
        about = peer.about
        if about is not None and not about.pulse and not any(
            other.about is not None and not other.about.pulse and other.about.session == about.session
            for other in self._connections
        ):  # fmt: skip
            member = self.meetings.members.get(about.worker)
            if member is not None and member.session == about.session:
                self._closed[about.worker] = time.monotonic()

    def _answer(self, peer: FrameProtocol, answer: tuple[dict[str, Any], Sequence[Tensor]]) -> None:
        peer.send(*answer)

    @staticmethod
    def _error(peer: FrameProtocol, kind: str, message: str) -> None:
        peer.send({"error": {"kind": kind, "message": message}})

    def _later(self, peer: FrameProtocol, answer: Callable[[], tuple[dict[str, Any], list[Tensor]] | None]) -> None:
        self._waiting.append(_Waiting(peer, answer))

    def _settle(self) -> None:
        """Answer what can be answered now; an answer may make another possible."""
        again = True
        while again:
            again = False
            for waiting in list(self._waiting):
                try:
                    answer = waiting.answer()
                except MeetingError as refusal:
                    answer = {"error": {"kind": refusal.kind, "message": str(refusal)}}, []
                if answer is not None and waiting in self._waiting:
                    self._waiting.remove(waiting)
                    self._answer(waiting.peer, answer)
                    again = True

    def _touch(self, peer: FrameProtocol) -> None:
        now = time.monotonic()
        self.last_client = now
        member = self.meetings.members.get(peer.about.worker)
        if member is not None and member.session == peer.about.session:
            self._seen[peer.about.worker] = now

    def _hello(self, peer: FrameProtocol, header: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        if self.stopping:
            raise Refusal("ending", f"server {self.index} is about to end.")
        worker, session = int(header["worker"]), str(header["session"])
        peer.limit = self._frame_limit
        answer: dict[str, Any] = {"server": self.index, "version": self.version, "configured": self.slices is not None}
        if header.get("role") == "pulse":
            peer.about = _Connected(worker, session, pulse=True)
            return answer, []
        if header.get("role") == "guest":  # looks only
            peer.about = _Connected(-1, session, pulse=True)
            return answer, []
        peer.about = _Connected(worker, session, pulse=False)
        if self.index == 0:
            former = self.meetings.run
            known = self.meetings.members.get(worker)
            group = str(header.get("group", ""))
            if known is not None and known.session != session and group == self.meetings.group and not self.meetings.over:
                self._lose(worker, "is replaced by a new process")
            member = self.meetings.hello(
                worker, int(header["world_size"]), session, str(header.get("run", "")), group, str(header.get("joins", ""))
            )
            if self.meetings.run != former:
                self._began = time.monotonic()
                self._forget_run()
            self._closed.pop(worker, None)
            self._seen[worker] = self.last_client = time.monotonic()
            answer |= {"run": self.meetings.run, "late": member.late, "epoch": self.meetings.epoch}
            self._event({"kind": "hello", "worker": worker, "late": member.late, "run": self.meetings.run})
        return answer, []

    def _forget_run(self) -> None:
        self._pushes.clear()
        self._seen.clear()
        self._closed.clear()
        self._plan = [0, None]
        self._close_clients()

    def _close_clients(self) -> None:
        for client in self._data_clients.values():
            client.close()
        self._data_clients.clear()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _lose(self, worker: int, why: str) -> None:
        """A worker is gone: nobody waits for it, and its samples are given to others."""
        self._event({"kind": "lost", "worker": worker, "why": why, "version": self.clock.version})
        print(f"worker {worker} {why}", flush=True)
        self.meetings.lost(worker)
        self._seen.pop(worker, None)
        self._closed.pop(worker, None)
        push = self._pushes.pop(worker, None)
        decision = self.clock.idle(worker)
        if push is not None:
            for version, gradients in self._pending.items():
                if version == self.clock.version:
                    gradients.pop(worker, None)
            self._in_thread(lambda: self._data_client(worker, push.gen).leave(graceful=False), None)
        if decision is not None:
            self._decided(decision)

    def tick(self) -> None:
        """Do what is due: declare the silent lost, save, report."""
        now = time.monotonic()
        if self.index == 0:
            if self.meetings.members and not self.meetings.complete and now - self._began > self._start_timeout:
                self.meetings.give_up(self._start_timeout)
            timeout = self._settings.heartbeat_timeout if self._settings is not None else 300.0
            for worker in list(self.meetings.members):
                if worker in self._closed and now - self._closed[worker] >= self._grace:
                    self._lose(worker, "is gone")
                elif now - self._seen.setdefault(worker, now) >= timeout:
                    self._lose(worker, f"has been silent for {timeout:g} s")
            self._settle()
        if self._settings is not None:
            if self._dirty and now - self._saved_at >= self._settings.save_every:
                self.save()
            if self._monitor is not None and now - self._reported_at >= self._settings.report_every:
                self._report(now)
        if self.known_connections:
            self.last_client = now

    # ---- setting up ---------------------------------------------------------------------------------------------------

    def _member(self, peer: FrameProtocol) -> int:
        worker: int = peer.about.worker
        if self.index == 0:
            member = self.meetings.members.get(worker)
            if member is None or member.session != peer.about.session:
                raise Refusal("stale", f"worker {worker} was declared lost, or replaced by a new process; it must exit.")
        return worker

    def _configure(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """``{layout, optimizer, row_update, settings, version, states}`` with dense ranges, tables, and states."""
        header = frame.header
        layout, optimizer = Layout.from_json(header["layout"]), OptimizerSpec.from_json(header["optimizer"])
        slices = Slices(layout, self.index, optimizer, header["row_update"])
        count = len(layout.dtypes)
        slices.write(frame.tensors[:count], dict(zip(layout.tables, frame.tensors[count:], strict=False)))
        slices.load_states(unpack(header["states"], frame.tensors[count + len(layout.tables) :]))
        self._settings = _Settings.of(header["settings"])
        self.slices, self.version, self.lost = slices, int(header["version"]), 0
        self.clock = Clock(self._settings.consistency)
        self.clock.version = self.version
        self._pending, self._norms, self._merged, self._decisions, self._pushes = {}, {}, {}, {}, {}
        self._samples, self._applied_at = [], None
        self._event({"kind": "configure", "server": self.index, "version": self.version, "bytes": layout.state_bytes(self.index)})
        self._start_monitor()
        self.save()
        return {"ok": True}, []

    @property
    def _ready(self) -> tuple[Slices, _Settings]:
        if self.slices is None or self._settings is None:
            raise Refusal("not_configured", f"server {self.index} holds no parameters; the run must begin anew.")
        return self.slices, self._settings

    # ---- steps --------------------------------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        """What travels with each answer of the clock."""
        if self.index:
            return {"version": self.version}
        last = self.clock.last
        return {
            "version": self.clock.version,
            "last": None if last is None else last.to_json(),
            "requests": self.meetings.requests,
            "plan": self._plan,
        }

    def _pull(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]] | None:
        """``{decision, scale, known, gate}``: values of the dense parameters, once the worker may begin."""
        slices, settings = self._ready
        worker, header = self._member(peer), frame.header
        if header.get("decision") is not None:
            self._apply_decision(Decision.from_json(header["decision"]), header.get("scale"))
        self._advance(int(header.get("known", 0)), settings)
        if self.index or not header.get("gate", True):
            return self._about(), slices.dense()
        self.clock.enter([worker])

        def begin() -> tuple[dict[str, Any], list[Tensor]] | None:
            return (self._about(), slices.dense()) if self.clock.may_begin(worker) else None

        answer = begin()
        if answer is None:
            self._later(peer, begin)
        return answer

    def _advance(self, known: int, settings: _Settings) -> None:
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
            self._lost_steps(lost)
            # Gradients that waited for a step which the others have behind them.
            late = [(w, p) for w, p in self._pushes.items() if p.reply is None and p.version < self.clock.version]
            if self.index == 0 and settings.consistency.kind == "bsp" and late:
                self._finish(late, accepted=False)

    def _lost_steps(self, count: int) -> None:
        self.lost += count
        self._event({"kind": "lost steps", "server": self.index, "steps": count, "version": self.version})
        print(f"{count} steps that were applied before this server was started again are lost", flush=True)

    def _rows(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """``{tables: [...]}`` with local row numbers of each: their values."""
        slices, _ = self._ready
        tables = [int(table) for table in frame.header["tables"]]
        return {}, [slices.read_rows(table, rows) for table, rows in zip(tables, frame.tensors, strict=True)]

    def _norm(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """``{decision}``: sum of squares of this server's part of a synchronous step's gradient."""
        decision = Decision.from_json(frame.header["decision"])
        if decision.version not in self._norms:
            gradient = self._mean(decision)
            self._norms[decision.version] = 0.0 if gradient is None else gradient.square_norm()
            for old in [old for old in self._norms if old < decision.version - _REMEMBERED]:
                del self._norms[old]
        return {"square": self._norms[decision.version]}, []

    def _mean(self, decision: Decision) -> Gradient | None:
        """The mean gradient of a synchronous step; None if this server, started again, has none of them."""
        if decision.version not in self._merged:
            found = self._pending.get(decision.version, {})
            gradients = [found[worker][0] for worker in decision.accepted if worker in found]
            if not gradients:
                return None
            self._merged = {decision.version: merge(gradients)}
        return self._merged[decision.version]

    def _apply_decision(self, decision: Decision, scale: float | None) -> None:
        """Apply a synchronous step, of which the first worker that tells makes it so."""
        settings = self._ready[1]
        if decision.version < self.version:
            return
        if decision.version > self.version:
            self._lost_steps(decision.version - self.version)
        gradient = self._mean(decision)
        found = self._pending.get(decision.version, {})
        missing = [worker for worker in decision.accepted if worker not in found]
        if missing:
            print(f"step {decision.version}: gradients of workers {missing} were lost with the former process", flush=True)
        if gradient is not None:
            if scale is not None:
                gradient.scale_(scale)
            if settings.clip and not settings.clip_norm:
                gradient.clamp_(settings.clip)
            first = next(worker for worker in decision.accepted if worker in found)
            self._apply(gradient, found[first][1])
        else:
            self._lost_steps(1)
        self.version = decision.version + 1
        self._merged.clear()
        self._pending = {version: waiting for version, waiting in self._pending.items() if version > decision.version}

    def _apply(self, gradient: Gradient, hyperparameters: Sequence[Mapping[str, Any]]) -> None:
        slices, _ = self._ready
        start = time.monotonic()
        slices.apply(gradient, hyperparameters)
        if self._delay is not None:
            time.sleep(max(0.0, self._delay(self.version, int(gradient.samples), self.index)))
        end = time.monotonic()
        wall = end - (self._applied_at if self._applied_at is not None else start)
        self._applied_at, self._dirty = end, True
        self._samples.append([self.version, gradient.samples, 0.0, end - start, wall])
        del self._samples[:-_SAMPLES]

    def _push(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]] | None:
        """``{number, version, samples, hyperparameters, absent, tables, items, gen}`` with dense ranges, rows and values."""
        slices, settings = self._ready
        worker, header = self._member(peer), frame.header
        version, number, session = int(header["version"]), int(header["number"]), peer.about.session
        known = self._pushes.get(worker)
        if known is not None and (known.session, known.number) == (session, number):
            if known.reply is not None:
                return known.reply, []
            self._later(peer, lambda: None if known.reply is None else (known.reply, []))
            return None
        count = len(slices.flat)
        values = iter(frame.tensors[count:])
        gradient = Gradient(
            dict(zip(slices.layout.dtypes, frame.tensors[:count], strict=True)),
            frozenset(int(number) for number in header["absent"]),
            {int(table): (next(values), next(values)) for table in header["tables"]},
            float(header["samples"]),
        )
        slices.check(gradient)
        push = self._pushes[worker] = _Push(session, number, version, header.get("items", []), int(header.get("gen", 0)))
        synchronous = settings.consistency.kind == "bsp"
        if self.index:
            if synchronous:
                if version >= self.version:
                    self._pending.setdefault(version, {})[worker] = gradient, header["hyperparameters"]
            else:
                self._apply(gradient, header["hyperparameters"])
                self.version += 1
            push.reply = self._about()
            return push.reply, []
        self._advance(version, settings)
        if synchronous:
            return self._push_synchronous(peer, worker, push, gradient, header["hyperparameters"])

        def take(failure: BaseException | None) -> None:
            if failure is not None:
                del self._pushes[worker]
                self._error(peer, getattr(failure, "kind", "unreachable"), f"the samples could not be committed: {failure}")
                return
            self.clock.push(worker, version)
            try:
                self._apply(gradient, header["hyperparameters"])
            except (ValueError, TypeError, RuntimeError) as refusal:
                self._error(peer, "bad_request", f"push: {refusal!r}")
                raise
            self.version = self.clock.version
            push.reply = {**self._about(), "accepted": True}
            self._answer(peer, (push.reply, []))
            self._settle()

        if settings.data is None or not push.items:
            take(None)
        else:
            self._in_thread(lambda: self._data_client(worker, push.gen).commit(push.items), take)
        return None

    def _push_synchronous(
        self, peer: FrameProtocol, worker: int, push: _Push, gradient: Gradient, hyperparameters: list[Any]
    ) -> tuple[dict[str, Any], list[Tensor]] | None:
        settings = self._ready[1]
        if push.version == self.clock.version:
            self._pending.setdefault(push.version, {})[worker] = gradient, hyperparameters
        outcome = self.clock.push(worker, push.version)
        self._later(peer, lambda: None if push.reply is None else (push.reply, []))
        if outcome.accepted is False:
            self._event({"kind": "dropped", "worker": worker, "version": push.version, "samples": gradient.samples})
            if settings.on_drop == "lose":
                self._finish([(worker, push)], accepted=False)
            else:
                push.reply = {**self._about(), "accepted": False}
        elif outcome.decision is not None:
            self._decided(outcome.decision)
        return None

    def _decided(self, decision: Decision) -> None:
        """A synchronous step is complete: commit its samples, then tell those who wait."""
        self._decisions[decision.version] = decision
        self._finish([(worker, self._pushes[worker]) for worker in decision.accepted if worker in self._pushes], accepted=True)

    def _finish(self, pushes: list[tuple[int, _Push]], accepted: bool) -> None:
        settings = self._ready[1]

        def commit() -> None:
            for worker, push in pushes:
                if push.items:
                    try:
                        self._data_client(worker, push.gen).commit(push.items)
                    except ServiceError as refusal:  # of a worker declared lost meanwhile: its samples come again
                        print(f"samples of worker {worker} could not be committed: {refusal}", flush=True)

        def reply(failure: BaseException | None) -> None:
            if failure is not None:
                print(f"samples could not be committed: {failure}", flush=True)
            about = self._about()
            for _, push in pushes:
                push.reply = {**about, "accepted": accepted}
            self._settle()

        if settings.data is None:
            reply(None)
        else:
            self._in_thread(commit, reply)

    def _idle(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """Nothing to train now: others need not wait for this worker."""
        decision = self.clock.idle(self._member(peer))
        if decision is not None:
            self._decided(decision)
        return self._about(), []

    def _look(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """What is going on."""
        return self._about(), []

    # ---- together -----------------------------------------------------------------------------------------------------

    def _bring(self, peer: FrameProtocol, frame: Frame) -> None:
        """``{meeting, value}``: what all others have brought, when they have."""
        worker, number = self._member(peer), int(frame.header["meeting"])
        self.meetings.bring(worker, number, (frame.header["value"], frame.tensors))
        # Who waits for others here must not be waited for there.
        paused = self.clock.own.get(worker)
        decision = self.clock.idle(worker)
        if decision is not None:
            self._decided(decision)

        def collect() -> tuple[dict[str, Any], list[Tensor]] | None:
            found = self.meetings.result(worker, number)
            if found is None:
                return None
            if paused is not None:  # all come back together: their answers are given in one go
                self.clock.resume(worker, paused)
            tensors, counts = [], []
            for _, own in found.values():
                tensors += own
                counts.append(len(own))
            return {"ranks": list(found), "values": [value for value, _ in found.values()], "counts": counts}, tensors

        self._later(peer, collect)

    def _enter(self, peer: FrameProtocol, frame: Frame) -> None:
        """``{epoch}``: begin to train it, together with all others; a late worker: the one that is going on."""
        worker = self._member(peer)
        self.meetings.enter(worker, int(frame.header["epoch"]))

        def begin() -> tuple[dict[str, Any], list[Tensor]] | None:
            if not self.meetings.entered(worker):
                return None
            # All at once: a synchronous step must wait for the last of them.
            self.clock.enter(self.meetings.present())
            return {**self._about(), "epoch": self.meetings.epoch, "meeting": self.meetings.members[worker].met,
                    "present": self.meetings.present()}, []  # fmt: skip

        self._later(peer, begin)

    def _ask(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """``{request, seen}``: want all to do something."""
        self._member(peer)
        self.meetings.ask(str(frame.header["request"]), int(frame.header["seen"]))
        return self._about(), []

    def _leave(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """``{over}``: end taking part; with ``over`` nobody may come to this run any more."""
        worker = peer.about.worker
        if self.index == 0 and worker in self.meetings.members and self.meetings.members[worker].session == peer.about.session:
            self.meetings.over |= bool(frame.header.get("over"))
            self.meetings.leave(worker)
            self._seen.pop(worker, None)
            self._pushes.pop(worker, None)
            decision = self.clock.idle(worker)
            if decision is not None:
                self._decided(decision)
        return {"ok": True}, []

    # ---- what is known ------------------------------------------------------------------------------------------------

    def _export(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """``{states, decision, scale}``: tables, and with ``states`` what the optimizer keeps."""
        slices, _ = self._ready
        tables = [table.detach() for table in slices.tables.values()]
        states, tensors = pack(slices.states() if frame.header.get("states") else {})
        return {"states": states}, [*tables, *tensors]

    def _status(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """For people and tests."""
        return {
            "server": self.index,
            "pid": os.getpid(),
            "version": self.version,
            "lost": self.lost,
            "clock": self.clock.state_dict(),
            "run": self.meetings.run,
            "epoch": self.meetings.epoch,
            "members": {str(worker): member.late for worker, member in self.meetings.members.items()},
            "samples": self._samples[-100:],
            "settings": {} if self._settings is None else {k: v for k, v in self._settings.raw.items() if k != "data"},
        }, []

    def _pulse(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        return {"ok": True}, []

    def _shutdown(self, peer: FrameProtocol, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
        """End; ``{restart}``: to be started again from the file that it writes now."""
        self.restart = bool(frame.header.get("restart"))
        if self.restart:
            self.save(wait=True)
        else:
            self._file = None  # and what is being written is written before it is removed
            if self._saving is not None:
                self._saving.result()
            self._ends()
        self.stopping = True
        return {"ok": True}, []

    # ---- disk ---------------------------------------------------------------------------------------------------------

    def save(self, wait: bool = False) -> None:
        """Write this server's part to its file, from a copy, while others go on."""
        if self.slices is None or self._settings is None or self._file is None:
            return
        if self._saving is not None and not self._saving.done():
            if not wait:
                return
            self._saving.result()
        answered = {worker: push for worker, push in self._pushes.items() if push.reply is not None}
        about = {
            "version": self.version,
            "clock": self.clock.state_dict(),
            "meetings": self.meetings.state_dict(),
            "settings": self._settings.raw,
            "lost": self.lost,
            "pushes": {str(w): [p.session, p.number, p.version, p.items, p.gen, p.reply] for w, p in answered.items()},
        }
        copied = self.slices.copy_out(about)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._saving = self._disk.submit(Slices.write_file, self._file, *copied)
        self._saved_at, self._dirty = time.monotonic(), False
        if wait or self._saving.done():
            self._saving.result()

    def _restore(self, path: Path) -> None:
        self.slices, about = Slices.load(path)
        self.version, self.lost = int(about["version"]), int(about["lost"])
        self._settings = _Settings.of(about["settings"])
        self.clock = Clock(self._settings.consistency)
        self.clock.load_state_dict(about["clock"])
        if self.index == 0:
            self.meetings.load_state_dict(about["meetings"])
            self.version = self.clock.version  # a step that was decided, but not applied, went with the former process
            now = time.monotonic()
            # Workers have as long to come back as one whose connection broke, but at least while they look for the new process.
            self._closed = dict.fromkeys(self.meetings.members, now + 10.0)
        self._pushes = {
            int(worker): _Push(session, number, version, items, gen, reply)
            for worker, (session, number, version, items, gen, reply) in about["pushes"].items()
        }
        self._start_monitor()
        self._event({"kind": "restored", "server": self.index, "version": self.version})
        print(f"goes on from {path}, version {self.version}", flush=True)

    # ---- the data-sharding server -------------------------------------------------------------------------------------

    def _data_client(self, worker: int, gen: int) -> Client:
        assert self._settings is not None and self._settings.data is not None
        client = self._data_clients.get(worker)
        if client is None:
            client = self._data_clients[worker] = Client(self._settings.data, worker)
        client.gen = gen
        return client

    def _in_thread(self, call: Callable[[], Any], then: Callable[[BaseException | None], None] | None) -> None:
        """Call the data-sharding server from a thread, in order, and go on in the loop."""
        if self._settings is None or self._settings.data is None:
            return
        future = self._thread.submit(call)
        loop = self._loop

        def done(finished: "Future[Any]") -> None:
            failure = finished.exception()
            if then is not None and loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(then, failure)

        future.add_done_callback(done)

    def _start_monitor(self) -> None:
        self._close_clients()
        if self._settings is not None and self._settings.data is not None:
            self._monitor = Client(self._settings.data, self.index, role="server", patience=5.0)
            self._known_action = 0
            self._reporting = self._reports.submit(self._monitor.join, 0, barrier=False)

    def _report(self, now: float) -> None:
        """Tell the controller how long gradients took to be applied; hear what it wants."""
        if self._reporting is not None and not self._reporting.done():
            return
        self._reported_at = now
        samples, self._samples = self._samples, []
        monitor, version, loop = self._monitor, self._known_action, self._loop
        assert monitor is not None

        def call() -> None:
            answer = monitor.report(self.version, samples, version=version)
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._obey, answer["actions"])

        self._reporting = self._reports.submit(call)

    def _obey(self, actions: Sequence[Mapping[str, Any]]) -> None:
        for action in actions:
            self._known_action = max(self._known_action, int(action["version"]))
            payload = action["payload"]
            if action["action"] == "KILL_RESTART" and payload["node"] == f"server:{self.index}":
                self._event({"kind": "restart", "server": self.index, "reason": action.get("reason", "")})
                self.save(wait=True)
                self.stopping = self.restart = True
            elif self.index == 0 and action["action"] == "BACKUP_WORKERS" and self.clock.consistency.kind == "bsp":
                decision = self.clock.set_backup(int(payload["count"]))
                if decision is not None:
                    self._decided(decision)
            elif self.index == 0 and action["action"] in ("ADJUST_BS", "ADJUST_LR"):
                self._plan = [int(action["version"]), {"action": action["action"], **payload}]
        self._settle()

    def interrupt(self) -> None:
        """End on a signal; what others still work with is kept, for whoever starts this server again."""
        if self.known_connections:
            self.save(wait=True)
            self.restart = True
        self.stopping = True

    def close(self) -> None:
        """End: let go of everything."""
        for peer in list(self._connections):
            if peer.transport is not None:
                peer.transport.close()
        self._close_clients()
        for pool in (self._thread, self._reports):
            pool.shutdown(wait=False, cancel_futures=True)
        self._disk.shutdown(wait=True)


async def serve(
    server: ParameterServer,
    host: str = "127.0.0.1",
    port: int = 0,
    idle_timeout: float = 60.0,
    ready: Callable[[int], None] = lambda port: None,
    tick_every: float = 0.1,
) -> None:
    """Serve until it is told to end, or nobody has been there for a while.

    Args:
        server: what answers.
        host: to listen on: the network of the job, not of the world.
        port: 0: any that is free.
        idle_timeout: seconds without a connection, after which it ends.
        ready: called with the port when it listens.
        tick_every: seconds between two looks at what is due.

    Raises:
        OSError: it cannot listen there.
    """
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(server.connect, host, port)
    try:
        ready(listener.sockets[0].getsockname()[1])
        while not server.stopping:
            await asyncio.sleep(tick_every)
            server.tick()
            if time.monotonic() - server.last_client > idle_timeout:
                print(f"no client for {idle_timeout:g} s: ends", flush=True)
                break
        await asyncio.sleep(0)
    finally:
        listener.close()
        server.close()


class ServerThread:
    """A parameter server in a thread of this process, for tests and small runs.

    Args:
        index: its number.
        host: to listen on.
        options: of `ParameterServer`.

    Attributes:
        address: where it listens.
        server: what answers.
    """

    def __init__(self, index: int = 0, token: str | None = None, port: int = 0, **options: Any) -> None:
        self.token = token or secrets.token_urlsafe(24)
        self.server = ParameterServer(index, self.token, **options)
        started = threading.Event()
        found: list[int] = []
        failures: list[BaseException] = []

        def ready(chosen: int) -> None:
            found.append(chosen)
            started.set()

        def run() -> None:
            try:
                asyncio.run(serve(self.server, port=port, ready=ready, tick_every=0.02))
            except BaseException as failure:
                failures.append(failure)
            finally:
                started.set()

        self._thread = threading.Thread(target=run, name=f"antdt-ps-{index}", daemon=True)
        self._thread.start()
        started.wait()
        if failures:
            raise failures[0]
        self.address = Address("127.0.0.1", found[0], self.token)

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        self.server.stopping = True
        self._thread.join()

    def __enter__(self) -> "ServerThread":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def slow(schedule: str, index: int, restarted: bool) -> Delay | None:
    """How much longer this server takes to apply a gradient, by ``{"cost": seconds, "slowdowns": [...]}`` (JSON)."""
    if not schedule:
        return None
    from strategies.antdt.inject import SleepInjector, Slowdown

    content = json.loads(schedule)
    injector = SleepInjector(0.0, [Slowdown(**each) for each in content.get("slowdowns", [])], float(content["cost"]))
    injector.begin(index, restarted)
    return injector.delay


def main(argv: Sequence[str] | None = None) -> int:
    """Run a parameter server.

    Args:
        argv: options.

    Returns:
        0: it has ended as it should; 1: it could not start, and has said why.
    """
    parser = argparse.ArgumentParser(prog="python -m strategies.antdt.ps.server", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for its address (with the token) and its part of the model")
    parser.add_argument("--index", type=int, required=True, help="number of this server; 0 is the clock")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on: the network of the job (default: this machine)"
    )
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument("--idle-timeout", type=float, default=60.0, help="end after so many seconds without a client (60)")
    parser.add_argument(
        "--grace", type=float, default=5.0, help="seconds for which a worker whose connection closed may come back"
    )
    parser.add_argument("--frame-limit", type=int, default=FRAME_LIMIT, help="largest message, in bytes")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for applying gradients (1)")
    parser.add_argument("--slow", default="", help='emulated slowness: {"cost": seconds a gradient, "slowdowns": [...]} (JSON)')
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    folder: Path = options.folder / f"ps{options.index}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "slice.safetensors"
    starts = _count_start(folder / "starts")
    former = Address.read(folder)
    token = os.environ.get("ANTDT_TOKEN") or (former.token if former is not None else secrets.token_urlsafe(24))

    def event(line: dict[str, Any]) -> None:
        with (options.folder / "ps-events.jsonl").open("a") as log:
            log.write(json.dumps({"t": time.time(), "pid": os.getpid(), **line}) + "\n")

    try:
        server = ParameterServer(
            options.index,
            token,
            file,
            options.frame_limit,
            slow(options.slow, options.index, restarted=starts > 0),
            event,
            options.grace,
            lambda: _forget(folder),
        )
    except (ValueError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1

    def ready(port: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.interrupt)
        host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
        _announce(folder, Address(host, port, token, os.getpid(), socket.gethostname()))
        print(f"server {options.index} listens on {options.host}:{port}, process {os.getpid()}", flush=True)

    try:
        asyncio.run(serve(server, options.host, options.port, options.idle_timeout, ready))
    except OSError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if not server.restart:
        _forget(folder)
    return 0


def _count_start(path: Path) -> int:
    """How often a server of this run has been started before."""
    count = int(path.read_text()) if path.exists() else 0
    path.write_text(str(count + 1))
    return count


def _forget(folder: Path) -> None:
    """Remove what the next run must not find, unless another process has it already; the workers' checkpoints have all of it."""
    address = Address.read(folder)
    if address is not None and address.pid == os.getpid():
        for name in ("server.json", "slice.safetensors", "starts"):
            (folder / name).unlink(missing_ok=True)


def _announce(folder: Path, address: Address) -> None:
    beside = folder / "server.json.new"
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        json.dump(address._asdict(), stream)
    beside.replace(folder / "server.json")


if __name__ == "__main__":
    sys.exit(main())
