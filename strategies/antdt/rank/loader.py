"""Batches of steps: one item is what this rank trains in one step of all ranks, in whatever pieces it was given it.

An epoch has exactly ``ceil(N / B)`` items on every rank, so that loops and schedules that count batches are right; what a step
holds, and in which micro-batches, is planned some steps ahead (`StepPlanner`) and loaded by a plain ``DataLoader`` with its
workers. A rank that has nothing left in the last step of an epoch gets a *shadow batch*, one sample of weight 0, so that it
takes part in every collective.

Numbers that a data set draws from the global generators (of torch, Python, numpy) are a function of (seed, epoch, position) and
not of the rank or worker that happens to load the sample.
"""

import contextlib
import hashlib
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from strategies.antdt.rank.exchange import Reading
from strategies.antdt.rank.planner import StepPlan, StepPlanner
from strategies.antdt.rank.weighting import split_evenly

__all__ = ["Order", "Reader", "SamplerOrder", "StepBatch", "StepLoader", "SupportsRange"]


@runtime_checkable
class SupportsRange(Protocol):
    """An iterable data set of which any part can be read."""

    def __getrange__(self, lo: int, hi: int) -> Any:
        """The samples ``lo .. hi - 1``, in order."""

    def __len__(self) -> int:
        """Number of samples."""


class Order(Protocol):
    """The sample at a position; see `SampleOrder`."""

    def indices(self, epoch: int, lo: int, hi: int) -> Tensor:
        """Sample indices of the positions ``lo .. hi - 1`` of an epoch: int64 (hi - lo,)."""


@dataclass(frozen=True)
class StepBatch:
    """Samples of a rank in a step.

    Attributes:
        plan: of the step.
        micros: batches, as the data set's collate function makes them.
        positions: of the samples of each micro-batch in the epoch's order: int64 (n_c,).
        reading: what all ranks do in the step.
        seconds: that the data took, waiting for other ranks not included.
        begun: when they were asked for (``time.perf_counter``).
    """

    plan: StepPlan
    micros: list[Any]
    positions: list[Tensor]
    reading: Reading
    seconds: float
    begun: float

    @property
    def is_shadow(self) -> bool:
        """Whether this rank has no sample in this step, and `micros` holds one for show."""
        return self.plan.count == 0

    @property
    def counts(self) -> list[int]:
        """n_ic, samples of each micro-batch that count."""
        return [0] if self.is_shadow else [len(positions) for positions in self.positions]


