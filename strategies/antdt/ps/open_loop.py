"""Lightning's training loop without an end that is known before: it runs until the data ends, however many batches that are."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Clip", "OpenLoop", "check_trainer"]


class Clip(NamedTuple):
    """How the servers clip the gradient of a synchronous step.

    Attributes:
        limit: of its norm, or of each element; 0: they do not.
        by_norm: which of the two.
    """

    limit: float = 0.0
    by_norm: bool = True

    @property
    def norm(self) -> float:
        """Largest norm; 0: any."""
        return self.limit if self.by_norm else 0.0


def check_trainer(trainer: "Trainer") -> None:
    """See that workers with different numbers of batches can do what a trainer is to do.

    Raises:
        ValueError: they cannot; the message names the option.
    """
    name = "ParameterServerStrategy"
    if trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None:
        raise ValueError(f"{name}: workers have different numbers of batches: validate after epochs (val_check_interval 1.0).")
    if trainer.limit_train_batches not in (1.0, None) and not (trainer.max_epochs == 1 or trainer.max_steps == 1):
        raise ValueError(
            f"{name}: limit_train_batches={trainer.limit_train_batches} would leave samples of the epoch behind: set max_steps."
        )
    if reload := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name}: reload_dataloaders_every_n_epochs={reload} must be 0: the service hands out the samples of one data set."
        )


class OpenLoop:
    """Takes over the loop of a trainer, which asks no other ranks from then on, until it is given back.

    Args:
        trainer: about to train, with a loader that tells no length.
        step_schedules: called in place of the steps of schedules by step.
        servers_clip: whether gradients are to be clipped by the servers, as the trainer would.

    Attributes:
        clip: what the servers have to do.
        max_steps: what the trainer was told; here, not each worker ends by its own count. None: no limit.
    """

    def __init__(self, trainer: "Trainer", step_schedules: Callable[[], None], servers_clip: bool) -> None:
        self._trainer = trainer
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        loop.update_lr_schedulers = _in_place_of_steps(loop.update_lr_schedulers, step_schedules)  # type: ignore[method-assign]
        self.max_steps: int | None = None
        if trainer.max_steps != -1:
            self.max_steps, loop.max_steps = trainer.max_steps, -1
        self.clip = Clip()
        self._former_clip: int | float | None = None
        if servers_clip and trainer.gradient_clip_val:
            by_value = "value" in str(trainer.gradient_clip_algorithm or "norm").lower()
            self.clip = Clip(float(trainer.gradient_clip_val), not by_value)
            self._former_clip, trainer.gradient_clip_val = trainer.gradient_clip_val, None
        fit.max_batches = float("inf")
        trainer.val_check_batch = float("inf")
        if fit._combined_loader is not None:
            fit._combined_loader.limits = None
        fetcher = fit._data_fetcher
        if fetcher is not None:
            iter(fetcher)  # a fresh pass, which knows no limit

    def give_back(self) -> None:
        """Let the trainer be as it was."""
        loop = self._trainer.fit_loop.epoch_loop
        for name in ("_broadcast_sigterm_tensor", "update_lr_schedulers"):
            vars(loop).pop(name, None)
        if self.max_steps is not None:
            loop.max_steps = self.max_steps
        if self._former_clip is not None:
            self._trainer.gradient_clip_val = self._former_clip

    @property
    def epoch(self) -> int:
        """The one that is being trained."""
        return self._trainer.current_epoch

    def join_epoch(self, epoch: int) -> None:
        """Go on with an epoch that others are training."""
        progress: Any = self._trainer.fit_loop.epoch_progress.current
        progress.ready = progress.started = progress.processed = progress.completed = epoch

    def end_epoch(self) -> None:
        """The batch in the loop's hands is the last of the epoch."""
        fit = self._trainer.fit_loop
        fit.epoch_loop.batch_progress.is_last_batch = True
        if fit._data_fetcher is not None:
            fit._data_fetcher.done = True

    def end_training(self) -> None:
        """That batch is the last of all."""
        self._trainer.should_stop = True

    def divide_evaluation_anew(self) -> None:
        """Others take part: the next validation makes its loaders again."""
        self._trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def _in_place_of_steps(original: Callable[..., None], step_schedules: Callable[[], None]) -> Callable[..., None]:
    def update(interval: str, update_plateau_schedulers: bool) -> None:
        if interval == "step" and not update_plateau_schedulers:
            step_schedules()
        else:
            original(interval, update_plateau_schedulers)

    return update
