"""The connections of a parameter server: who is at their other ends, and which operation answers a request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strategies.antdt.ps.deferred import Answer, Deferred
from strategies.antdt.ps.frames import STRANGER_LIMIT, Frame, FrameProtocol
from strategies.antdt.ps.meeting import MeetingError
from strategies.antdt.service.wire import ServiceError, same_token

__all__ = ["Caller", "Dispatcher", "Operation"]

Operation = Callable[[FrameProtocol, Frame], Answer | None]
"""Answers a request; None: it is answered later."""


@dataclass(frozen=True)
class Caller:
    """Who is at the other end of a connection, which keeps it as its ``about``.

    Attributes:
        worker: rank; -1 for somebody who only looks.
        session: of its process.
        pulse: whether nothing but signs of life comes this way, so that its end says nothing about the worker.
    """

    worker: int
    session: str
    pulse: bool


class Dispatcher:
    """Takes requests, and has them answered; a stranger must show the token first.

    Args:
        token: that connections must show.
        operations: by name.
        deferred: requests that wait, of which each request may make some answerable.
        greet: answers the first request of a connection, and sets its ``about`` and ``limit``.
        heard: called when somebody known asks for something.
        gone: called when the last connection of a worker's process has closed.
        is_closing: whether no request is taken any more: what is applied now would be lost with this process. Connections are
            closed then, so that requests are sent again, to the next process.
    """

    def __init__(
        self,
        token: str,
        operations: Mapping[str, Operation],
        deferred: Deferred,
        *,
        greet: Callable[[FrameProtocol, dict[str, Any]], Answer],
        heard: Callable[[Caller], None],
        gone: Callable[[Caller], None],
        is_closing: Callable[[], bool],
    ) -> None:
        self._token, self._operations, self._deferred = token, operations, deferred
        self._greet, self._heard, self._gone, self._is_closing = greet, heard, gone, is_closing
        self._connections: set[FrameProtocol] = set()

    def connect(self) -> FrameProtocol:
        """Asyncio's factory of connections."""
        peer = FrameProtocol(self._received, self._disconnected, STRANGER_LIMIT)
        self._connections.add(peer)
        return peer

    @property
    def num_known(self) -> int:
        """Connections that have shown the token."""
        return sum(peer.about is not None for peer in self._connections)

    def close(self) -> None:
        """Close all connections."""
        for peer in list(self._connections):
            if peer.transport is not None:
                peer.transport.close()

    def _received(self, peer: FrameProtocol, frame: Frame) -> None:
        """Answer a request, now or later."""
        header = frame.header
        if self._is_closing():
            if peer.transport is not None:
                peer.transport.close()
            return
        try:
            if peer.about is None:
                if header.get("op") != "hello" or not same_token(header.get("token"), self._token):
                    peer.refuse("token", "the token is wrong; it is in server.json of the server's folder.")
                    return
                peer.send(*self._greet(peer, header))
            else:
                self._heard(peer.about)
                operation = self._operations.get(str(header.get("op")))
                if operation is None:
                    raise ServiceError("bad_request", f"there is no request {header.get('op')!r}.")
                answer = operation(peer, frame)
                if answer is not None:
                    peer.send(*answer)
            self._deferred.settle()
        except (ServiceError, MeetingError) as refusal:
            peer.deny(refusal.kind, str(refusal))
        except (ValueError, TypeError, KeyError, RuntimeError, IndexError) as refusal:
            peer.deny("bad_request", f"{header.get('op')}: {refusal!r}")

    def _disconnected(self, peer: FrameProtocol) -> None:
        self._connections.discard(peer)
        self._deferred.forget(peer)
        about: Caller | None = peer.about
        if about is not None and not about.pulse and not any(
            other.about is not None and not other.about.pulse and other.about.session == about.session
            for other in self._connections
        ):  # fmt: skip
            self._gone(about)
