"""Hot restart: when a rank is lost, the others go on without ending, and a new process takes its place (section 9).

Survivors notice that a collective call fails, and that a member of their group is gone. They drop what they were doing, cut their
connections, join the next generation, and fit again in the same process, from memory: the state of the survivor that has come
furthest, as a checkpoint after its last completed step would hold it, goes to all. A survivor that was a step behind, and the new
process, take it over; the step that was interrupted is done again, by all and with the same samples.

Until the ranks have joined, each prepares by itself what Lightning prepares for a fit. Callbacks that did something once, and
exchanged something over it, do it again in the new process only, whose peers would not be with it.
"""

import gc
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.antdt.restart.gloo_links import GlooLinks
from strategies.antdt.restart.loop_progress import Reached, before_interruption, is_before_first_batch
from strategies.antdt.restart.rank_keeper import RankKeeper

__all__ = ["FROM_MEMORY", "HotRestart", "KeptBuffers", "Snapshot", "newest"]

FROM_MEMORY = "the memory of another rank"
"""Stands where the path of a checkpoint would."""

_NOTICED_WITHIN = 5.0  # seconds from an error to the news that a peer is gone


class Host(Protocol):
    """The strategy, as seen from here."""

    @property
    def lightning_module(self) -> Any:
        """The training loop."""

    def somebody_is_gone(self) -> bool:
        """Whether the service misses a member of this rank's group."""

    @property
    def told_to_stop(self) -> bool:
        """Whether a SIGTERM has come."""

    def end_at_sigterm(self) -> None:
        """There is no step any more after which to stop: let SIGTERM end this process at once."""

    def position(self) -> tuple[int, int]:
        """Epoch, and steps of it, that are trained."""

    def extra_state(self) -> dict[str, Any]:
        """State that the next group needs and a checkpoint does not hold."""


@dataclass(frozen=True)
class Snapshot:
    """The state after a step.

    Attributes:
        step: number of optimizer steps.
        trained: samples that each rank has trained since the generation began.
        content: of a checkpoint, as bytes: uint8 (size,).
    """

    step: int
    trained: tuple[int, ...]
    content: Tensor

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], step: int, trained: Sequence[int]) -> "Snapshot":
        """Of plain types and tensors."""
        buffer = io.BytesIO()
        torch.save(dict(checkpoint), buffer)
        return cls(step, tuple(trained), torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8))

    def checkpoint(self) -> dict[str, Any]:
        """The content; tensors on the CPU."""
        loaded: dict[str, Any] = torch.load(io.BytesIO(self.content.numpy().tobytes()), map_location="cpu", weights_only=True)
        return loaded

    def told(self) -> dict[str, Any]:
        """Message to the service, see `Client.join`."""
        return {"step": self.step, "trained": list(self.trained)}


