"""What a parameter server tells the controller: how long it takes for a gradient; and what the controller tells it."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from strategies.antdt.service.address import Address
from strategies.antdt.service.client import Client

__all__ = ["Reports"]

_MOST = 1000  # measurements that are kept for the next report


class Reports:
    """Measurements of a server, and a thread that reports them.

    Args:
        index: number of the server.
        obey: called in asyncio's loop with the controller's decisions that `known` did not know of.

    Attributes:
        samples: ``[step, samples, 0, seconds, seconds since the one before]`` of each gradient not yet reported.
        known: newest decision of the controller that was obeyed; whoever obeys counts.
    """

    def __init__(self, index: int, obey: Callable[[Sequence[Mapping[str, Any]]], None]) -> None:
        self._index, self._obey = index, obey
        self.samples: list[list[float]] = []
        self.known = 0
        self._applied_at: float | None = None
        self._monitor: Client | None = None
        self._joined = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="antdt-ps-report")
        self._reporting: Future[Any] | None = None
        self._reported_at = time.monotonic()

    def connect(self, address: Address | None) -> None:
        """Report there from now on; None: nowhere."""
        self.disconnect()
        if address is not None:
            self._monitor = Client(address, self._index, role="server", patience=5.0)
            self.known, self._joined = 0, False
            self._reporting = self._thread.submit(self._join, self._monitor)

    def _join(self, monitor: Client) -> None:
        monitor.join(0, barrier=False)
        self._joined = True

    def disconnect(self) -> None:
        """Report nowhere."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def begin(self) -> None:
        """Nothing was measured so far."""
        self.samples, self._applied_at = [], None

    def measure(self, step: int, samples: float, begun: float, ended: float) -> None:
        """A gradient was applied.

        Args:
            step: of this server's part.
            samples: of the gradient.
            begun: when (``time.monotonic``), and
            ended: when it was done.
        """
        wall = ended - (self._applied_at if self._applied_at is not None else begun)
        self._applied_at = ended
        self.samples.append([step, samples, 0.0, ended - begun, wall])
        del self.samples[:-_MOST]

    def tick(self, now: float, every: float, step: int) -> None:
        """Report if it is time to, and the report before has been answered.

        Args:
            now: ``time.monotonic``.
            every: seconds between two reports.
            step: that this server has come to.
        """
        monitor = self._monitor
        if monitor is None or now - self._reported_at < every or (self._reporting is not None and not self._reporting.done()):
            return
        self._reported_at = now
        samples, self.samples = self.samples, []
        known, loop = self.known, asyncio.get_running_loop()

        def report() -> None:
            if not self._joined:  # it did not answer when this server came
                self._join(monitor)
            answer = monitor.report(step, samples, version=known)
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._obey, answer["actions"])

        self._reporting = self._thread.submit(report)

    def close(self) -> None:
        """Let go of everything."""
        self.disconnect()
        self._thread.shutdown(wait=False, cancel_futures=True)
