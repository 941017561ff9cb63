"""Barrier at which the workers of a new group meet before any of them gets the number of their generation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["JoinBarrier", "Waiting"]

Peer = TypeVar("Peer")


@dataclass(frozen=True)
class Waiting(Generic[Peer]):
    """A worker at the barrier.

    Attributes:
        peer: its connection.
        session: the client object, and
        seq: its request, by which a repeated request is known.
        deadline: seconds of the clock at which it gives up.
    """

    peer: Peer
    session: str
    seq: int
    deadline: float


class JoinBarrier(Generic[Peer]):
    """Collects the workers of the next generation.

    A worker counts as long as its connection lives: one that dies here, with its group, is withdrawn, so that no new group is
    completed by a member of the old one. A worker that comes again takes its own place.

    Args:
        refuse: called with a worker, what it waited with, and why it waited in vain.
    """

    def __init__(self, refuse: Callable[[int, Waiting[Peer], str], None]) -> None:
        self._refuse = refuse
        self._world_size = 0
        self._waiting: dict[int, Waiting[Peer]] = {}

    def enter(self, worker: int, world_size: int, waiting: Waiting[Peer]) -> dict[int, Waiting[Peer]] | None:
        """Let a worker wait.

        Returns:
            All of the group, if it is complete now; the barrier is empty again.

        Raises:
            ValueError: the worker's number is not below the group's size.
        """
        if not 0 <= worker < world_size:
            raise ValueError(f"join: worker {worker} cannot be in a group of {world_size}; workers count from 0.")
        if world_size != self._world_size:
            self._refuse_all(f"a group of {world_size} workers forms in place of one of {self._world_size}; join again.")
            self._world_size = world_size
        former = self._waiting.get(worker)
        if former is not None and (former.session, former.seq) != (waiting.session, waiting.seq):
            self._refuse(worker, former, f"another process has joined as worker {worker}.")
        self._waiting[worker] = waiting
        if len(self._waiting) < world_size:
            return None
        complete, self._waiting = self._waiting, {}
        return complete

    @property
    def workers(self) -> list[int]:
        """Who waits."""
        return sorted(self._waiting)

    def withdraw(self, peer: Peer) -> None:
        """A connection has closed."""
        self._waiting = {worker: waiting for worker, waiting in self._waiting.items() if waiting.peer != peer}

    def expire(self, now: float) -> None:
        """Refuse those whose time is over."""
        missing = [worker for worker in range(self._world_size) if worker not in self._waiting]
        for worker, waiting in list(self._waiting.items()):
            if now >= waiting.deadline:
                del self._waiting[worker]
                shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
                self._refuse(
                    worker,
                    waiting,
                    f"{len(missing)} of {self._world_size} workers have not joined in time: {shown}. Look at their logs.",
                )

    def _refuse_all(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for worker, each in waiting.items():
            self._refuse(worker, each, reason)
