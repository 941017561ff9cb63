"""Exponential moving average of the weights."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer
from typing_extensions import override

from zoo.callbacks.weight_average import WeightAverage, named_part
from zoo.strategy_contract import AveragesShards, CallbackContract, ShardedAverage, shards_parameters

__all__ = ["EMA"]


class EMA(CallbackContract, WeightAveraging):
    """Averages the parameters after each *applied* optimizer step: ``average <- decay * average + (1 - decay) * weights``.

    Validation and everything after training use the average; checkpoints hold it as ``state_dict``, beside the current
    weights for resuming. Steps that a gradient scaler skipped, and micro-batches of an accumulated step, do not count.
    The average starts at the initial weights and includes trained parameters only (the convention of most published code); it
    is kept in float32 or wider. In manual optimization each optimizer's steps average its own parameters.

    Args:
        decay: weight of the old average, in [0, 1).
        warmup: grow the decay as ``min(decay, (1 + steps) / (10 + steps))``, so that short runs forget the initial weights.
        device: where the average is kept, such as ``cpu``; default is the module's device.
        modules: names of the parts of the module to average, such as ``generator`` or ``layers.*.mlp``; default is all. The
            other weights are used and saved as they are.

    Raises:
        ValueError: If decay is outside [0, 1), the strategy shards the weights and does not average its own shards, or a name
            in ``modules`` matches nothing.
    """

    def __init__(
        self, decay: float = 0.9999, warmup: bool = False, device: str | None = None, modules: list[str] | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay={decay} must lie in [0, 1); 0.999 or 0.9999 are usual.")
        super().__init__(device=device, use_buffers=False)
        self.decay = decay
        self.warmup = warmup
        self.modules = modules
        self._applied = [0]  # applied steps of each optimizer
        self._averaged = 0
        self._swapped = False
        self._average: WeightAverage | None = None
        self._sharded: ShardedAverage | None = None
        self._loaded: dict[str, Any] | None = None  # averaged weights of a checkpoint that was read before the run was set up
        self._kept_on = device

    def averages_shards(self) -> bool:
        """Yes: a strategy that divides the weights is asked for an average (`AveragesShards`)."""
        return True

    def _decay_after(self, steps: int) -> float:
        return min(self.decay, (1 + steps) / (10 + steps)) if self.warmup else self.decay

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._average, self._sharded, self._loaded, self._swapped = None, None, None, False
        strategy: Strategy = trainer.strategy
        name = type(strategy).__name__
        if stage == "fit" and isinstance(strategy, AveragesShards) and self.modules is not None:
            raise ValueError(f"EMA: {name} averages its shards of all weights: leave out modules, or use ddp.")
        if stage == "fit" and not isinstance(strategy, AveragesShards) and shards_parameters(strategy):
            raise ValueError(
                f"EMA: {name} shards the weights, which this callback cannot average:"
                " remove EMA, or use ddp or a strategy of the zoo that averages its own shards."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average, of weights that lie where and have the format in which they are trained."""
        if isinstance(trainer.strategy, AveragesShards):
            self._sharded = trainer.strategy.average_shards(self._kept_on)
            return
        self._average = WeightAverage(named_part(pl_module, ["*"] if self.modules is None else self.modules), self._kept_on)
        if self._loaded is not None:
            self._average.restart(self._loaded)
            self._loaded = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps that optimizers really apply; in manual optimization there may be several in a batch."""
        self._applied += [0] * (len(trainer.optimizers) - len(self._applied))
        self._averaged = self._applied[0]
        parts = _names_by_optimizer(pl_module, trainer.optimizers)
        for index, (optimizer, names) in enumerate(zip(trainer.optimizers, parts, strict=True)):
            optimizer.register_step_post_hook(partial(self._on_step, index, None if pl_module.automatic_optimization else names))

    def _on_step(self, index: int, names: list[str] | None, *args: Any) -> None:
        if names is not None:
            self._update(self._decay_after(self._applied[index]), names)
        self._applied[index] += 1

    def _update(self, decay: float, names: list[str] | None = None) -> None:
        if self._sharded is not None:
            self._sharded.update(decay)
        elif self._average is not None:
            self._average.update(decay, names)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Average after an applied step; in automatic optimization a batch has one at most."""
        if pl_module.automatic_optimization and self._applied[0] > self._averaged:
            self._update(self._decay_after(self._averaged))
        self._averaged = self._applied[0]

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the average follows steps."""

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the weights return in `on_validation_end`, after every other callback has seen the average."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the current weights back."""
        self._swap()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the current weights back before a checkpoint is saved."""
        if self._swapped and self._sharded is None:  # ranks that fail are not together
            self._swap()

    def _swap(self) -> None:
        average = self._sharded or self._average
        if average is not None:
            average.swap()
            self._swapped = not self._swapped

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the last checkpoint, saved in this hook, shall hold the current weights too."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        if self._average is not None:
            self._average.leave()
        self._average = None
        self._sharded = None  # the strategy has left the average there

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"applied": list(self._applied)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        applied = state_dict["applied"]
        self._applied = list(applied) if isinstance(applied, list) else [applied]  # a number in older checkpoints
        self._averaged = self._applied[0]

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load current and averaged weights; outside of training the average is all that is needed."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        current = checkpoint.get("current_model_state")
        if self._sharded is not None:
            self._sharded.restart()
            if current is not None:
                trainer.strategy.load_model_state_dict({"state_dict": current})
            return
        if current is not None:
            self._loaded = checkpoint["averaged_model_state" if "averaged_model_state" in checkpoint else "state_dict"]
            pl_module.load_state_dict(current)
        if self._average is not None:  # the strategy reads checkpoints after the run was set up
            self._average.restart(self._loaded)
            self._loaded, self._swapped = None, False

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average where checkpoints keep the weights."""
        average = self._sharded or self._average
        if average is None:
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(1 + self._applied[0])}
        if self._sharded is not None:
            checkpoint["state_dict"] = self._sharded.weights(keep=trainer.is_global_zero)
        elif self._average is not None:
            checkpoint["state_dict"] = self._average.weights(pl_module, checkpoint["state_dict"])
            if isinstance(trainer.strategy, DeepSpeedStrategy):  # which writes the engine's weights as `state_dict`
                checkpoint["averaged_model_state"] = checkpoint["state_dict"]


def _names_by_optimizer(module: LightningModule, optimizers: list[Optimizer]) -> list[list[str]]:
    """Names of the parameters that each optimizer steps; the first has those of none, too."""
    index_of = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    parts: list[list[str]] = [[] for _ in optimizers]
    for name, parameter in module.named_parameters():
        parts[index_of.get(id(parameter), 0)].append(name)
    return parts
