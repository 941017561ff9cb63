"""Positions for one rank, from the data-sharding service: fetched ahead, committed when trained, given back when too many."""

import threading
import time
from collections.abc import Callable
from typing import Any

from strategies.antdt.rank.shard_buffer import Piece, ShardBuffer

__all__ = ["Call", "ShardSource"]

Call = Callable[..., dict[str, Any]]
"""``call(op, **fields) -> answer``: a request to the service."""


class ShardSource:
    """Holds what a rank was given, and asks for more before it runs out.

    Args:
        call: sends a request.
        global_batch: B.
        shard_steps: so many steps' samples are asked for at once. With 1 nothing is fetched ahead of its step, and then the
            global batch of step s holds exactly the positions ``[s B, (s + 1) B)``, as that of one process does.
    """

    def __init__(self, call: Call, global_batch: int, shard_steps: int) -> None:
        self.call, self.global_batch, self.shard_steps = call, global_batch, shard_steps
        self.epoch = 0
        self._buffer = ShardBuffer()
        self._share = self._room = 0
        self._dry = True
        self._commits: dict[int, int] = {}
        self._lock = threading.Lock()  # of what is held
        self._calls = threading.Lock()  # of requests; taken first. Training waits for one under way only if it needs its answer

    def __len__(self) -> int:
        return len(self._buffer)

    # PositionSource

    def begin(self, epoch: int) -> None:
        """Forget what is held; from now on, positions are of this epoch."""
        with self._calls, self._lock:
            self.epoch, self._dry = epoch, False
            self._share = self._room = 0
            self._buffer.clear()

    def take(self, count: int, room: int) -> list[Piece]:
        """Up to ``count`` positions; fewer only if the service has no more."""
        with self._lock:
            self._share, self._room = count, room
            if len(self._buffer) >= count:
                return self._take(count)
        with self._calls:
            while len(self._buffer) < count and not self._dry:
                self._fetch()
            with self._lock:
                return self._take(count)

    def _take(self, count: int) -> list[Piece]:
        self._room -= count
        return self._buffer.take(count)

    def resize(self, room: int) -> None:
        """Give back what is held above ``room``."""
        with self._calls:
            with self._lock:
                freed = self._buffer.shrink(room)
                self._room = room
            for sid, start in freed:
                self.call("release", sid=sid, **{"from": start})

    def reopen(self) -> None:
        """Others have given back: there may be more, though there was none."""
        with self._calls, self._lock:
            self._dry = False

    # Ahead of time, from another thread

    @property
    def low(self) -> bool:
        """Whether it is time to `refill`."""
        ahead = self._share * (self.shard_steps // 2)
        return not self._dry and len(self._buffer) < min(ahead, self._room)

    def refill(self) -> None:
        """Fetch once, if little is left."""
        with self._calls:
            if self.low:
                self._fetch()

    def _fetch(self) -> None:
        with self._lock:
            # What is taken while the request is under way leaves as much less room as it leaves less held.
            most = min(self.shard_steps * self._share, self._room - len(self._buffer))
            share = self._share
        answer = self.call("fetch", epoch=self.epoch, share=[share, self.global_batch], max=most)
        if "wait" in answer:
            time.sleep(float(answer["wait"]))
            return
        with self._lock:
            if "ranges" in answer:
                self._buffer.add((sid, lo, hi) for sid, lo, hi in answer["ranges"])
            else:
                self._dry = True

    # What is trained

    def trained(self, pieces: tuple[Piece, ...]) -> None:
        """Note positions whose optimizer step is done; they are committed with the next report."""
        with self._lock:
            for sid, _, hi in pieces:
                self._commits[sid] = hi

    def commits(self) -> list[list[int]]:
        """Take what is to be committed, ``[[sid, upto], ...]``; the caller is responsible for it from now on."""
        with self._lock:
            items, self._commits = self._commits, {}
        return [[sid, upto] for sid, upto in items.items()]
