"""The store made again with lower blocks that are trained."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from zoo.bahe.module import BAHE

__all__ = ["AtomStoreRefresh"]


class AtomStoreRefresh(Callback):
    """Encodes all texts again with the lower blocks as they are, every so many steps; for ``train_low``.

    Double-buffered: the old store serves until the new one is whole, and stays one period longer, for a run that is resumed from
    a checkpoint that names it; it is deleted at the refresh after.

    Args:
        every_n_steps: Applied steps between two refreshes.

    Raises:
        ValueError: If the number is less than 1, or the lower blocks are not trained.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise ValueError(f"AtomStoreRefresh: every_n_steps={every_n_steps} must be at least 1.")
        self.every_n_steps = every_n_steps
        self._folders: list[Path] = []
        self._last = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, BAHE) or not pl_module.train_low:
            raise ValueError("AtomStoreRefresh: the lower blocks do not change: set train_low=true, or leave the callback out.")
        self._last = pl_module.applied_steps
        self._folders = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, BAHE)
        if pl_module.applied_steps == self._last or pl_module.applied_steps % self.every_n_steps:
            return
        self._last = pl_module.applied_steps
        self._folders.append(pl_module.refresh())
        if len(self._folders) > 1:
            old = self._folders.pop(0)
            if trainer.is_global_zero:
                shutil.rmtree(old, ignore_errors=True)