class SamplerOrder:
    """The order of a sampler that knows it for any epoch, as the zoo's do.

    Args:
        sampler: with ``order(epoch)``, the sample indices of an epoch of all ranks together.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, epoch: int, lo: int, hi: int) -> Tensor:
        """Sample indices of the positions ``lo .. hi - 1``: int64 (hi - lo,)."""
        if epoch != self._epoch:
            self._order, self._epoch = torch.as_tensor(self._sampler.order(epoch)), epoch
        return self._order[lo:hi]


class StepLoader:
    """Iterates over the batches of this rank, one for each step of an epoch.

    Items are batches of the data set's own kind: the first micro-batch of each step. All of the step is in `current`.

    Args:
        source: a ``DataLoader`` of a map-style data set, or of an iterable one with `SupportsRange`: its data set, collate
            function, workers, pinning of memory and generator are used; its sampler is not.
        planner: of the steps.
        order: of the samples.
        seed: of the global generators while a sample is loaded.
        length: of the data set, samples of an epoch that are left out included.
        prefetch: steps that are planned ahead, at least 1; with workers, those are given at least as many steps in advance.
        epoch: tells the number of the epoch when a pass begins.
        rewind: ``(epoch) -> None`` puts the service to the beginning of an epoch, when the one before was left unfinished.
        waited: tells the seconds spent waiting for other ranks so far.

    Raises:
        TypeError: a data set whose samples cannot be reached by number.
    """

    def __init__(
        self,
        source: DataLoader[Any],
        planner: StepPlanner,
        order: Order,
        *,
        seed: int = 0,
        length: int | None = None,
        prefetch: int = 2,
        epoch: Callable[[], int] = lambda: 0,
        rewind: Callable[[int], None] = lambda epoch: None,
        waited: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.dataset = source.dataset
        self.planner, self.order, self.seed, self.prefetch = planner, order, seed, prefetch
        self.epoch, self.rewind, self.waited = epoch, rewind, waited
        self.mark_retries = bool(getattr(source, "mark_retries", False))
        #: Seconds that planning has taken so far, waiting for other ranks not included.
        self.planning = 0.0
        #: The step whose batch was given last.
        self.current: StepBatch | None = None
        self._engine = _engine(source, self, prefetch)
        self._planned: deque[tuple[StepPlan, list[Tensor]]] = deque()
        self._position = {"epoch": 0, "samples": 0, "length": length or planner.num_samples}
        self._resumed = False

    def __len__(self) -> int:
        return self.planner.num_steps

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepLoader":
        """There is one for a rank; see `AntDTStrategy.__deepcopy__`."""
        return self

    def __iter__(self) -> Iterator[Any]:
        return self._pass()

    def _pass(self) -> Iterator[Any]:
        # All of this happens when the first batch is asked for: iter() is called before the epoch is known.
        self._open(self.epoch())
        batches = iter(self._engine)
        while True:
            begun, waited = time.perf_counter(), self.waited()
            micros = next(batches, None)
            if micros is None:
                return
            seconds = time.perf_counter() - begun - (self.waited() - waited)
            plan, positions = self._planned.popleft()
            if self.mark_retries:
                for micro, places in zip(micros, positions, strict=True):
                    micro["retried"] = torch.zeros(len(places), dtype=torch.bool)
            self.current = StepBatch(plan, micros, positions, plan.answer(), seconds, begun)
            yield micros[0]

    def _open(self, epoch: int) -> None:
        while self._planned:  # of an epoch that all ranks have left early
            self._planned.popleft()[0].answer()
        at = self._position
        if not (self._resumed and at["epoch"] == epoch):
            if (at["epoch"], at["samples"]) != (epoch - 1, self.planner.num_samples):
                self.rewind(epoch)
            at |= {"epoch": epoch, "samples": 0}
        self._resumed = False
        self.planner.begin(epoch, self._position["samples"])

    def tasks(self, ahead: int) -> Iterator[Any]:
        """Plans of the epoch as lists of sample indices, and their seeds, for the data set's reader.

        Args:
            ahead: plans to make before the first is given.
        """
        waiting: deque[Any] = deque()
        while True:
            begun, waited = time.perf_counter(), self.waited()
            while len(waiting) <= ahead and (plan := self.planner.plan()) is not None:
                waiting.append(plan)
            self.planning += time.perf_counter() - begun - (self.waited() - waited)
            if not waiting:
                return
            yield self._task(waiting.popleft())

    def _task(self, plan: StepPlan) -> tuple[int, int, list[tuple[list[int], list[int]]]]:
        places = [torch.arange(piece.lo, piece.hi) for piece in plan.pieces]
        indices = [self.order.indices(plan.epoch, piece.lo, piece.hi) for piece in plan.pieces]
        if not plan.pieces:  # any sample will do for a shadow
            places, indices = [torch.arange(1)], [self.order.indices(plan.epoch, 0, 1)]
        cap = plan.allocation.cap[self.planner.rank]
        sizes = split_evenly(plan.count, cap) or [1]
        positions = list(torch.cat(places).split(sizes))
        samples = torch.cat(indices).split(sizes)
        self._planned.append((plan, positions))
        return self.seed, plan.epoch, [(s.tolist(), p.tolist()) for s, p in zip(samples, positions, strict=True)]

    # Position

    def trained(self) -> None:
        """The optimizer step of the current batch is done."""
        assert self.current is not None
        self._position["epoch"] = self.current.plan.epoch
        self._position["samples"] += self.current.reading.total

    def state_dict(self) -> dict[str, int]:
        """``{epoch, samples, length}`` of what all ranks have trained; the same on all of them."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position, in a pass over its epoch.

        Args:
            state_dict: of `state_dict`, or of the zoo's own loader.

        Raises:
            ValueError: it is of another kind of loader, of other data, or names samples that were put back.
        """
        if not self._position.keys() <= state_dict.keys():
            raise ValueError(
                f"The checkpoint's data position {state_dict} was saved by another kind of loader: resume with the strategy it"
                " was trained with, or from a checkpoint of the end of an epoch."
            )
        if state_dict["samples"] and state_dict["length"] != self._position["length"]:
            raise ValueError(
                f"The checkpoint stopped inside an epoch over {state_dict['length']} samples, this run's training set has"
                f" {self._position['length']}: resume with the same data."
            )
        if state_dict.get("retries"):
            raise ValueError("The checkpoint's data position has samples that were put back, which AntDT cannot do.")
        self._position |= {"epoch": state_dict["epoch"], "samples": state_dict["samples"]}
        self._resumed = True

    def resume(self) -> dict[str, int]:
        """Start of this run, once settled; the next pass over that epoch continues there."""
        if not self._resumed:
            self._position |= {"epoch": self.epoch(), "samples": 0}
        self._resumed = True
        return dict(self._position)


class _Tasks:
    """The sampler of the engine."""

    def __init__(self, loader: StepLoader, ahead: int) -> None:
        self.loader, self.ahead = loader, ahead

    def __iter__(self) -> Iterator[Any]:
        return self.loader.tasks(self.ahead)

    def __len__(self) -> int:
        return self.loader.planner.num_steps


class Reader(Dataset[list[Any]]):
    """Reads batches by lists of sample indices; runs in the workers of a ``DataLoader``.

    An item ``reader[seed, epoch, [(indices, positions), ...]]`` is a list of batches, one for each pair. What a data set draws
    from the global generators for a sample is a function of ``(seed, epoch, position)``, and leaves them as they were.

    Args:
        dataset: with ``__getitem__``, ``__getitems__`` or `SupportsRange`; told the epoch by ``set_epoch``, if it has that.
        collate: makes a batch of samples.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        self.dataset, self.collate = dataset, collate
        self._epoch: int | None = None

    def __getitem__(self, task: tuple[int, int, list[tuple[list[int], list[int]]]]) -> list[Any]:
        seed, epoch, micros = task
        if epoch != self._epoch and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self._epoch = epoch
        with _generators_kept():
            return [self.collate(self._samples(seed, epoch, indices, positions)) for indices, positions in micros]

    def _samples(self, seed: int, epoch: int, indices: list[int], positions: list[int]) -> Any:
        if hasattr(self.dataset, "__getitems__") or isinstance(self.dataset, SupportsRange):
            _seed_generators(seed, epoch, positions[0])
        if isinstance(self.dataset, SupportsRange):
            return [sample for lo, hi in _runs(indices) for sample in self.dataset.__getrange__(lo, hi)]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        samples = []
        for index, position in zip(indices, positions, strict=True):
            _seed_generators(seed, epoch, position)
            samples.append(self.dataset[index])
        return samples


