"""The checkpoint that a run continues from."""

import copy
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from zoo.base.step_interval import crosses_multiple
from zoo.strategy_contract import agree, agree_at_end, agrees_without_waiting, is_asynchronous

__all__ = ["RunCheckpoint"]


_SAME_INTERRUPT = 3.0
"""Seconds in which a terminal and a launcher that passes its Ctrl-C on have both told."""


class RunCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` of a run current, so that whatever stops it, the run continues exactly.

    Saved every ``every_n_steps`` optimizer steps or ``minutes``, at the end of a batch; at the end of training; and when
    training stops by an exception, Ctrl-C or SIGTERM. The file always describes the moment after an optimizer step: a batch
    that was fetched but not applied, or the first micro-batches of an accumulated step, are trained again after resuming, none
    is lost. Add Lightning's ``ModelCheckpoint`` beside it to keep the best or every n-th state.

    Args:
        every_n_steps: optimizer steps between two saves; None: by time only.
        minutes: minutes between two saves, looked at after every tenth step; None: by steps only.
        folder: where ``last.ckpt`` lies; default is ``checkpoints`` in the run's folder.

    Raises:
        ValueError: an interval that is not positive.
    """

    def __init__(self, every_n_steps: int | None = None, minutes: float | None = 5.0, folder: Path | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"RunCheckpoint: every_n_steps={every_n_steps} must be at least 1, or null to save by time only.")
        if minutes is not None and minutes <= 0:
            raise ValueError(f"RunCheckpoint: minutes={minutes} must be positive, or null to save by steps only.")
        self.every_n_steps = every_n_steps
        self.minutes = minutes
        self.folder = folder
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._seen_step = 0
        self._boundary: dict[str, Any] | None = None
        self._boundary_step = -1
        self._told_to_stop = False
        self._told_at = 0.0
        self._interrupt: Any = None  # the handler of Ctrl-C while this one is in its place

    def path(self, trainer: Trainer) -> Path:
        """The checkpoint file."""
        return Path(self.folder or Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the run starts."""
        self._saved_at = time.monotonic()
        self._saved_step = self._seen_step = trainer.global_step
        self._boundary, self._boundary_step = copy.deepcopy(trainer.fit_loop.state_dict()), trainer.global_step
        self._told_to_stop = False
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            # Lightning's handler speaks to the other processes wherever it interrupts this one, in the middle of a gradient's
            # reduction too, and each process stops by itself. Here the signal is noted, and all stop after the same step.
            signal.signal(signal.SIGTERM, self._note_signal)
            self._interrupt = signal.signal(signal.SIGINT, self._note_signal)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._told_to_stop and time.monotonic() - self._told_at > _SAME_INTERRUPT:
            raise KeyboardInterrupt  # who presses Ctrl-C again does not want to wait
        if not self._told_to_stop:
            self._told_to_stop, self._told_at = True, time.monotonic()

    def _free_interrupt(self) -> None:
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)
            self._interrupt = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C its own way back."""
        self._free_interrupt()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, after a batch that applied a step."""
        strategy = trainer.strategy
        if agree(strategy, "stop", self._told_to_stop):
            trainer._signal_connector.received_sigterm = True  # Lightning raises SIGTERMException after this batch
        before, now = self._seen_step, trainer.global_step
        stepped = now != before
        # Ranks that step at different batches save in the batch in which they agreed, before they validate in it.
        if not stepped and not is_asynchronous(strategy):
            return
        due = late = False
        if stepped:
            self._seen_step = self._boundary_step = now
            self._boundary = _state_after_batch(trainer)
            due = self.every_n_steps is not None and crosses_multiple(before, now, self.every_n_steps)
            late = self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes
        if agrees_without_waiting(strategy):
            counted = due and not is_asynchronous(strategy)
            due = agree(strategy, "save", trainer.is_global_zero and (due or late) and not counted) or counted
        # Ranks ask rank 0 for the time, which makes them wait for it: not at every step.
        elif self.minutes is not None and not due and crosses_multiple(before, now, 10):
            due = bool(trainer.strategy.broadcast(late)) if trainer.world_size > 1 else late
        if due:
            self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        if agree_at_end(trainer.strategy, trainer.global_step != self._saved_step):
            self._save(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what is done before an exception, Ctrl-C or SIGTERM ends the run."""
        self._free_interrupt()
        in_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not in_training or (trainer.world_size > 1 and not _is_agreed_stop(exception)):
            return
        if not agree_at_end(trainer.strategy, self._seen_step > self._saved_step):
            return
        self._save(trainer)
        rank_zero_info(f"Saved {self.path(trainer)}; the same command with --ckpt_path last continues.")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describe the last applied step, not the batch that was cut off."""
        if self._boundary is not None and trainer.global_step == self._boundary_step:
            checkpoint["loops"]["fit_loop"] = self._boundary

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.path(trainer), False)  # everything, not only the weights
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()


def _state_after_batch(trainer: Trainer) -> dict[str, Any]:
    """State of Lightning's loops after the batch whose end is being announced.

    After the last batch of an epoch Lightning would take its state for that of a finished epoch, and go on with the used-up
    loader: the next epoch would be lost, and this one's validation and end. So the state says instead that all batches are
    done and, if it is due after this epoch, validation is about to begin.
    """
    state: dict[str, Any] = copy.deepcopy(trainer.fit_loop.state_dict())
    training, validation = state["epoch_loop.batch_progress"], state["epoch_loop.val_loop.batch_progress"]
    if training["is_last_batch"]:
        for count in (training["total"], training["current"]):
            count["completed"] = count["processed"]
        loop = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # Lightning leaves that to the end of validation
            return state
        for key in ("ready", "started"):
            validation["total"][key] = validation["total"]["completed"] + 1
        validation["total"]["processed"] = validation["total"]["completed"]
        validation["current"].update(ready=1, started=1, processed=0, completed=0)
        validation["is_last_batch"] = False
    return state


def _is_agreed_stop(exception: BaseException) -> bool:
    """Whether all ranks stop together, so that saving (a collective call) cannot wait for a rank that is gone."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    return isinstance(exception, SIGTERMException)
