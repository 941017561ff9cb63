"""Torch's own generators, seeded for each training batch."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

__all__ = ["SeedEachBatch"]


class SeedEachBatch(Callback):
    """Seeds torch before each training batch from (seed, epoch, batch, rank), so that dropout resumes exactly too.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = hash((self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)) & 0x7FFFFFFFFFFFFFFF
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