def _engine(source: DataLoader[Any], loader: StepLoader, prefetch: int) -> DataLoader[Any]:
    """A DataLoader that reads plans as the given one reads batches."""
    workers = source.num_workers
    options: dict[str, Any] = {}
    if workers:
        options = {
            "prefetch_factor": max(1, -(-prefetch // workers)),
            "persistent_workers": source.persistent_workers,
            "multiprocessing_context": source.multiprocessing_context,
            "worker_init_fn": source.worker_init_fn,
            "timeout": source.timeout,
        }
    return DataLoader(
        Reader(source.dataset, source.collate_fn),
        batch_size=None,
        sampler=_Tasks(loader, 0 if workers else prefetch),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=source.pin_memory,
        # Without one, torch would draw the workers' seed from the global generator.
        generator=source.generator or torch.Generator(),
        **options,
    )


def _as_it_is(batches: Any) -> Any:
    return batches


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges ``[lo, hi)`` of which the indices consist, in their order."""
    for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        yield members[0], members[-1] + 1


def _seed_generators(seed: int, epoch: int, position: int) -> None:
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{position}".encode(), digest_size=8).digest(), "little") >> 1
    torch.default_generator.manual_seed(key)
    random.seed(key)
    if (numpy := sys.modules.get("numpy")) is not None:  # no dependency: only if the data set may draw from it
        numpy.random.seed(key & 0xFFFFFFFF)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the global generators as they are found: dropout must not depend on where data are loaded."""
    numpy = sys.modules.get("numpy")
    before = torch.default_generator.get_state(), random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        if numpy is not None:
            numpy.random.set_state(before[2])
