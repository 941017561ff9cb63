"""One agent a rank: it reports what was measured, receives decisions, and does what the rank must do for others (section 2.4).

Training never waits for the service but where it has no data left: requests are made by a thread.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from strategies.antdt.control.actions import AdjustBatch, AdjustLR, KillRestart, Versioned
from strategies.antdt.rank.exchange import RESTART, Exchange, Reading
from strategies.antdt.rank.peer_watch import PeerWatch
from strategies.antdt.rank.planner import StepPlan
from strategies.antdt.rank.shard_source import Call, ShardSource
from strategies.antdt.rank.step_timer import StepSample, StepTimer

__all__ = ["Agent"]


class Agent:
    """Speaks for one rank.

    Args:
        call: sends a request to the service; see `Client.call`.
        rank: of this process.
        source: of positions.
        exchange: with the other ranks.
        timer: of steps.
        version: of the decision in force when the agent starts.
        report_every: steps between two reports; there is one at least every ``report_seconds``.
        report_seconds: see there.
        on_lost: called, in the agent's thread, when the process must end at once because its launcher is gone or a peer that
            it waits for is; gets the reason.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        call: Call,
        rank: int,
        source: ShardSource,
        exchange: Exchange,
        timer: StepTimer,
        *,
        version: int = 0,
        report_every: int = 10,
        report_seconds: float = 5.0,
        on_lost: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.call, self.rank, self.source, self.exchange, self.timer = call, rank, source, exchange, timer
        self.report_every, self.report_seconds, self.clock = report_every, report_seconds, clock
        self.on_lost = on_lost or _end_process
        #: Newest decision in force on this rank.
        self.applied = version
        #: Wishes of this rank, spoken of in the next exchange: `STOP`, `SAVE`, `RESTART`.
        self.wishes = 0
        #: Seconds that training has spent in this class, not counting waits for other ranks.
        self.seconds = 0.0
        #: Seconds for which planning has waited for other ranks.
        self.waited = 0.0
        self._received: dict[int, Versioned] = {}
        self._prepared = self._given = version
        self._samples: list[StepSample] = []
        #: Optimizer steps that are done.
        self.step = 0
        #: Called when the controller wants this rank to be started again; by default, all end together.
        self.on_restart: Callable[[], None] = lambda: self.wish(RESTART)
        #: Looks after the other ranks, once `start` has been called.
        self.peers: PeerWatch | None = None
        self._told_to_end = False
        self._looked_at = clock()
        self._reported_at = clock()
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._reporting = threading.Lock()  # from taking commits to their answer
        self._stopping = False
        self._launcher = os.getppid()
        self._thread: threading.Thread | None = None

    # What the planner asks

    def announce(self, epoch: int, step: int, count: int) -> Callable[[], Reading]:
        """Tell the other ranks how many samples this one takes in a step; see `Exchange.start`."""
        self.check()
        last = self.timer.last
        with self._wake:
            wishes, self.wishes = self.wishes, 0
        answer = self.exchange.start(
            epoch, step, count, self._prepared, wishes, 0.0 if last is None else last.seconds, -1 if last is None else last.step
        )

        def timed() -> Reading:
            begun = time.perf_counter()
            reading = answer()
            self.waited += time.perf_counter() - begun
            return reading

        return timed

    def decisions(self, version: int) -> list[Versioned]:
        """Decisions for all ranks, received by all up to ``version``, that were not given before; oldest first."""
        with self._wake:
            given = [each for number, each in sorted(self._received.items()) if self._given < number <= version]
        self._given = max(self._given, version)
        return [each for each in given if isinstance(each.action, AdjustBatch | AdjustLR)]

    # What the training loop tells

    def trained(self, plan: StepPlan, step: int) -> None:
        """The optimizer step of a plan is done.

        Args:
            plan: of the step.
            step: optimizer steps so far.
        """
        begun = time.perf_counter()
        self.source.trained(plan.pieces)
        self.step = step
        self.check()
        if step % self.report_every == 0 or self.source.low:
            with self._wake:
                self._wake.notify()
        self.seconds += time.perf_counter() - begun

    def measured(self, samples: Sequence[StepSample]) -> None:
        """Take measurements for the next report."""
        with self._wake:
            self._samples += samples

    def in_force(self, decisions: Sequence[Versioned]) -> None:
        """Decisions come into force with the present step."""
        for decision in decisions:
            self.applied = max(self.applied, decision.version)

    def wish(self, flag: int) -> None:
        """Ask all ranks for something; see `Reading.flags` for the answer, some steps later."""
        with self._wake:
            self.wishes |= flag

    def check(self) -> None:
        """Raise what went wrong in the thread.

        Raises:
            ServerUnreachable: the service does not answer.
            ServiceError: it refuses; ``stale``: the group was replaced, and this process must end.
        """
        if self._failure is not None:
            raise self._failure

    def begin(self, version: int) -> None:
        """The plan in force is of this decision."""
        self.applied = self._prepared = self._given = version

    # The thread

    def told_to_end(self, told: bool) -> None:
        """Whether this process was told to end, and waits for a step on which all do: not for a peer that is gone."""
        self._told_to_end = told

    def start(self) -> None:
        """Begin to report."""
        self._thread = threading.Thread(target=self._run, name="antdt-agent", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what was not reported stays so."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        next_report = self.report_every
        while True:
            with self._wake:
                self._wake.wait(timeout=1.0)
                if self._stopping:
                    return
            if os.getppid() != self._launcher:
                self.on_lost("the process that has launched this rank is gone")
                return
            try:
                if self.peers is not None and not self._peers_well(self.peers):
                    return
                if self.source.low:
                    self.source.refill()
                if self.step >= next_report or self.clock() - self._reported_at >= self.report_seconds:
                    self.report()
                    next_report = self.step + self.report_every
            except Exception as failure:
                self._failure = failure
                return

    def report(self, errors: Sequence[Mapping[str, Any]] = ()) -> None:
        """Report now: measurements, commits and errors; receive decisions.

        Raises:
            ServerUnreachable: the service does not answer.
            ServiceError: it refuses.
        """
        with self._reporting:
            with self._wake:
                samples, self._samples = self._samples, []
            self._reported_at = self.clock()
            answer = self.call(
                "report",
                step=self.step,
                samples=[[s.step, s.count, s.data, s.compute, s.wall] for s in samples],
                node={"alive": True},
                errors=list(errors),
                items=self.source.commits(),
                version=self.applied,
            )
            self._receive(Versioned.from_json(action) for action in answer["actions"])

    def _peers_well(self, peers: PeerWatch) -> bool:
        """Look after the others; false if this process ends, because of one of them."""
        due = peers.guards and self.clock() - self._looked_at >= peers.heartbeat_timeout / 6
        if not (due or self._told_to_end):
            return True
        self._looked_at = self.clock()
        status = self.call("status")
        if self._told_to_end and not peers.all_there(status):
            self.on_lost("it was told to end, and a peer for which it would wait is gone")
            return False
        if ended := peers.end_silent(status):
            sys.stderr.write(f"AntDT: rank {', '.join(map(str, ended))} has not been heard of for long, and was ended.\n")
        return True

    def _receive(self, decisions: Any) -> None:
        new = []
        with self._wake:
            for decision in decisions:
                if decision.version in self._received or decision.version <= self.applied:
                    continue
                self._received[decision.version] = decision
                new.append(decision)
            self._prepared = max([self._prepared, *self._received])
        if any(isinstance(decision.action, KillRestart) for decision in new):
            self.on_restart()

    def flush(self) -> None:
        """Commit all that is trained, now; what a report has under way is committed too when this returns.

        Raises:
            ServerUnreachable: the service does not answer.
            ServiceError: it refuses.
        """
        with self._reporting:
            self.check()  # commits of a report that has failed are lost
            items = self.source.commits()
            if items:
                self.call("commit", items=items)


def _end_process(reason: str) -> None:
    """End without commits, checkpoints or farewells: what this process knows may be out of date."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"AntDT: {reason}: this process (rank {os.environ.get('RANK', '0')}) ends.\n")
        sys.stderr.flush()
    os._exit(1)
