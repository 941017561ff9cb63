"""A DataLoader whose order is a pure function of (seed, epoch), and whose position is three integers.

Sample ``i`` of the epoch's order goes to rank ``i % W`` of ``W``. So the global batch of ``W`` ranks with ``b`` samples
each holds the same samples as the batch of one process with ``b * W``, and a sample's place in the epoch is

    place = W * (samples this rank has seen in the epoch) + rank.

Since the order needs no generator state, a position is ``{"epoch", "samples", "length"}``: the same on every
rank (only rank 0's state reaches a checkpoint), the same for any number of workers, readable with ``weights_only``.
That is why this is a plain ``torch.utils.data.DataLoader`` and not torchdata's ``StatefulDataLoader``, whose state
depends on the number of workers, holds the sampler's state as the workers' prefetching left it, and is restored by
``iter()``, which Lightning calls before it sets the epoch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sized
from typing import Any, TypedDict, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

T = TypeVar("T", covariant=True)


class LoaderState(TypedDict):
    """A position in the data.

    Attributes:
        epoch: Number of the epoch.
        samples: Samples of this epoch that all ranks together have been given.
        length: Number of samples in the data set.
    """

    epoch: int
    samples: int
    length: int


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator that is a pure function of its arguments; neighbouring seeds and epochs are unrelated.

    Args:
        seed: Seed of the run's data.
        epoch: Number of the epoch.
        purpose: What it draws, for example ``"order"``, so that two uses do not share their numbers.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


class EpochOrder(DistributedSampler[int]):
    """The indices that one rank sees in an epoch.

    Training shuffles, and leaves out the last ``length % W`` samples of the epoch's order, so that all ranks see as
    many. Evaluation keeps the data's order and gives every sample to exactly one rank: nothing is repeated, nothing
    lost (torch's ``DistributedSampler`` pads). Being a ``DistributedSampler``, it is left in place by Lightning.

    Args:
        dataset: The data set; only its length is used.
        num_replicas: Number of ranks ``W``.
        rank: This rank, ``0 <= rank < W``.
        train: Whether to shuffle and to even out the ranks.
        seed: Seed of the shuffling.
        epoch_counter: Where the number of the epoch is read at the beginning of a pass. ``None``: from ``set_epoch``.
            The DataModules read the trainer's, because Lightning 2.6.6 tells samplers an epoch too many after it has
            resumed, under ``max_steps``, from a checkpoint saved at the end of an epoch.
    """

    start: int
    """Samples of this rank to leave out at the beginning of the next pass."""

    def __init__(
        self,
        dataset: Sized,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        train: bool,
        seed: int = 0,
        epoch_counter: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=train, seed=seed, drop_last=train)  # type: ignore[arg-type]
        self.start = 0
        self.epoch_counter = epoch_counter

    def __len__(self) -> int:
        length = len(self.dataset)  # type: ignore[arg-type]
        return length // self.num_replicas if self.drop_last else len(range(self.rank, length, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            order = torch.randperm(length, generator=epoch_generator(self.seed, self.epoch, "order"))
        else:
            order = torch.arange(length)
        mine = order[self.rank :: self.num_replicas][: len(self)]
        start, self.start = self.start, 0
        return iter(mine[start:].tolist())


class WholeBatches(Dataset[Any]):
    """Lets a data set with ``batch(indices)`` make a whole batch at once, instead of samples that are then stacked.

    For images in memory this is about eight times faster. It is an adapter, because a ``__getitems__`` that gives a batch
    would break the data set's use with a plain ``DataLoader``, which takes it for a list of samples.

    Args:
        dataset: A map-style data set with ``batch(indices: list[int])``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set the epoch, if it wants to know."""
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch."""
        return self.dataset.batch(indices)

    @staticmethod
    def collate(batch: Any) -> Any:
        """The collate function that belongs to it: the batch is made already."""
        return batch


class ResumableLoader(DataLoader[T]):
    """A ``DataLoader`` that resumes in the middle of an epoch, with the batches it would have given.

    Everything is ``torch.utils.data.DataLoader``'s but this: ``state_dict`` and ``load_state_dict`` give and take the
    position, and nothing happens before the first batch of a pass is asked for, so that an epoch set after ``iter()``
    counts. A loaded position holds for its own epoch only; any other epoch starts at its beginning.

    A data set with ``set_epoch(epoch)`` is told the epoch before each pass (and before workers are started), so that
    augmentation can be a pure function of (seed, epoch, index). Give ``generator=``: without one, ``DataLoader`` takes
    its workers' seed from torch's global generator, and a resumed run would find that one moved.
    """

    _resume: LoaderState | None = None
    _epoch = 0
    _batches = 0

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        return self._pass()

    def _pass(self) -> Iterator[T]:
        if isinstance(self._order, EpochOrder) and self._order.epoch_counter is not None:
            self._order.set_epoch(self._order.epoch_counter())
        epoch = getattr(self._order, "epoch", 0)
        resume, self._resume = self._resume, None
        skip = resume["samples"] // self._global_batch if resume is not None and resume["epoch"] == epoch else 0
        self._epoch, self._batches = epoch, skip
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        if self.generator is not None:
            seed = getattr(self._order, "seed", 0)
            self.generator.manual_seed(epoch_generator(seed, epoch, "workers").initial_seed())
        if isinstance(self._order, EpochOrder):
            self._order.start = skip * self._batch_size
            skip = 0
        # Only a sampler that Lightning has put in (overfit_batches) has no start: run through the batches then.
        for batch in itertools.islice(super().__iter__(), skip, None):
            self._batches += 1
            yield batch

    @property
    def _order(self) -> Any:
        """The sampler; Lightning wraps the batch sampler when it predicts, and torch then takes another one for ours."""
        return getattr(self.batch_sampler, "sampler", self.sampler)

    @property
    def _batch_size(self) -> int:
        return self.batch_sampler.batch_size  # type: ignore[union-attr]

    @property
    def _global_batch(self) -> int:
        return self._batch_size * getattr(self._order, "num_replicas", 1)

    def start_at(self, place: int) -> None:
        """Let the next pass begin with the global batch that holds this place of the epoch's order, without reading the rest.

        Args:
            place: Place of a sample in the order, 0 to the number of samples.
        """
        samples = place // self._global_batch * self._global_batch
        self.load_state_dict({"epoch": getattr(self._order, "epoch", 0), "samples": samples, "length": len(self.dataset)})  # type: ignore[arg-type]

    def state_dict(self) -> LoaderState:
        """The position after the batch given last."""
        return self._resume or LoaderState(
            epoch=self._epoch,
            samples=self._batches * self._global_batch,
            length=len(self.dataset),  # type: ignore[arg-type]
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position at the next pass over its epoch.

        Args:
            state_dict: What :meth:`state_dict` gave, on any rank, with any number of workers and ranks.

        Raises:
            ValueError: The position does not fit: the data have another length, or it is no whole number of this run's
                global batches.
        """
        if state_dict.keys() != LoaderState.__annotations__.keys():
            raise ValueError(
                f"The checkpoint's data position {state_dict} was saved by another kind of loader: resume with the "
                f"DataModule it was trained with."
            )
        state = LoaderState(**state_dict)  # type: ignore[typeddict-item]
        length = len(self.dataset)  # type: ignore[arg-type]
        if state["samples"] and state["length"] != length:
            raise ValueError(
                f"The checkpoint stopped inside an epoch over {state['length']} samples, this run's training set has "
                f"{length}: resume with the same data."
            )
        if state["samples"] % self._global_batch:
            raise ValueError(
                f"The checkpoint stopped after {state['samples']} samples of epoch {state['epoch']}, which is no "
                f"whole number of global batches of {self._global_batch} (batch_size x processes): resume with the "
                f"same global batch."
            )
        self._resume = state
        if isinstance(self._order, EpochOrder):
            self._order.set_epoch(state["epoch"])
