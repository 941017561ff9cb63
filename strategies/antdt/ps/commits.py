"""Samples of gradients that are taken, committed at the data-sharding server."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from strategies.antdt.service.address import Address
from strategies.antdt.service.client import Client
from strategies.antdt.service.wire import ServiceError

__all__ = ["Commits", "Trained"]

Then = Callable[[BaseException | None], None]


class Trained(NamedTuple):
    """Samples that a worker's gradient was computed from.

    Attributes:
        worker: rank.
        gen: its generation at the data-sharding server.
        items: ``(sid, upto)``.
    """

    worker: int
    gen: int
    items: Sequence[Sequence[int]]


class Commits:
    """Speaks for the workers at the data-sharding server: from a thread, one call after another, while asyncio's loop goes on.

    What is to follow a call is called in the loop, with the call's failure.
    """

    def __init__(self) -> None:
        self._address: Address | None = None
        self._clients: dict[int, Client] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="antdt-ps-data")

    def connect(self, address: Address | None) -> None:
        """Commit there from now on; None: nowhere."""
        self.disconnect()
        self._address = address

    def disconnect(self) -> None:
        """Close the connections; they are made anew when there is something to commit."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def commit(self, trained: Trained, then: Then) -> None:
        """Commit the samples of one gradient, before it is taken; that there is nothing to commit is no failure."""
        if self._address is None or not trained.items:
            then(None)
        else:
            self._submit(lambda: self._client(trained).commit(trained.items), then)

    def commit_all(self, gradients: Sequence[Trained], then: Then) -> None:
        """Commit the samples of the gradients of a step, which is decided: a refusal stops neither it nor the others' samples."""

        def commit() -> None:
            for trained in gradients:
                if trained.items:
                    try:
                        self._client(trained).commit(trained.items)
                    except ServiceError as refusal:  # of a worker declared lost meanwhile: its samples come again
                        print(f"samples of worker {trained.worker} could not be committed: {refusal}", flush=True)

        if self._address is None:
            then(None)
        else:
            self._submit(commit, then)

    def give_up(self, trained: Trained) -> None:
        """A worker is lost: what it holds is given to others."""
        if self._address is not None:
            self._thread.submit(lambda: self._client(trained).leave(graceful=False))

    def close(self) -> None:
        """Let go of everything."""
        self.disconnect()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _client(self, trained: Trained) -> Client:
        assert self._address is not None
        client = self._clients.get(trained.worker)
        if client is None:
            client = self._clients[trained.worker] = Client(self._address, trained.worker)
        client.gen = trained.gen
        return client

    def _submit(self, call: Callable[[], None], then: Then) -> None:
        loop = asyncio.get_running_loop()

        def done(finished: "Future[Any]") -> None:
            if finished.cancelled():  # the server ends
                return
            failure = finished.exception()
            if not loop.is_closed():
                loop.call_soon_threadsafe(then, failure)

        self._thread.submit(call).add_done_callback(done)
