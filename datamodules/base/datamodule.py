"""The base of the zoo's DataModules: deterministic, resumable, the same data whatever the number of processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from datamodules.base.loader import EpochOrder, ResumableLoader, WholeBatches, epoch_length
from zoo.base.checkpoint import read_checkpoint
from zoo.base.hyperparameters import Configurable, build, class_path, find_class, plain_arguments

__all__ = ["ZooDataModule"]


class ZooDataModule(Configurable, LightningDataModule):
    """Makes the loaders and stores the hyperparameters; a subclass gives the data sets.

    A subclass fetches in ``prepare_data``, reads in ``setup``, and returns :meth:`train_loader` and
    :meth:`eval_loader` of its map-style data sets from Lightning's hooks. What it gets:

    * the order of training is a pure function of (``seed``, epoch), and ``W`` processes with ``batch_size`` see the
      global batches of one process with ``W * batch_size`` (:mod:`datamodules.base.loader`);
    * a run resumed in the middle of an epoch continues with the next sample, with any number of workers;
    * validation, test and prediction give every sample to exactly one process, the same number of batches to each;
    * constructor arguments, also a subclass's own, are saved in checkpoints as plain data, so that
      ``load_from_checkpoint(path, weights_only=True)`` works. They are not sent to the logger, where an argument
      ``seed`` of the model with another value would stop the run; the run's ``config.yaml`` has them.

    Args:
        batch_size: Samples in a batch *of one process*, as everywhere in Lightning: with ``W`` processes, a step sees
            ``W * batch_size``.
        num_workers: Processes that load data; 0 loads in the main process.
        pin_memory: Whether batches are put into page-locked memory. ``None``: where the trainer's device is a GPU.
        seed: Seed of the order and of augmentation. ``None``: that of ``seed_everything``.

    Raises:
        ValueError: ``batch_size`` < 1 or ``num_workers`` < 0.
    """

    #: Attributes that are arguments of models: the command line gives them to a model that has such an argument, None by
    #: default, and did not get it otherwise. Reading one may prepare the data.
    model_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, batch_size: int = 64, num_workers: int = 0, pin_memory: bool | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, and must be at least 1.")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, and must be 0 (no workers) or more.")
        args, kwargs = self._init_arguments
        self._set_hparams({"_class_path": class_path(type(self)), **plain_arguments(type(self), args, kwargs)})
        self._hparams_initial = copy.deepcopy(self._hparams)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: None = None,
        hparams_file: None = None,
        weights_only: Literal[True] = True,
        **overrides: Any,
    ) -> Self:
        """Build the DataModule that a checkpoint names, with the arguments it was trained with.

        Args:
            checkpoint_path: A ``.ckpt`` file of Lightning.
            map_location: Not used; a DataModule holds no tensors.
            hparams_file: Not used; the checkpoint holds everything.
            weights_only: Always true; there is no unsafe way.
            overrides: Constructor arguments to replace.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is unsafe or damaged, or holds no DataModule of this class.
        """
        stored = dict(read_checkpoint(checkpoint_path).get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        if "_class_path" not in stored:
            raise ValueError(f"{checkpoint_path} holds no arguments of a DataModule: build {cls.__name__} yourself.")
        path = class_path(find_class(stored.pop("_class_path"), cls))
        arguments = {name: value for name, value in stored.items() if not name.startswith("_")}
        return build(cls, {"class_path": path, "init_args": {**arguments, **overrides}})

    @property
    def data_seed(self) -> int:
        """The seed of order and augmentation: ``seed``, else that of ``seed_everything``, else 0."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def train_loader(
        self, dataset: Dataset[Any], collate_fn: Callable[[Any], Any] | None = None, mark_retries: bool = False
    ) -> ResumableLoader[Any]:
        """A loader for training: shuffled again each epoch; the last incomplete *global* batch is left out.

        Args:
            dataset: Map-style data set; if it has ``set_epoch(epoch)``, it is told the epoch; if it has
                ``batch(indices)``, that makes the batches; if it has ``epoch_order(epoch, seed)``, that is the order
                (:class:`~datamodules.base.loader.EpochOrder`).
            collate_fn: Makes a batch of samples; ``None`` is torch's default.
            mark_retries: Whether batches, which are dictionaries then, get an entry ``retried``, bool (B,): the samples
                that :meth:`~datamodules.base.loader.ResumableLoader.requeue` has put back.

        Raises:
            ValueError: The data set does not fill one global batch.
        """
        processes, rank = self._share()
        length = epoch_length(dataset)
        if length < self.batch_size * processes:
            raise ValueError(
                f"The training set has {length} samples, fewer than one global batch of {self.batch_size * processes} "
                f"(batch_size {self.batch_size} x {processes} process(es)): lower batch_size."
            )
        trainer = self.trainer
        order = EpochOrder(
            dataset,  # type: ignore[arg-type]
            num_replicas=processes,
            rank=rank,
            train=True,
            seed=self.data_seed,
            epoch_counter=None if trainer is None else lambda: trainer.current_epoch,
        )
        loader = self._loader(dataset, order, self.batch_size, collate_fn)
        loader.mark_retries = mark_retries
        return loader

    def eval_loader(self, dataset: Dataset[Any], collate_fn: Callable[[Any], Any] | None = None) -> ResumableLoader[Any]:
        """A loader for validation, test or prediction: every sample once, in order, on one of the processes.

        All processes get equally many batches, which a model whose forward pass communicates needs. Where
        ``batch_size`` would give one process a last batch that another lacks, the other gets one in which nothing counts,
        if the data set can make it, as those of language can. Otherwise, the batches are a little smaller. That
        fails only where ``length // W`` is a multiple of every number up to ``batch_size``, as 12 is for 4, and
        ``length`` is no multiple of ``W``: with a tiny batch, choose a number of samples that ``W`` divides.

        Args:
            dataset: Map-style data set; if it has ``batch(indices)``, that makes the batches, and if it has ``blank()`` as
                well, that makes the batch in which nothing counts.
            collate_fn: Makes a batch of samples; ``None`` is torch's default.

        Raises:
            ValueError: There are fewer samples than processes, and no batches in which nothing counts.
        """
        processes, rank = self._share()
        length = len(dataset)  # type: ignore[arg-type]
        order = EpochOrder(dataset, num_replicas=processes, rank=rank, train=False, seed=self.data_seed)  # type: ignore[arg-type]
        if hasattr(dataset, "blank"):
            most, own = (-(-samples // self.batch_size) for samples in (-(-length // processes), len(order)))
            order.blank = own < most
            return self._loader(dataset, order, self.batch_size, collate_fn)
        if 0 < length < processes:
            raise ValueError(
                f"{length} sample(s) cannot be shared out to {processes} processes: run on at most {length} device(s)."
            )
        return self._loader(dataset, order, _even_batch_size(length, processes, self.batch_size), collate_fn)

    def _loader(
        self, dataset: Dataset[Any], order: EpochOrder, batch_size: int, collate_fn: Callable[[Any], Any] | None
    ) -> ResumableLoader[Any]:
        if hasattr(dataset, "batch"):
            dataset, collate_fn = WholeBatches(dataset), WholeBatches.collate
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=order,
            drop_last=order.drop_last,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu() if self.pin_memory is None else self.pin_memory,
            collate_fn=collate_fn,
            generator=torch.Generator(),
        )

    def _share(self) -> tuple[int, int]:
        """Number of processes among which the strategy divides the data, and this one's place."""
        shares = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (shares["num_replicas"], shares["rank"]) if shares else (1, 0)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _even_batch_size(length: int, processes: int, batch_size: int) -> int:
    """The largest size up to ``batch_size`` with which all processes have equally many batches, if there is one.

    Some processes have one sample more than ``length // processes``; that sample must not start a batch of its own.
    """
    few, uneven = divmod(length, processes)
    return next((size for size in range(batch_size, 0, -1) if not uneven or few % size), batch_size)
