"""Moments of the training data, computed in one pass before a run begins."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info
from torch import Tensor
from typing_extensions import override


class DataStatisticsWriter(Callback):
    """Writes mean and standard deviation of the encoded training data, for solvers with ``start: optimal``.

    The file is computed in one pass over the training set, before the first step, test or prediction, unless it is there
    already; it is the ``statistics`` file of the solvers, ``torch.save`` of ``{"mean", "std"}``. A DataModule of the zoo
    gives every sample; of another one the training loader is read, as it is.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = Path(path)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that module and data can give the moments.

        Raises:
            TypeError: the module has no ``data_statistics``, or the run no DataModule.
        """
        if not hasattr(pl_module, "data_statistics"):
            raise TypeError(f"DataStatisticsWriter: {type(pl_module).__name__} has no `data_statistics`: remove the callback.")
        if getattr(trainer, "datamodule", None) is None:
            raise TypeError("DataStatisticsWriter reads the training data of a DataModule, and this run has none.")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file unless it is there."""
        self._write(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file unless it is there."""
        self._write(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file unless it is there."""
        self._write(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file unless it is there."""
        self._write(trainer, pl_module)

    @torch.no_grad()
    def _write(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.strategy.broadcast(self.path.is_file()):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("fit")
        loader = data.train_dataloader()
        if hasattr(data, "eval_loader"):  # which leaves out no incomplete last batch
            loader = data.eval_loader(loader.dataset, loader.collate_fn)
        batches = (move_data_to_device(batch, pl_module.device) for batch in loader)

        def reduce(total: Tensor) -> Tensor:
            return trainer.strategy.reduce(total, reduce_op="sum")

        with torch.random.fork_rng(devices=[]):  # a shuffling loader must not change the run's own draws
            statistics = pl_module.data_statistics(batches, reduce)
        if trainer.is_global_zero:
            statistics.save(self.path)
        trainer.strategy.barrier()
        rank_zero_info(f"DataStatisticsWriter: {self.path}")
