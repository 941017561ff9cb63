"""Who takes part in a run, and where those who do meet: collective calls without a process group, which a death does not break.

A state machine without input or output. All that workers do together (start of an epoch, barriers, broadcasts, reductions) goes
through it; a worker that is lost is no longer waited for, and one that comes later is let in when the others are training, never
between two meetings that it would not know of.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MeetingError", "Meetings", "Member"]


class MeetingError(RuntimeError):
    """A worker cannot take part; the message says why.

    Attributes:
        kind: ``stale``; ``over``: the run has ended; ``ending``: not yet, the run before is about to end.
    """

    def __init__(self, message: str, kind: str = "stale") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Member:
    """A worker.

    Attributes:
        session: of its process.
        late: it came while others were training, and has not yet been let in.
        met: meetings it has been at.
        epoch: the epoch that it waits to enter, if it does.
    """

    session: str
    late: bool = False
    met: int = 0
    epoch: int | None = None


@dataclass
class _Meeting:
    """What has been brought to a meeting, and who has not taken the result home."""

    brought: dict[int, Any] = field(default_factory=dict)
    result: dict[int, Any] | None = None
    expected: set[int] = field(default_factory=set)


class Meetings:
    """The members of one run after another.

    A run begins when the first worker comes, and ends when all have said `leave`, or are lost.

    Attributes:
        run: name of the run; empty when there is none.
        members: who is alive.
        epoch: the one being trained; -1 before the first.
        requests: how often all members were asked for something: ``stop``, ``save``.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.run, self.world_size, self.group = "", 0, ""
        self.members: dict[int, Member] = {}
        self.epoch = -1
        self.admits = False
        """Whether a late worker may be let in now."""
        self.broken = ""
        self.over = False
        self.requests = {"stop": 0, "save": 0}
        self._meetings: dict[int, _Meeting] = {}
        self._next = 0

    # ---- coming and going ---------------------------------------------------------------------------------------------

    def hello(self, worker: int, world_size: int, session: str, run: str = "", group: str = "", joins: str = "") -> Member:
        """A process presents itself, or comes back over a new connection.

        Args:
            worker: rank.
            world_size: W.
            session: of the process.
            run: that it takes part in; empty: it is new.
            joins: the run that it is to take part in, as a new process; empty: any.
            group: of processes that were started together.

        Raises:
            MeetingError: another run is going on, or this one cannot go on.
        """
        if run and run != self.run:
            raise MeetingError(f"worker {worker} belongs to a run that has ended; it must exit.", kind="over")
        if joins and joins != self.run:
            raise MeetingError(f"the run that worker {worker} was to join has ended.", kind="over")
        known = self.members.get(worker)
        if known is not None and known.session == session:
            return known
        if run:
            raise MeetingError(f"worker {worker} was declared lost, and its samples given to others; start it again.")
        if self.over:
            raise MeetingError("the run before is ending; try again.", kind="ending")
        if self.members and group != self.group:
            self._reset()  # all of the former group are dead
        if known is not None:
            self.lost(worker)
        if self.broken:
            raise MeetingError(self.broken)
        if not self.members:
            self._reset()
            self.run, self.world_size, self.group = secrets.token_hex(8), world_size, group
        if not 0 <= worker < self.world_size or world_size != self.world_size:
            raise MeetingError(f"worker {worker} of {world_size} comes to a run of {self.world_size} workers.")
        self.members[worker] = Member(session, late=self.epoch >= 0)
        return self.members[worker]

    def leave(self, worker: int) -> None:
        """A worker has done with the run; when all have, it is over."""
        self.members.pop(worker, None)
        if not self.members:
            self._reset()

    def lost(self, worker: int) -> None:
        """A worker is gone."""
        if self.members.pop(worker, None) is None:
            return
        if not self.members:
            self._reset()
        elif self.epoch < 0 and not self.broken:
            self.broken = f"worker {worker} has ended before training began; look at its log, and start all workers again."

    def give_up(self, seconds: float) -> None:
        """Some have not come in time."""
        missing = [worker for worker in range(self.world_size) if worker not in self.members]
        shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        self.broken = (
            f"{len(missing)} of {self.world_size} workers have not come within {seconds:g} s: {shown}; look at their logs. A"
            " worker that was to join a run which has ended meanwhile may be left to end."
        )

    def present(self) -> list[int]:
        """Ranks of the members that have been let in, in ascending order."""
        return sorted(worker for worker, member in self.members.items() if not member.late)

    def confirm(self, worker: int, session: str) -> None:
        """See that a process takes part.

        Raises:
            MeetingError: it does not, or not any more.
        """
        member = self.members.get(worker)
        if member is None or member.session != session:
            raise MeetingError(f"worker {worker} was declared lost, or replaced by a new process; it must exit.")

    @property
    def complete(self) -> bool:
        """Whether all workers have come, or training began without some."""
        return self.epoch >= 0 or len(self.members) == self.world_size

    # ---- meetings -----------------------------------------------------------------------------------------------------

    def bring(self, worker: int, number: int, value: Any) -> None:
        """Come to a meeting; the same again is fine.

        Raises:
            MeetingError: the run cannot go on.
        """
        self._check(worker)
        self.admits = False
        meeting = self._meetings.setdefault(number, _Meeting())
        if meeting.result is None:
            meeting.brought[worker] = value

    def result(self, worker: int, number: int) -> dict[int, Any] | None:
        """What all have brought, by rank; None while somebody is missing.

        Raises:
            MeetingError: the run cannot go on.
        """
        self._check(worker)
        meeting = self._meetings[number]
        if meeting.result is None and self.complete and set(self.present()) <= meeting.brought.keys():
            meeting.result = dict(sorted(meeting.brought.items()))
            self._next = max(self._next, number + 1)
            for old in [old for old in self._meetings if old < number - 1]:
                del self._meetings[old]
        return meeting.result

    def remember(self, worker: int, about: Mapping[str, Any], result: dict[int, Any] | None) -> None:
        """Be told by a member what the former process told it and may not have told others: they wait for it.

        Args:
            worker: the member; it was let in.
            about: ``epoch`` that it has entered, ``requests`` that it knows of, and number of the ``meeting`` before its next.
            result: of that meeting; None: it has not been at one.

        Raises:
            MeetingError: the run cannot go on.
        """
        self._check(worker)
        self.members[worker].late = False
        self.epoch = max(self.epoch, int(about["epoch"]))
        self.requests = {request: max(count, int(about["requests"].get(request, 0))) for request, count in self.requests.items()}
        number = int(about["meeting"])
        self._next = max(self._next, number + 1)
        if result is not None:
            self._meetings.setdefault(number, _Meeting()).result = result

    def _check(self, worker: int) -> None:
        if self.broken:
            raise MeetingError(self.broken)
        if worker not in self.members:
            raise MeetingError(f"worker {worker} does not take part in this run, or was declared lost.")

    # ---- epochs -------------------------------------------------------------------------------------------------------

    def enter(self, worker: int, epoch: int) -> None:
        """A worker wants to train an epoch, a late one any.

        Raises:
            MeetingError: the run cannot go on.
        """
        self._check(worker)
        self.members[worker].epoch = epoch

    def entered(self, worker: int) -> bool:
        """Whether a worker that wants to may begin: all that are present want to, or it was let in.

        Raises:
            MeetingError: the run cannot go on.
        """
        self._check(worker)
        member = self.members[worker]
        if member.epoch is None:
            return True
        if member.late:
            if not self.present():  # nobody is left who could be at a meeting
                self._meetings.clear()
                self.admits = True
            if self.admits:
                self._admit(member)
            return member.epoch is None
        if member.epoch <= self.epoch:
            member.epoch = None
            return True
        waiting = [self.members[rank] for rank in self.present()]
        if self.complete and all(other.epoch == member.epoch for other in waiting):
            self.epoch, self.admits = member.epoch, True
            for other in waiting:
                other.epoch = None
            for other in self.members.values():
                if other.late and other.epoch is not None:
                    self._admit(other)
        return member.epoch is None

    def _admit(self, member: Member) -> None:
        member.late, member.epoch, member.met = False, None, self._next

    def ask(self, request: str, seen: int) -> None:
        """Somebody, who knows of ``seen`` requests, wants all to do something."""
        if self.requests[request] <= seen:
            self.requests[request] = seen + 1
            self.admits = False

    # ---- what is kept -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a server that is started again must know of the run."""
        return {
            "run": self.run,
            "world_size": self.world_size,
            "group": self.group,
            "members": {str(worker): [m.session, m.late] for worker, m in self.members.items()},
            "epoch": self.epoch,
            "requests": dict(self.requests),
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` has written; what was brought to a meeting is brought again by those who wait.

        What came of one that some have behind them they tell, see `remember`.
        """
        self._reset()
        self.run, self.world_size, self.epoch = state["run"], int(state["world_size"]), int(state["epoch"])
        self.group = state["group"]
        self.members = {int(worker): Member(session, late) for worker, (session, late) in state["members"].items()}
        self.requests, self._next = dict(state["requests"]), int(state["next"])
