"""A DataLoader whose order is a pure function of (seed, epoch), and whose position is three integers.

Sample ``i`` of the epoch's order goes to rank ``i % W`` of ``W``. So the global batch of ``W`` ranks with ``b`` samples
each holds the same samples as the batch of one process with ``b * W``, and a sample's place in the epoch is

    place = W * (samples this rank has seen in the epoch) + rank.

Since the order needs no generator state, a position is ``{"epoch", "samples", "length"}``: the same on every
rank (only rank 0's state reaches a checkpoint), the same for any number of workers, readable with ``weights_only``.
That is why this is a plain ``torch.utils.data.DataLoader`` and not torchdata's ``StatefulDataLoader``, whose state
depends on the number of workers, holds the sampler's state as the workers' prefetching left it, and is restored by
``iter()``, which Lightning calls before it sets the epoch.

Samples that training wants to see again (after a loss spike) are put back by :meth:`ResumableLoader.requeue`; the position
then names their places as well (:mod:`datamodules.base.retry_queue`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.base.retry_queue import RetryQueue, RetryState

T = TypeVar("T", covariant=True)

BLANK = -1
"""An index that stands for no sample, but for a batch of its own in which nothing counts."""


class Position(TypedDict):
    """A position in the data.

    Attributes:
        epoch: Number of the epoch.
        samples: Samples of this epoch that all ranks together have been given.
        length: Number of samples in the data set.
    """

    epoch: int
    samples: int
    length: int


class LoaderState(Position, total=False):
    """A position, with what only some runs have.

    Attributes:
        epoch_length: Samples of an epoch, where the data set chooses them (:meth:`EpochOrder.order`).
        retries: Samples that were put back, once there are any.
    """

    epoch_length: int
    retries: RetryState


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator that is a pure function of its arguments; neighbouring seeds and epochs are unrelated.

    Args:
        seed: Seed of the run's data.
        epoch: Number of the epoch.
        purpose: Name of its use, such as ``"order"``, so that two uses do not share their numbers.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


class EpochOrder(DistributedSampler[int]):
    """The indices that one rank sees in an epoch.

    Training shuffles, and leaves out the last ``length % W`` samples of the epoch's order, so that all ranks see as
    many. Evaluation keeps the data's order and gives every sample to exactly one rank: nothing is repeated, nothing
    lost (torch's ``DistributedSampler`` pads). Being a ``DistributedSampler``, it is left in place by Lightning.

    A data set may choose what an epoch of training is, as a weighted mixture does, with an attribute ``epoch_length`` and a
    method ``epoch_order(epoch: int, seed: int)`` that returns so many sample ids, int64 (``epoch_length``,).

    Args:
        dataset: The data set; only its length is used, and its order if it has one.
        num_replicas: Number of ranks ``W``.
        rank: This rank, ``0 <= rank < W``.
        train: Whether to shuffle and to even out the ranks.
        seed: Seed of the shuffling.
        epoch_counter: Gives the number of the epoch at the beginning of a pass. ``None``: that of ``set_epoch``.
            The DataModules read the trainer's, because Lightning 2.6.6 tells samplers an epoch too many after it has
            resumed, under ``max_steps``, from a checkpoint saved at the end of an epoch.
    """

    start: int
    """Samples of this rank to leave out at the beginning of the next pass."""

    blank: bool
    """Whether :data:`BLANK` follows this rank's samples; in evaluation."""

    retries: RetryQueue
    """Samples that were put back into the order."""

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
        self.blank = False
        self.epoch_counter = epoch_counter
        self.retries = RetryQueue()

    @property
    def length(self) -> int:
        """Samples of an epoch, of all ranks together."""
        return epoch_length(self.dataset) if self.shuffle else len(self.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._num_samples + self.blank

    @property
    def _num_samples(self) -> int:
        return self.length // self.num_replicas if self.drop_last else len(range(self.rank, self.length, self.num_replicas))

    def order(self, epoch: int) -> np.ndarray:
        """The order of an epoch, of all ranks together and without retries: int64 (:attr:`length`,)."""
        if not self.shuffle:
            return np.arange(self.length)
        if hasattr(self.dataset, "epoch_order"):
            return np.asarray(self.dataset.epoch_order(epoch, self.seed))
        return torch.randperm(self.length, generator=epoch_generator(self.seed, epoch, "order")).numpy()

    def places(self, start: int, stop: int) -> range:
        """Places in the epoch's order of this rank's samples number ``start`` to ``stop - 1``."""
        return range(start * self.num_replicas + self.rank, stop * self.num_replicas + self.rank, self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        # A generator, so that samples can be put back while the pass runs.
        return self._samples(self.order(self.epoch), start)

    def _samples(self, order: np.ndarray, start: int) -> Iterator[int]:
        for place in self.places(start, self._num_samples):
            yield self.retries.at(place, order) if self.retries else int(order[place])
        if self.blank:
            yield BLANK


def epoch_length(dataset: Any) -> int:
    """Samples of an epoch of training: the data set's ``epoch_length`` if it has one, else its length."""
    return int(getattr(dataset, "epoch_length", len(dataset)))


class WholeBatches(Dataset[Any]):
    """Lets a data set with ``batch(indices)`` make a whole batch at once, instead of samples that are then stacked.

    For images in memory this is about eight times faster. It is an adapter, because a ``__getitems__`` that gives a batch
    would break the data set's use with a plain ``DataLoader``, which takes it for a list of samples.

    Args:
        dataset: A map-style data set with ``batch(indices: list[int])``; if it has ``blank()``, that makes the batch of
            :data:`BLANK`.
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

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch of training."""
        return epoch_length(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch."""
        return self.dataset.blank() if indices == [BLANK] else self.dataset.batch(indices)

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

    mark_retries: bool = False
    """Whether batches, which are dictionaries then, are given an entry ``retried`` (see :attr:`retried`)."""

    _resume: LoaderState | None = None
    _epoch = 0
    _batches = 0

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        return self._pass()

    def _pass(self) -> Iterator[T]:
        if isinstance(self._order, EpochOrder) and self._order.epoch_counter is not None:
            self._order.set_epoch(self._order.epoch_counter())
        epoch = getattr(self._order, "epoch", 0)
        before, resume, self._resume = self.state_dict(), self._resume, None
        skip = resume["samples"] // self._global_batch if resume is not None and resume["epoch"] == epoch else 0
        if before["epoch"] != epoch and isinstance(self._order, EpochOrder) and self._order.retries:
            self._order.retries.turn(self._order.order(before["epoch"]), before["samples"])
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
            if self.mark_retries:
                batch["retried"] = self.retried
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

    def requeue(self, sample_ids: Sequence[int], window: int, seed_key: int, lead: int = 16) -> None:
        """Put samples back: each comes once more, at a random place of batches to come.

        Call it between two batches, on every rank with the same arguments: the samples of the *global* batch. Epochs keep
        their length; samples that are pushed out of this one, and places beyond its end, open the next. The places are
        part of :meth:`state_dict`.

        Args:
            sample_ids: Indices of the data set.
            window: Over how many global batches to scatter them: places are drawn from the next ``window`` global batches'
                worth of free places behind the lead.
            seed_key: A number that no other call of this epoch has, the step for example. The places are a pure function of
                (seed, epoch, ``seed_key``), the position and the samples put back before.
            lead: Global batches that stay as they are. It is raised to what workers may have fetched in advance; unless it
                is, the places do not depend on the number of workers.

        Raises:
            ValueError: The loader does not shuffle with :class:`EpochOrder`; ``window`` < 1, ``lead`` < 0, or an id is not
                of the data set.
        """
        order = self._order
        if not isinstance(order, EpochOrder) or not order.shuffle:
            raise ValueError("Only the training loader of a ZooDataModule, in its own order, can put samples back.")
        if window < 1 or lead < 0:
            raise ValueError(f"window is {window} and lead is {lead}, and must be at least 1 and at least 0.")
        length = len(self.dataset)  # type: ignore[arg-type]
        if foreign := [sample for sample in sample_ids if not 0 <= sample < length]:
            raise ValueError(f"The sample ids {foreign[:5]} are not of the training set, which has the ids 0 to {length - 1}.")
        at = self.state_dict()
        done = at["samples"] // self._global_batch + max(lead, self.num_workers * (self.prefetch_factor or 0))
        generator = epoch_generator(order.seed, at["epoch"], f"retry/{seed_key}")
        order.retries.insert(sample_ids, min(done, len(self)) * self._global_batch, window * self._global_batch, generator)

    @property
    def retried(self) -> Tensor:
        """Samples of the last batch that had been put back, bool (B,)."""
        order, size = self._order, self._batch_size
        if not isinstance(order, EpochOrder) or not self._batches:
            return torch.zeros(size, dtype=torch.bool)
        places = order.places((self._batches - 1) * size, self._batches * size)
        return torch.tensor([order.retries.is_retry(place) for place in places])

    def state_dict(self) -> LoaderState:
        """The position after the batch given last."""
        if self._resume is not None:
            state = LoaderState(**self._resume)
        else:
            state = LoaderState(
                epoch=self._epoch,
                samples=self._batches * self._global_batch,
                length=len(self.dataset),  # type: ignore[arg-type]
            )
        if isinstance(self._order, EpochOrder):
            if hasattr(self._order.dataset, "epoch_order"):
                state["epoch_length"] = self._order.length
            if self._order.retries:
                state["retries"] = self._order.retries.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position at the next pass over its epoch.

        Args:
            state_dict: Result of :meth:`state_dict`, on any rank, with any number of workers and ranks.

        Raises:
            ValueError: The position does not fit: the data have another length, or it is no whole number of this run's
                global batches.
        """
        if not Position.__annotations__.keys() <= state_dict.keys() <= LoaderState.__annotations__.keys():
            raise ValueError(
                f"The checkpoint's data position {state_dict} was saved by another kind of loader: resume with the "
                f"DataModule it was trained with."
            )
        state = LoaderState(**state_dict)  # type: ignore[typeddict-item]
        length = len(self.dataset)  # type: ignore[arg-type]
        bound = bool(state["samples"] or state.get("retries"))
        if bound and state["length"] != length:
            raise ValueError(
                f"The checkpoint stopped inside an epoch over {state['length']} samples, this run's training set has "
                f"{length}: resume with the same data."
            )
        if bound and state.get("epoch_length", length) != epoch_length(self.dataset):
            raise ValueError(
                f"The checkpoint stopped inside an epoch of {state.get('epoch_length', length)} samples, this run's epochs "
                f"have {epoch_length(self.dataset)}: resume with the same length of an epoch."
            )
        if state["samples"] % self._global_batch:
            raise ValueError(
                f"The checkpoint stopped after {state['samples']} samples of epoch {state['epoch']}, which is no "
                f"whole number of global batches of {self._global_batch} (batch_size x processes): resume with the "
                f"same global batch."
            )
        retries = state.pop("retries", None)
        self._resume = state
        if isinstance(self._order, EpochOrder):
            self._order.set_epoch(state["epoch"])
            self._order.retries.load_state_dict(retries)
