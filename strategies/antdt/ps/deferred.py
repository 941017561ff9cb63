"""Requests that are answered later, when what they wait for has happened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strategies.antdt.ps.frames import FrameProtocol
from strategies.antdt.ps.meeting import MeetingError

__all__ = ["Answer", "Deferred"]

Answer = tuple[dict[str, Any], Sequence[Tensor]]
"""Header and tensors of a frame."""


@dataclass
class _Waiting:
    """A request that is answered when ``answer`` gives something."""

    peer: FrameProtocol
    answer: Callable[[], Answer | None]


class Deferred:
    """The requests that wait, in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []

    def add(self, peer: FrameProtocol, answer: Callable[[], Answer | None]) -> None:
        """Let a request wait.

        Args:
            peer: who asks.
            answer: gives the answer, or None as long as there is none; may raise `MeetingError`.
        """
        self._waiting.append(_Waiting(peer, answer))

    def forget(self, peer: FrameProtocol) -> None:
        """Nobody waits at this connection any more."""
        self._waiting = [waiting for waiting in self._waiting if waiting.peer is not peer]

    def settle(self) -> None:
        """Answer what can be answered now; an answer may make another possible."""
        again = True
        while again:
            again = False
            for waiting in list(self._waiting):
                answer: Answer | None
                try:
                    answer = waiting.answer()
                except MeetingError as refusal:
                    answer = {"error": {"kind": refusal.kind, "message": str(refusal)}}, []
                if answer is not None and waiting in self._waiting:
                    self._waiting.remove(waiting)
                    waiting.peer.send(*answer)
                    again = True
