"""Optimizers and their schedules, built in the form that Lightning takes."""

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau

__all__ = ["optimizer_config"]


def optimizer_config(
    module: LightningModule,
    make_optimizer: OptimizerCallable,
    parameters: Iterable[Any],
    make_scheduler: LRSchedulerCallable | None,
    interval: str,
) -> dict[str, Any]:
    """Build an optimizer and its schedule; see `ZooModule.optimizer_config`.

    Raises:
        ValueError: If the optimizer refuses its options or the parameters; those of shapes that it does not take are named.
    """
    try:
        optimizer = make_optimizer(parameters)
    except ValueError as error:
        raise ValueError(_refusal(module, error)) from error
    if make_scheduler is None:
        return {"optimizer": optimizer}
    scheduler = make_scheduler(optimizer)
    schedule: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        schedule["interval"] = "epoch"
        if module.automatic_optimization:
            schedule["monitor"] = scheduler.monitor
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def _refusal(module: LightningModule, error: ValueError) -> str:
    refusal = f"{type(module).__name__}: the optimizer refuses: {str(error).rstrip('.')}."
    others = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad and p.dim() != 2}
    if others and re.search(r"\b2-?D\b", str(error)):  # as of Muon
        shown = ", ".join(f"{name} {shape}" for name, shape in list(others.items())[:3])
        refusal += (
            f" {len(others)} trainable parameters are not matrices: {shown}{', ...' if len(others) > 3 else ''}. Take an"
            " optimizer for all shapes, such as --model.optimizer AdamW, or one of your own that gives only the"
            " matrices to this one."
        )
    return refusal
