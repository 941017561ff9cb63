"""Global batch size that grows in the first part of training."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from zoo.strategy_contract import data_replicas, is_asynchronous

__all__ = ["BatchSizeWarmup"]


class _Accumulation(int):
    """A number of micro-batches whose counting begins at a batch of the epoch that need not be its multiple.

    Lightning zeroes the gradients where ``batch_idx % accumulate_grad_batches == 0`` and steps where the batches begun are a
    multiple of it, so a number changed in the middle of an epoch would begin with a cut step whose gradients are not zeroed
    before. Modulo this number, batches are counted from ``first`` on.
    """

    first: int

    def __new__(cls, number: int, first: int) -> "_Accumulation":
        made = super().__new__(cls, number)
        made.first = first
        return made

    def __rmod__(self, batches: int) -> int:
        return (batches - self.first) % int(self)


class BatchSizeWarmup(Callback):
    """Grows the global batch from ``start`` to ``end`` sequences, linearly in the tokens seen, by accumulating gradients.

        batch = start + (end - start) * min(1, tokens seen / tokens)

    is rounded to a whole number of micro-batches (the DataModule's ``batch_size`` times the number of processes) and set after
    each optimizer step, in the middle of an epoch too. The last step of an epoch may be smaller, as always in Lightning.
    Logs ``global_batch_size``, in sequences. Ling's pre-training grows it from 2,560 to 8,960 (arXiv 2503.05139, section 3.4.1);
    the form of the ramp is not published.

    Learning-rate schedules whose length comes from the trainer's estimate of all steps do not know of it: give them a number.

    Args:
        start: sequences in the first global batch.
        end: sequences in a global batch after the ramp.
        tokens: over how many tokens, of all processes, it grows.

    Attributes:
        tokens_seen: tokens of all processes so far, counted while the batch grows.

    Raises:
        ValueError: numbers out of range; or, when training starts, DeepSpeed, manual optimization,
            ``accumulate_grad_batches`` set beside it, or a loader that does not tell its batch size.
    """

    def __init__(self, start: int, end: int, tokens: int) -> None:
        if not 1 <= start <= end:
            raise ValueError(f"BatchSizeWarmup: start={start} must be at least 1 and not above end={end}.")
        if tokens < 1:
            raise ValueError(f"BatchSizeWarmup: tokens={tokens} must be at least 1.")
        self.start = start
        self.end = end
        self.tokens = tokens
        self.tokens_seen = 0
        self._first = 0
        self._unit = 1
        self._tokens_of_step = 0
        self._seen_step = 0

    def batch_size(self, tokens_seen: int) -> float:
        """Sequences of the global batch after so many tokens, not rounded.

        >>> BatchSizeWarmup(start=2560, end=8960, tokens=1000).batch_size(500)
        5760.0
        """
        return self.start + (self.end - self.start) * min(1.0, tokens_seen / self.tokens)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "BatchSizeWarmup: DeepSpeed fixes the number of micro-batches when it starts: remove one of the two."
            )
        if is_asynchronous(trainer.strategy):
            raise ValueError(
                "BatchSizeWarmup counts the samples of all ranks together, and with sync_seconds these take different numbers of"
                " steps: remove one of the two."
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"BatchSizeWarmup: {type(pl_module).__name__} optimizes manually, and so accumulates by itself: remove"
                " BatchSizeWarmup."
            )
        if trainer.accumulate_grad_batches != 1 and not isinstance(trainer.accumulate_grad_batches, _Accumulation):
            raise ValueError(
                f"BatchSizeWarmup sets accumulate_grad_batches, which is {trainer.accumulate_grad_batches} already: leave it at"
                " 1."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the first batch size, or the one of the checkpoint."""
        micro_batch = getattr(trainer.train_dataloader, "batch_size", None)
        if micro_batch is None:
            raise ValueError(
                f"BatchSizeWarmup: the training loader ({type(trainer.train_dataloader).__name__}) does not tell its batch_size,"
                " which the global batch is made of: use one loader with a fixed batch_size."
            )
        num_replicas, _ = data_replicas(trainer.strategy)
        self._unit = micro_batch * num_replicas
        for name, size in (("start", self.start), ("end", self.end)):
            if size % self._unit:
                rank_zero_info(
                    f"BatchSizeWarmup: {name}={size} is no multiple of {self._unit} (batch_size {micro_batch} x"
                    f" {num_replicas} processes): it is taken as {self._micro_batches(size) * self._unit}."
                )
        self._tokens_of_step = 0
        self._seen_step = trainer.global_step
        self._set(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Count a micro-batch; after a step, set the size of the next."""
        growing = self.tokens_seen < self.tokens
        if growing:
            self._tokens_of_step += _num_tokens(batch)
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        if growing:
            seen, self._tokens_of_step = self._tokens_of_step, 0
            if trainer.world_size > 1:  # lengths may differ between ranks, the number of micro-batches must not
                local = torch.tensor(seen, device=trainer.strategy.root_device)
                per_rank = trainer.strategy.reduce(local, reduce_op="sum").item() / trainer.world_size
                seen = round(per_rank * data_replicas(trainer.strategy)[0])
            self.tokens_seen += seen
        ends = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        self._first = 0 if ends else batch_idx + 1
        pl_module.log("global_batch_size", float(trainer.accumulate_grad_batches * self._unit))
        self._set(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint, plain data."""
        return {"tokens_seen": self.tokens_seen, "first": self._first}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State from the checkpoint."""
        self.tokens_seen = state_dict["tokens_seen"]
        self._first = state_dict["first"]

    def _micro_batches(self, sequences: float) -> int:
        return max(1, round(sequences / self._unit))

    def _set(self, trainer: Trainer) -> None:
        trainer.accumulate_grad_batches = _Accumulation(self._micro_batches(self.batch_size(self.tokens_seen)), self._first)


def _num_tokens(batch: Any) -> int:
    """Elements of the batch's ``input_ids``.

    Raises:
        ValueError: it has none.
    """
    if not (isinstance(batch, Mapping) and "input_ids" in batch):
        raise ValueError('BatchSizeWarmup counts tokens, and these batches have no "input_ids": use text, or remove it.')
    return int(batch["input_ids"].numel())
