"""Prediction writers whose ranks each write a part, which rank 0 merges into one file."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from typing_extensions import override


class RankMergingWriter(BasePredictionWriter, ABC):
    """Base of writers that lose no prediction and write none twice, on any number of ranks.

    Below `default_root_dir/predictions` each rank writes a part while it predicts; when all are done, rank 0 merges
    them into the final file, under a temporary name first. Whoever reads the final file reads a whole one; an
    interrupted run leaves the one of the run before.

    Args:
        filename: Name of the final file.

    Raises:
        ValueError: If `filename` is not a plain file name.
    """

    def __init__(self, filename: str) -> None:
        super().__init__("batch")
        if not filename or Path(filename).name != filename:
            raise ValueError(
                f"{type(self).__name__}: filename={filename!r} must be a plain file name; "
                "predictions are written below trainer.default_root_dir/predictions."
            )
        self.filename = filename

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Folder of the predictions."""
        return Path(trainer.default_root_dir) / "predictions"

    def part(self, trainer: Trainer, rank: int) -> Path:
        """The part of one rank."""
        return self.folder(trainer) / f".{self.filename}.rank{rank}"

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what an interrupted run left behind.

        Raises:
            ValueError: If there are several predict loaders, whose sample ids would clash.
        """
        if len(trainer.num_predict_batches) > 1:
            raise ValueError(
                f"{type(self).__name__} writes one predict loader, got {len(trainer.num_predict_batches)}: "
                "join them, or predict them one after another."
            )
        if trainer.is_global_zero:
            self.folder(trainer).mkdir(parents=True, exist_ok=True)
            self.clear(trainer)
        trainer.strategy.barrier("prediction writer: parts removed")
        self.open(trainer)

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Check a prediction and hand it to `add`.

        Raises:
            TypeError: If the prediction is no dictionary with sample ids.
        """
        if not isinstance(prediction, Mapping) or not isinstance(prediction.get("index"), Tensor):
            found = sorted(prediction) if isinstance(prediction, Mapping) else type(prediction).__name__
            raise TypeError(
                f"{type(self).__name__} wants predict_step of {type(pl_module).__name__} to return a dictionary "
                f'with the sample ids as "index", got {found}.'
            )
        self.add(trainer, pl_module, prediction)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the part of this rank; once all are closed, merge them on rank 0.

        Raises:
            FileNotFoundError: If rank 0 does not see the part of another rank.
        """
        self.close(trainer)
        trainer.strategy.barrier("prediction writer: parts written")
        if trainer.is_global_zero:
            parts = [self.part(trainer, rank) for rank in range(trainer.world_size)]
            if missing := [part.name for part in parts if not part.exists()]:
                raise FileNotFoundError(
                    f"{type(self).__name__}: rank 0 does not see {', '.join(missing)} in {self.folder(trainer)}: "
                    "all ranks must share trainer.default_root_dir."
                )
            for path in self.merge(trainer, parts):
                print(f"{type(self).__name__}: {path}")
            for part in parts:
                part.unlink()
        trainer.strategy.barrier("prediction writer: parts merged")

    def clear(self, trainer: Trainer) -> None:
        """Remove, on rank 0, what must not be taken for this run's."""
        for stale in self.folder(trainer).glob(f".{self.filename}.rank*"):
            stale.unlink()

    @abstractmethod
    def open(self, trainer: Trainer) -> None:
        """Begin this rank's part."""

    @abstractmethod
    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        """Take up the predictions of one batch."""

    @abstractmethod
    def close(self, trainer: Trainer) -> None:
        """Complete this rank's part on disk."""

    @abstractmethod
    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        """Make the final files of all ranks' parts, on rank 0; returns their paths, to be printed."""


def per_sample(value: Any, count: int, name: str) -> list[Any]:
    """Split one entry of a batch of predictions into plain values, one for each sample.

    Args:
        value: A tensor or sequence whose first dimension is the batch.
        count: Number of samples in the batch.
        name: Name of the entry, for the error.

    Raises:
        ValueError: If the entry does not hold one value per sample.
    """
    values = value.tolist() if isinstance(value, Tensor | torch.nn.Parameter) and value.ndim else value
    if not isinstance(values, list | tuple) or len(values) != count:
        size = f"{len(values)} values" if isinstance(values, list | tuple) else type(value).__name__
        raise ValueError(f'Prediction entry "{name}" must hold one value for each of {count} samples, got {size}.')
    return list(values)
