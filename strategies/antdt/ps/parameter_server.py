"""A parameter server: what it answers to each request, and what it does by itself.

Gradients are applied one after another. Server 0 is also the *clock*: it says when a step may begin, which gradients count, who
takes part, and commits the samples of a gradient together with taking it.
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strategies.antdt.ps.clock import Clock
from strategies.antdt.ps.commits import Commits
from strategies.antdt.ps.deferred import Answer, Deferred
from strategies.antdt.ps.dispatch import Caller, Dispatcher
from strategies.antdt.ps.frames import Frame, FrameProtocol, pack, unpack
from strategies.antdt.ps.meeting import Meetings
from strategies.antdt.ps.membership import Membership
from strategies.antdt.ps.partition import Layout
from strategies.antdt.ps.remote_optimizer import OptimizerSpec
from strategies.antdt.ps.reports import Reports
from strategies.antdt.ps.settings import Settings
from strategies.antdt.ps.slice_file import SliceFile
from strategies.antdt.ps.slices import Slices
from strategies.antdt.ps.steps import Delay, Steps
from strategies.antdt.service.wire import ServiceError

__all__ = ["FRAME_LIMIT", "ParameterServer"]

FRAME_LIMIT = 2**32
"""Largest frame, in bytes, between those who share the token, unless told otherwise."""
_LOOKING = 10.0  # seconds in which workers find a server that was started again, at least


class ParameterServer:
    """Answers requests; it knows no sockets but through `Dispatcher`.

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
        dispatcher: its connections.
        last_client: when somebody was there last (``time.monotonic``).
        stopping: whether it has been told to end.
        restart: whether it has been told to end so that it is started again.

    Raises:
        ValueError: ``slice_file`` is no file of a server.
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
        self.index, self._frame_limit, self._event, self._ends = index, frame_limit, event, ends
        self.stopping = self.restart = False
        self._process = secrets.token_hex(8)
        self.last_client = time.monotonic()
        self._meetings, self._deferred = Meetings(), Deferred()
        self._file, self._commits, self._reports = SliceFile(slice_file), Commits(), Reports(index, self._obey)
        self._steps = Steps(index, self._meetings, self._deferred, self._commits, self._reports, event, delay)
        self._membership = Membership(self._meetings, self._steps, self._deferred, event, self._begin_run, grace, start_timeout)
        self.dispatcher = Dispatcher(
            token,
            {
                "configure": self._configure,
                "pull": self._steps.pull,
                "rows": self._rows,
                "norm": self._steps.norm,
                "push": self._steps.push,
                "idle": self._idle,
                "look": self._look,
                "bring": self._membership.bring,
                "remember": self._membership.remember,
                "enter": self._membership.enter,
                "ask": self._membership.ask,
                "leave": self._membership.leave,
                "export": self._export,
                "status": self._status,
                "pulse": self._pulse,
                "shutdown": self._shutdown,
            },
            self._deferred,
            greet=self._greet,
            heard=self._heard,
            gone=self._membership.gone,
            is_closing=lambda: self.stopping and self.restart,
        )
        found = self._file.load()
        if found is not None:
            self._restore(*found)

    @property
    def clock(self) -> Clock:
        """Counts steps, and knows who is waited for; in use on server 0."""
        return self._steps.clock

    @property
    def version(self) -> int:
        """Steps applied to this server's part."""
        return self._steps.version

    @property
    def lost(self) -> int:
        """Steps that were applied once, and were not in the file from which this server was started again."""
        return self._steps.lost

    # ---- coming -------------------------------------------------------------------------------------------------------

    def _greet(self, peer: FrameProtocol, header: dict[str, Any]) -> Answer:
        """``{worker, session, role}``: who is there; of workers that take part, the clock hears more."""
        if self.stopping:
            raise ServiceError("ending", f"server {self.index} is about to end.")
        worker, session, role = int(header["worker"]), str(header["session"]), header.get("role")
        peer.limit = self._frame_limit
        caller = Caller(-1 if role == "guest" else worker, session, pulse=role in ("pulse", "guest"))
        peer.about = caller
        answer: dict[str, Any] = {
            "server": self.index,
            "process": self._process,
            "version": self.version,
            "configured": self._steps.slices is not None,
        }
        if self.index == 0 and not caller.pulse:
            answer |= self._membership.hello(caller, header)
            self.last_client = time.monotonic()
        return answer, []

    def _heard(self, caller: Caller) -> None:
        self.last_client = time.monotonic()
        self._membership.heard(caller)

    def _begin_run(self) -> None:
        self._steps.forget_workers()
        self._commits.disconnect()
        self._reports.disconnect()

    # ---- setting up ---------------------------------------------------------------------------------------------------

    def _configure(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """``{layout, optimizer, row_update, settings, version, states}`` with dense ranges, tables, and states."""
        header = frame.header
        layout, optimizer = Layout.from_json(header["layout"]), OptimizerSpec.from_json(header["optimizer"])
        slices = Slices(layout, self.index, optimizer, header["row_update"])
        count = len(layout.dtypes)
        slices.write(frame.tensors[:count], dict(zip(layout.tables, frame.tensors[count:], strict=False)))
        slices.load_states(unpack(header["states"], frame.tensors[count + len(layout.tables) :]))
        settings = Settings.of(header["settings"])
        self._steps.configure(slices, settings, int(header["version"]))
        self._event({"kind": "configure", "server": self.index, "version": self.version, "bytes": layout.state_bytes(self.index)})
        self._commits.connect(settings.data)
        self._reports.begin()
        self._reports.connect(settings.data)
        self.save()
        return {"ok": True}, []

    def _restore(self, slices: Slices, about: Mapping[str, Any]) -> None:
        self._steps.restore(slices, about)
        if self.index == 0:
            self._meetings.load_state_dict(about["meetings"])
            # Workers have as long to come back as one whose connection broke, after two signs of life would have come.
            self._membership.expect_back(max(_LOOKING, self._steps.ready[1].heartbeat_timeout / 3))
        data = self._steps.ready[1].data
        self._commits.connect(data)
        self._reports.connect(data)
        self._event({"kind": "restored", "server": self.index, "version": self.version})
        print(f"goes on from {self._file.path}, version {self.version}", flush=True)

    # ---- what is known ------------------------------------------------------------------------------------------------

    def _rows(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """``{tables: [...]}`` with local row numbers of each: their values."""
        slices, _ = self._steps.ready
        tables = [int(table) for table in frame.header["tables"]]
        return {}, [slices.read_rows(table, rows) for table, rows in zip(tables, frame.tensors, strict=True)]

    def _export(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """``{states}``: tables, and with ``states`` what the optimizer keeps."""
        slices, _ = self._steps.ready
        tables = [table.detach() for table in slices.tables.values()]
        states, tensors = pack(slices.states() if frame.header.get("states") else {})
        return {"states": states}, [*tables, *tensors]

    def _look(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """What is going on."""
        return self._steps.about(), []

    def _status(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """For people and tests."""
        settings = self._steps.settings
        return {
            "server": self.index,
            "pid": os.getpid(),
            "version": self.version,
            "lost": self.lost,
            "clock": self.clock.state_dict(),
            "run": self._meetings.run,
            "epoch": self._meetings.epoch,
            "members": {str(worker): member.late for worker, member in self._meetings.members.items()},
            "samples": self._reports.samples[-100:],
            "settings": {} if settings is None else {k: v for k, v in settings.raw.items() if k != "data"},
        }, []

    # ---- signs of life, idleness, the end -----------------------------------------------------------------------------

    def _pulse(self, peer: FrameProtocol, frame: Frame) -> Answer:
        return {"ok": True}, []

    def _idle(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """Nothing to train now: others need not wait for this worker."""
        self._steps.idle(self._steps.member(peer))
        return self._steps.about(), []

    def _shutdown(self, peer: FrameProtocol, frame: Frame) -> Answer:
        """End; ``{restart}``: to be started again from the file that it writes now."""
        self.restart = bool(frame.header.get("restart"))
        if self.restart:
            self.save(wait=True)
        else:
            self._file.abandon()
            self._ends()
        self.stopping = True
        return {"ok": True}, []

    # ---- what it does by itself ---------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Do what is due: declare the silent lost, save, report; called in asyncio's loop."""
        now = time.monotonic()
        if self.index == 0:
            self._membership.tick(now)
        settings = self._steps.settings
        if settings is not None:
            if (self._steps.unsaved or self._file.failed) and now - self._file.saved_at >= settings.save_every:
                self._save_or_say(now)
            self._reports.tick(now, settings.report_every, self.version)
        if self.dispatcher.num_known:
            self.last_client = now

    def save(self, wait: bool = False) -> None:
        """Write this server's part to its file, from a copy, while others go on.

        Args:
            wait: until it is written.
        """
        slices = self._steps.slices
        if slices is not None:
            about = {**self._steps.state_dict(), "meetings": self._meetings.state_dict()}
            if self._file.save(slices, about, wait):
                self._steps.unsaved = False

    def _save_or_say(self, now: float) -> None:
        """Save; a full disk does not end training, but is told, and tried again after a while."""
        try:
            self.save()
        except OSError as failure:
            self._steps.unsaved, self._file.saved_at = True, now
            self._event({"kind": "not saved", "server": self.index, "version": self.version, "reason": str(failure)})
            print(f"{self._file.path} could not be written: {failure}", flush=True)

    def _obey(self, actions: Sequence[Mapping[str, Any]]) -> None:
        """Do what the controller has decided."""
        for action in actions:
            self._reports.known = max(self._reports.known, int(action["version"]))
            payload = action["payload"]
            if action["action"] == "KILL_RESTART" and payload["node"] == f"server:{self.index}":
                self._event({"kind": "restart", "server": self.index, "reason": action.get("reason", "")})
                self.save(wait=True)
                self.stopping = self.restart = True
            elif self.index == 0 and action["action"] == "BACKUP_WORKERS":
                self._steps.set_backup(int(payload["count"]))
            elif self.index == 0 and action["action"] in ("ADJUST_BS", "ADJUST_LR"):
                self._steps.plan = [int(action["version"]), {"action": action["action"], **payload}]
        self._deferred.settle()

    def interrupt(self) -> None:
        """End on a signal; what others still work with is kept, for whoever starts this server again."""
        if self.dispatcher.num_known:
            self.save(wait=True)
            self.restart = True
        self.stopping = True

    def close(self) -> None:
        """End: let go of everything."""
        self.dispatcher.close()
        self._commits.close()
        self._reports.close()
        self._file.close()
