"""Manual optimization: the Trainer's clipping, and schedules, both of which Lightning leaves to the module."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

__all__ = ["ManualOptimization", "step_schedules"]


class ManualOptimization(Callback):
    """Clips gradients as the Trainer's flags say before each step, and advances schedules per epoch.

    A trainer that later fits a module with automatic optimization keeps this callback, which then does nothing.

    Args:
        trainer: its ``gradient_clip_val``, which Lightning refuses in manual optimization, is put away until `setup`.

    Raises:
        ValueError: If training starts with an engine, such as DeepSpeed's, that steps in the optimizers' place.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._clip_val, trainer.gradient_clip_val = trainer.gradient_clip_val, None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.gradient_clip_val = self._clip_val

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.gradient_clip_val = self._clip_val

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        manual = not pl_module.automatic_optimization
        if manual and not all(hasattr(optimizer, "register_step_post_hook") for optimizer in trainer.optimizers):
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually, which needs optimizers of torch, but"
                f" {type(trainer.strategy).__name__} has others: use ddp or another strategy."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not pl_module.automatic_optimization:
            pl_module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            step_schedules(pl_module, "epoch", trainer.current_epoch + 1)


def step_schedules(module: LightningModule, interval: str, count: int, optimizer: Optimizer | None = None) -> None:
    """Advance the schedules of an interval, of all optimizers or of one.

    Args:
        module: in training.
        interval: ``step`` or ``epoch``.
        count: number of steps or epochs so far, for schedules that advance at each n-th.
        optimizer: the one that was stepped; None: all.

    Raises:
        ValueError: If a schedule follows a metric that was not logged.
    """
    for config in module.trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if config.interval != interval or count % config.frequency or optimizer not in (None, scheduler.optimizer):
            continue
        metric = None
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = str(getattr(scheduler, "monitor", None))
            metric = module.trainer.callback_metrics.get(monitor)
            if metric is None:
                raise ValueError(
                    f"{type(module).__name__}: a schedule follows the metric {monitor!r}, which was not logged: log it, or name"
                    f" one of {', '.join(module.trainer.callback_metrics)}."[:300]
                )
        module.lr_scheduler_step(scheduler, metric)