class HotRestart:
    """Runs a fit, and runs it again after ranks were lost; stands in the place of Lightning's launchers.

    Args:
        host: the strategy.
        keeper: of this rank.
        run: runs a function of the trainer, as the launcher does whose place this takes.

    Attributes:
        links: of the process groups.
        snapshot: what this process brings along into the next group; None for a new one.
        rejoins: whether this fit goes on where a group broke.
        trained: samples that each rank has trained in this generation.
        restarts: losses that this process has survived.
    """

    is_interactive_compatible = False

    def __init__(self, host: Host, keeper: RankKeeper, run: Callable[..., Any]) -> None:
        self.host, self.keeper, self._run = host, keeper, run
        self.links, self.buffers = GlooLinks(), KeptBuffers()
        self.snapshot: Snapshot | None = None
        self.rejoins = self.trains = self.replace_me = False
        self.trained: list[int] = []
        self.restarts = 0
        self._max_steps: int | None = None
        self._split = self._over = False

    # Lightning's interface of launchers

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run a function of the trainer.

        Args:
            function: of a fit: ``(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)``.
            args: of the function.
            trainer: that runs it.
            kwargs: of the function.
        """
        if self._split or trainer is None or not trainer.training:
            return self._run(function, *args, trainer=trainer, **kwargs)
        self.keeper.split()
        self._split = True
        if self.keeper.number:
            self.rejoins = True
            _continue_logs(trainer)
        while True:
            try:
                words = _from_memory(args) if self.rejoins else args
                result = self._run(function, *words, trainer=trainer, **kwargs)
                self._over, self.rejoins, self.snapshot = True, False, None
                self.keeper.finished()
                return result
            except Exception as failure:
                if not self._is_loss(failure):
                    raise
                self.host.end_at_sigterm()
                if self.host.told_to_stop:  # the launcher ends all, because no spare comes
                    raise
                self._leave(trainer, failure)
            self.restarts += 1
            self.rejoins = True
            # What failed refers to the broken group, whose hooks would be called in the next backward pass.
            gc.collect()

    def kill(self, number: int) -> None:
        """There is nothing to end."""

    # What the strategy tells

    def loads(self, trainer: Any) -> None:
        """The newest snapshot is there, and about to be loaded."""
        loop = trainer.fit_loop.epoch_loop
        assert self.snapshot is not None
        if loop.max_steps != -1 and self.snapshot.step >= loop.max_steps:
            # Lightning would begin no training, and so not end it either: what is left to be done is.
            self._max_steps, loop.max_steps = loop.max_steps, self.snapshot.step + 1

    def begins(self, trainer: Any, num_ranks: int) -> None:
        """Training begins, or goes on (``on_train_start``)."""
        self.trained = [0] * num_ranks
        if self.rejoins:
            loop = trainer.fit_loop.epoch_loop
            if is_before_first_batch(loop.batch_progress.state_dict()):
                total = loop.batch_progress.total
                total.ready = total.started = total.completed
            loop.val_loop._has_run = loop._skip_next_val = False
            if not loop.val_loop.restarted_mid_evaluation:
                self.validates(trainer)
        self.trains, self.snapshot = True, None

    def validates(self, trainer: Any) -> None:
        """A validation begins: the loop may look at the number of steps again."""
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def step_begins(self, trainer: Any) -> None:
        """A step begins: the last moment before which nothing of it has happened."""
        if self.replace_me:
            for logger in trainer.loggers:
                logger.save()
            self.keeper.ask_for_another()
        self.buffers.keep(trainer.lightning_module, trainer.global_step)

    def step_done(self, counts: Sequence[int]) -> None:
        """An optimizer step is done.

        Args:
            counts: samples of each rank.
        """
        self.trained = [before + count for before, count in zip(self.trained, counts, strict=True)]

    def joined(self) -> None:
        """The next generation has begun, and counts from 0."""
        if self.snapshot is not None:
            self.snapshot = replace(self.snapshot, trained=(0,) * len(self.snapshot.trained))

    # A loss

    def _is_loss(self, failure: Exception) -> bool:
        """Whether a failure is due to another rank that is gone."""
        if not isinstance(failure, RuntimeError) or not (self.trains or self.rejoins):
            return False
        end = time.monotonic() + _NOTICED_WITHIN
        while not (gone := self.host.somebody_is_gone()) and time.monotonic() < end:
            time.sleep(0.02)
        return gone

    def _leave(self, trainer: Any, failure: Exception) -> None:
        """Leave the broken group, and training, with a snapshot."""
        self.links.cut()
        if self.trains:
            self.snapshot = self._capture(trainer, failure)
            self.trains = False
        trainer.training = True  # not validating: all loops are ended
        trainer._teardown()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _capture(self, trainer: Any, failure: Exception) -> Snapshot:
        module, fit = self.host.lightning_module, trainer.fit_loop
        for callback in trainer.callbacks:
            if callback not in trainer.checkpoint_callbacks:  # which would save together with others
                callback.on_exception(trainer, module, failure)
        epoch, steps = self.host.position()
        complete, validating = steps >= trainer.num_training_batches, bool(trainer.validating)
        if validating:
            fit.epoch_loop.val_loop._module_mode.restore(module)
        elif complete and fit.epoch_progress.current.started <= epoch + 1:
            fit.epoch_progress.current.completed = epoch  # by which the loop knows what epoch it is
            validating = fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
        vars(module).pop("forward", None)  # Lightning's redirection, in whose midst the failure may have come
        self.buffers.put_back(trainer.global_step)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
        reached = Reached(epoch, steps, complete, validating)
        checkpoint["loops"]["fit_loop"] = before_interruption(fit.state_dict(), reached)
        return Snapshot.of({**checkpoint, **self.host.extra_state()}, trainer.global_step, self.trained)


def newest(own: Snapshot | None, group: dist.ProcessGroup) -> Snapshot:
    """The snapshot of the rank that has come furthest; a collective call.

    Args:
        own: of this rank.
        group: of all ranks, for tensors on the CPU.

    Returns:
        The same on all ranks.

    Raises:
        RuntimeError: no rank has one.
    """
    size = 0 if own is None else own.content.numel()
    rows = [torch.zeros(2, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, torch.tensor([-1 if own is None else own.step, size]), group=group)
    reached = [int(step) for step, _ in rows]
    source = max(range(len(reached)), key=lambda rank: reached[rank])
    if reached[source] < 0:
        raise RuntimeError(
            "AntDT: ranks were lost before any had begun to train, or all of them: there is no state to go on from. torchrun"
            " starts all ranks again from the last checkpoint, if --max-restarts allows it."
        )
    content = torch.empty(int(rows[source][1]), dtype=torch.uint8)
    if own is not None and dist.get_rank(group) == source:
        content = own.content
    dist.broadcast(content, src=dist.get_global_rank(group, source), group=group)
    return Snapshot(reached[source], (0,) * len(rows), content)


class KeptBuffers:
    """Copies of a module's buffers from before a step, which the forward pass of a step that is interrupted may change."""

    def __init__(self) -> None:
        self._step = -1
        self._kept: Sequence[tuple[Tensor, Tensor]] = ()

    def keep(self, module: nn.Module, step: int) -> None:
        """A step begins.

        Args:
            module: that is trained.
            step: number of steps that are completed.
        """
        self._step = step
        self._kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]

    def put_back(self, step: int) -> None:
        """Undo what an interrupted step has changed.

        Args:
            step: number of steps that are completed.
        """
        if step == self._step:
            with torch.no_grad():
                for buffer, kept in self._kept:
                    buffer.copy_(kept)
        self._step, self._kept = -1, ()


def _from_memory(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args[:4], FROM_MEMORY, *args[5:])


def _continue_logs(trainer: Any) -> None:
    """A new process's loggers shall not drop what was logged since the run was resumed, as those of the first one did."""
    for logger in trainer.loggers:
        if getattr(logger, "resume_step", None) is not None:
            logger.resume_step = None
        if "purge_step" in (options := getattr(logger, "_kwargs", {})):
            options["purge_step"] = None
