"""Batches of a worker whose number nobody knows before: it takes what the data-sharding service has, and stops when all is done.

A worker that finds nothing waits while others hold samples that might come back, unless it is wanted for something else. So
that its loop is not surprised, an epoch's last item is known as such before it ends (`peek`), or is a *shadow batch*, one
sample that counts nothing.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from strategies.antdt.rank.loader import Order, Reader
from strategies.antdt.sharding.ledger import Fetched

__all__ = ["ShardBatch", "ShardLoader", "Work"]

Found = Literal["more", "end", "interrupted"]
UNBOUNDED = 2**62
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1


class Work(Protocol):
    """Where samples come from; `Client` is one."""

    def fetch(self, epoch: int, share: tuple[int, int], max: int) -> Fetched:
        """Ask for work."""

    def release(self, sid: int, start: int) -> None:
        """Give back."""


@dataclass(frozen=True)
class ShardBatch:
    """What a worker trains in one of its steps.

    Attributes:
        positions: of the samples in the epoch's order: int64 (n,).
        items: ``(sid, upto)``, to be committed when they are trained.
        starts: ``(sid, from)``, to be given back when they are not.
        count: samples that count; 0 for a shadow batch.
        seconds: that the data took.
    """

    positions: Tensor
    items: tuple[tuple[int, int], ...]
    starts: tuple[tuple[int, int], ...]
    count: int
    seconds: float = 0.0


class ShardLoader:
    """Iterates over the batches of a worker.

    Args:
        source: a ``DataLoader`` of a map-style data set: its data set, collate function and workers are used.
        order: of the samples.
        work: where they come from.
        num_samples: N.
        batch: samples of this worker's batch.
        global_batch: of all workers' batches.
        seed: of the generators while a sample is loaded.
        shard_steps: so many batches are asked for at once.
        begin: called when a pass over an epoch begins.
        interrupted: called while waiting: whether this worker is wanted for something else, or all is over.
        waits: called when waiting begins, so that others need not wait for this worker.
        limit: most batches of a pass; None: as many as there are.

    Attributes:
        current: the batch that was given last.
        batch: may be changed; holds from the next batch on.
        open: whether a pass has as many items as there are; else ``len`` tells what a worker has on average.
    """

    def __init__(
        self,
        source: DataLoader[Any],
        order: Order,
        work: Work,
        num_samples: int,
        batch: int,
        global_batch: int,
        *,
        seed: int = 0,
        shard_steps: int = 20,
        epoch: Callable[[], int] = lambda: 0,
        begin: Callable[[int], None] = lambda epoch: None,
        interrupted: Callable[[], Literal["", "wanted", "over"]] = lambda: "",
        waits: Callable[[], None] = lambda: None,
        limit: int | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError("ShardLoader: the training set is empty.")
        self.dataset = source.dataset
        self.order, self.work, self.num_samples, self.seed = order, work, num_samples, seed
        self.batch, self.global_batch, self.shard_steps = batch, global_batch, shard_steps
        self._epoch_of, self._begin, self._interrupted, self._waits = epoch, begin, interrupted, waits
        self.limit, self._given = limit, 0
        self.current: ShardBatch | None = None
        self.open = False
        self.epoch = 0
        self.ended = False
        self._ranges: deque[tuple[int, int, int]] = deque()
        self._planned: deque[ShardBatch] = deque()
        self._dry: Found = "more"
        workers = source.num_workers
        options: dict[str, Any] = {}
        if workers:
            options = {"multiprocessing_context": source.multiprocessing_context, "worker_init_fn": source.worker_init_fn,
                       "persistent_workers": True, "timeout": source.timeout}  # fmt: skip
        self._engine = DataLoader(
            Reader(source.dataset, source.collate_fn), batch_size=None, sampler=_Tasks(self), num_workers=workers,
            collate_fn=_as_it_is, pin_memory=source.pin_memory, generator=source.generator or torch.Generator(), **options,
        )  # fmt: skip

    def __len__(self) -> int:
        nominal = -(-self.num_samples // self.global_batch)
        return UNBOUNDED if self.open else nominal if self.limit is None else min(nominal, self.limit)

    def __iter__(self) -> Iterator[Any]:
        return self._pass()

    def _pass(self) -> Iterator[Any]:
        # All of this happens when the first batch is asked for: iter() is called before the epoch is known.
        self.epoch = self._epoch_of()
        self._begin(self.epoch)
        self.forget()
        self._given = 0
        while not self.ended:
            batches = iter(self._engine)
            while True:
                begun = time.perf_counter()
                item = next(batches, None)
                if item is None:
                    break
                planned = self._planned.popleft()
                self._given += 1
                self.current = ShardBatch(
                    planned.positions, planned.items, planned.starts, planned.count, time.perf_counter() - begun
                )
                yield item[0]
            if self.ended:
                return
            found = self.peek()
            if found != "more":
                self.ended = found == "end"
                self.current = ShardBatch(torch.zeros(1, dtype=torch.int64), (), (), 0)
                sample = self.order.indices(self.epoch, 0, 1).tolist()
                yield Reader(self.dataset, self._engine.dataset.collate)[self.seed, self.epoch, [(sample, [0])]][0]  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Hold nothing any more, and begin anew."""
        self._ranges.clear()
        self._planned.clear()
        self._dry, self.ended = "more", False

    def give_back(self, batch: ShardBatch) -> None:
        """A batch was not trained: others, or this worker again, may have it, and with it what follows in its ranges."""
        for sid, start in batch.starts:
            self.work.release(sid, start)
        gone = {sid for sid, _ in batch.starts}
        self._ranges = deque(held for held in self._ranges if held[0] not in gone)

    def peek(self) -> Found:
        """Whether there is another batch; waits until that is known, or this worker is wanted for something else.

        Returns:
            ``more``; ``end``: of the epoch; ``interrupted``.
        """
        if self.limit is not None and self._given >= self.limit:
            return "end"
        if self._planned or self._ranges:
            return "more"
        pause = _FIRST_PAUSE
        while True:
            found = self._fetch()
            if found != "interrupted":
                return found
            if pause == _FIRST_PAUSE:
                self._waits()
            reason = self._interrupted()
            if reason:
                return "end" if reason == "over" else "interrupted"
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _fetch(self) -> Found:
        """Ask once; ``interrupted`` means that there is nothing now."""
        fetched = self.work.fetch(self.epoch, (self.batch, self.global_batch), self.shard_steps * self.batch)
        if fetched.state == "ranges":
            self._ranges.extend((item.sid, item.lo, item.hi) for item in fetched.ranges)
            return "more"
        return "end" if fetched.state == "end" else "interrupted"

    def plan(self) -> ShardBatch | None:
        """The next batch, as large as what can be had without waiting; None if that is nothing."""
        pieces: list[tuple[int, int, int]] = []
        missing = self.batch
        while missing > 0 and (self._ranges or self._fetch() == "more"):
            sid, lo, hi = self._ranges.popleft()
            cut = min(hi, lo + missing)
            if cut < hi:
                self._ranges.appendleft((sid, cut, hi))
            pieces.append((sid, lo, cut))
            missing -= cut - lo
        if not pieces:
            return None
        upto = {sid: hi for sid, _, hi in pieces}
        starts: dict[int, int] = {}
        for sid, lo, _ in pieces:
            starts.setdefault(sid, lo)
        return ShardBatch(
            torch.cat([torch.arange(lo, hi) for _, lo, hi in pieces]),
            tuple(upto.items()),
            tuple(starts.items()),
            self.batch - missing,
        )

    def tasks(self) -> Iterator[tuple[int, int, list[tuple[list[int], list[int]]]]]:
        """What the data set's reader is to read; ends where one would have to wait."""
        while (batch := self.plan()) is not None:
            self._planned.append(batch)
            runs = _runs(batch.positions)
            indices = torch.cat([self.order.indices(self.epoch, lo, hi) for lo, hi in runs])
            yield self.seed, self.epoch, [(indices.tolist(), batch.positions.tolist())]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the service knows which samples are left."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, see `state_dict`."""


class _Tasks:
    """The sampler of the engine."""

    def __init__(self, loader: ShardLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return self.loader.tasks()

    def __len__(self) -> int:
        return UNBOUNDED


def _as_it_is(batches: Any) -> Any:
    return batches


def _runs(positions: Tensor) -> list[tuple[int, int]]:
    """Ranges of which the positions consist."""
    cuts = [0, *((positions.diff() != 1).nonzero().squeeze(1) + 1).tolist(), len(positions)]
    return [(int(positions[lo]), int(positions[hi - 1]) + 1) for lo, hi in pairwise(cuts)]
