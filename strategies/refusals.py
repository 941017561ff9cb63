"""Checks that several strategies make before a run; each raises one sentence that says what to do."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, Timer, WeightAveraging
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from zoo.strategy_contract import averages_shards

__all__ = [
    "refuse_accumulation",
    "refuse_averages",
    "refuse_ddp_hooks",
    "refuse_manual_optimization",
    "refuse_other_precision",
    "refuse_saving_by_step",
    "refuse_scaled_losses",
    "refuse_several_optimizers",
]


def refuse_ddp_hooks(strategy: Strategy, kwargs: Mapping[str, Any]) -> None:
    """Options of DDP's own reduction of gradients, for a strategy that reduces or averages in another way."""
    for name in ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{_name(strategy)}: {name} belongs to another way of reducing gradients: leave it out.")


def refuse_scaled_losses(strategy: Strategy) -> None:
    """A gradient scaler: ranks with different gradients would find different scales and skip different steps."""
    plugin = strategy.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        raise ValueError(
            f"{_name(strategy)}: precision {plugin.precision} scales losses and skips steps that overflow, on each rank others:"
            " use bf16-mixed, bf16-true or 32-true."
        )


def refuse_other_precision(strategy: Strategy) -> None:
    """Precision plugins that wrap modules or optimizers, as those of quantization do."""
    plugin = strategy.precision_plugin
    if type(plugin) not in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
        raise ValueError(
            f"{_name(strategy)} does not go with {type(plugin).__name__}: use precision 32-true, bf16-mixed or bf16-true."
        )


def refuse_manual_optimization(strategy: Strategy, reason: str, instead: str) -> None:
    """A module that steps its optimizers itself."""
    module = strategy.lightning_module
    if module is not None and not module.automatic_optimization:
        raise ValueError(
            f"{_name(strategy)}: {type(module).__name__} optimizes by itself (automatic_optimization=False), but {reason}:"
            f" {instead}."
        )


def refuse_several_optimizers(strategy: Strategy, optimizers: Iterable[Optimizer], reason: str) -> None:
    """More than one optimizer."""
    names = [type(optimizer).__name__ for optimizer in optimizers]
    if len(names) > 1:
        raise ValueError(
            f"{_name(strategy)}: configure_optimizers gives {len(names)} optimizers ({', '.join(names[:4])}), {reason}: give one"
            " with several parameter groups, or use ddp."
        )


def refuse_accumulation(strategy: Strategy, trainer: Trainer, instead: str) -> None:
    """Accumulation by the Trainer, where the strategy divides a step into batches itself."""
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"{_name(strategy)}: accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1, since a batch of the loop"
            f" is one optimizer step: {instead}."
        )


def refuse_averages(strategy: Strategy, trainer: Trainer, reason: str, instead: str, shards: bool = False) -> None:
    """Callbacks that average weights.

    Args:
        strategy: Refuses.
        trainer: Its callbacks are looked at.
        reason: Continues "<callback> averages weights, ".
        instead: Says what to do.
        shards: Whether callbacks that take an average of shards from the strategy are admitted.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        averages = isinstance(callback, WeightAveraging | StochasticWeightAveraging)
        if averages and not (shards and averages_shards(callback)):
            raise ValueError(f"{_name(strategy)}: {type(callback).__name__} averages weights, {reason}: {instead}.")


def refuse_saving_by_step(strategy: Strategy, trainer: Trainer, epochs_are_shared: bool) -> None:
    """Callbacks of Lightning that save or stop at each rank's own count of steps, where these differ.

    Args:
        strategy: Refuses.
        trainer: Its callbacks are looked at.
        epochs_are_shared: Whether ranks end their epochs together, so that saving after epochs is admitted.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        by_step = isinstance(callback, ModelCheckpoint) and (callback._every_n_train_steps or callback._train_time_interval)
        if by_step or (not epochs_are_shared and isinstance(callback, ModelCheckpoint | Timer)):
            instead = "save after epochs, or use RunCheckpoint" if epochs_are_shared else "use RunCheckpoint and max_steps"
            raise ValueError(f"{_name(strategy)}: {type(callback).__name__} acts at each rank's own count of steps: {instead}.")


def _name(strategy: Strategy) -> str:
    return type(strategy).__name__
