"""Exponential moving average of the weights."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from zoo.strategy_contract import AveragesShards, CallbackContract, ShardedAverage, shards_parameters

__all__ = ["EMA"]


class EMA(CallbackContract, WeightAveraging):
    """Averages the parameters after each *applied* optimizer step: ``average <- decay * average + (1 - decay) * weights``.

    Validation and everything after training use the average; checkpoints hold it as ``state_dict``, beside the current
    weights for resuming. Steps that a gradient scaler skipped, and micro-batches of an accumulated step, do not count.
    The average starts at the initial weights and includes parameters only, buffers are copied (the convention of most
    published code).

    Args:
        decay: weight of the old average, in [0, 1).
        warmup: grow the decay as ``min(decay, (1 + steps) / (10 + steps))``, so that short runs forget the initial weights.
        device: where the average is kept, such as ``cpu``; default is the module's device.

    Raises:
        ValueError: decay outside [0, 1), or a strategy that shards the weights and does not average its own shards.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay={decay} must lie in [0, 1); 0.999 or 0.9999 are usual.")
        super().__init__(device=device, use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.warmup = warmup
        self._applied = 0
        self._averaged = 0
        self._swapped = False
        self._sharded: ShardedAverage | None = None
        self._kept_on = device

    def averages_shards(self) -> bool:
        """Yes: a strategy that divides the weights is asked for an average (`AveragesShards`)."""
        return True

    def _average(self, average: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        update: Callable[..., None] = get_ema_multi_avg_fn(self._decay_now())
        update(average, [tensor.to(average[0].device) for tensor in current], num_averaged)

    def _decay_now(self) -> float:
        return min(self.decay, (1 + self._averaged) / (10 + self._averaged)) if self.warmup else self.decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights (Lightning hook)."""
        strategy: Strategy = trainer.strategy
        if isinstance(strategy, AveragesShards):
            return
        if stage == "fit" and shards_parameters(strategy):
            raise ValueError(
                f"EMA: {type(strategy).__name__} shards the weights, which this callback cannot average:"
                " remove EMA, or use ddp or a strategy of the zoo that averages its own shards."
            )
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # torch averages the very first time by copying; the published recursion starts at the initial weights.
            self._average_model.n_averaged.fill_(1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an average of shards (Lightning hook)."""
        if isinstance(trainer.strategy, AveragesShards):
            self._sharded = trainer.strategy.average_shards(self._kept_on)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps that optimizers really apply (Lightning hook)."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._count_applied)

    def _count_applied(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._applied += 1

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether a step was applied since the last update (Lightning hook)."""
        return step_idx is not None and self._applied > self._averaged

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Average after an applied step (Lightning hook)."""
        if self._sharded is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self.should_update(trainer.global_step - 1):
            self._sharded.update(self._decay_now())
            self._latest_update_step = trainer.global_step
        self._averaged = self._applied

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average (Lightning hook)."""
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the weights return in `on_validation_end`, after every other callback has seen the average."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the current weights back (Lightning hook)."""
        self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the current weights back before a checkpoint is saved (Lightning hook)."""
        if self._swapped and self._sharded is None:  # ranks that fail are not together
            self._swap(pl_module)

    def _swap(self, pl_module: LightningModule) -> None:
        if self._sharded is not None:
            self._sharded.swap()
            self._swapped = not self._swapped
        if self._average_model is not None:
            self._swap_models(pl_module)
            self._swapped = not self._swapped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the last checkpoint, saved in this hook, shall hold the current weights too."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module (Lightning hook)."""
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)
            self._average_model = None
        self._sharded = None  # the strategy has left the average there

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {**super().state_dict(), "applied": self._applied}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State from the checkpoint."""
        super().load_state_dict(state_dict)
        self._applied = self._averaged = state_dict["applied"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load current and averaged weights (Lightning hook); outside of training the average is all that is needed."""
        if self._sharded is not None:
            self._sharded.restart()
            if "current_model_state" in checkpoint:
                trainer.strategy.load_model_state_dict({"state_dict": checkpoint["current_model_state"]})
        if self._average_model is not None:
            if "averaged_model_state" in checkpoint:
                checkpoint = {**checkpoint, "state_dict": checkpoint["averaged_model_state"]}
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average where checkpoints keep the weights (Lightning hook)."""
        if self._sharded is not None:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = self._sharded.weights(keep=trainer.is_global_zero)
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(1 + self._applied)}
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            if isinstance(trainer.strategy, DeepSpeedStrategy):  # which writes the engine's weights as `state_dict`
                checkpoint["averaged_model_state"] = checkpoint["state_dict"]
