"""The loss of a module as a mean over whole optimizer steps: weights of micro-batches, and of the accumulated gradient."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from zoo.lm.step_mean import StepMean
from zoo.strategy_contract import step_group, weighs_batches

if TYPE_CHECKING:
    from zoo.module import ZooModule as Base
else:
    Base = object

__all__ = ["StepWeights"]


class StepWeights(Base):
    """A part of a module: `StepMean` under Lightning, unless ``loss_over`` is ``micro_batch``."""

    loss_over: str
    _step_mean: StepMean

    def average_over(self, loss_over: str) -> None:
        """Begin without a step; called once, in the constructor.

        Args:
            loss_over: ``step`` or ``micro_batch``.

        Raises:
            ValueError: If it is neither.
        """
        if loss_over not in ("step", "micro_batch"):
            raise ValueError(f"{type(self).__name__}: loss_over={loss_over!r} must be one of step, micro_batch.")
        self.loss_over = loss_over
        self._step_mean = StepMean()

    @override
    def setup(self, stage: str) -> None:
        """Refuse what would give another loss than is asked for.

        Raises:
            ValueError: If the strategy accumulates gradients by itself, where they cannot be weighted.
        """
        super().setup(stage)
        hidden = self.trainer.strategy.handles_gradient_accumulation and self.trainer.accumulate_grad_batches != 1
        if stage == "fit" and self._weighs_steps and hidden:
            raise ValueError(
                f"{type(self).__name__}: loss_over=step weighs the accumulated gradient, which"
                f" {type(self.trainer.strategy).__name__} keeps to itself: set --model.loss_over micro_batch (the same for packed"
                f" batches with equal numbers of labels), or accumulate_grad_batches to 1 instead of"
                f" {self.trainer.accumulate_grad_batches}, with a larger batch_size."
            )

    @property
    def _weighs_steps(self) -> bool:
        """Whether this module weights micro-batches; a strategy with batches of its own sizes does it by itself."""
        if self._trainer is None or self.loss_over == "micro_batch":
            return False
        return not weighs_batches(self.trainer.strategy)

    def _begin_mean(self, count: Tensor, batch_idx: int) -> None:
        """Count the labels (or pairs) of a micro-batch; those of other processes arrive while the network runs."""
        if self._weighs_steps:
            self._step_mean.begin(count, batch_idx % self.trainer.accumulate_grad_batches == 0, *self._step_group())

    def _weight(self, loss: Tensor) -> Tensor:
        """Factor of the mean loss of that micro-batch."""
        return self._step_mean.weight(loss.dtype) if self._weighs_steps else torch.ones_like(loss)

    def _step_group(self) -> tuple[dist.ProcessGroup | None, int]:
        """The processes that take this step together (None: all), and their number."""
        if not (dist.is_available() and dist.is_initialized()) or self.trainer.world_size == 1:
            return None, 1
        group = step_group(self.trainer.strategy)
        return group, dist.get_world_size(group)

    def _summed(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The sum over the processes that take this step together, and their number."""
        group, num_processes = self._step_group()
        if num_processes > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=group)
        return tensor, num_processes

    @override
    def on_after_backward(self) -> None:
        """Make the gradient the mean over the step, before it is judged or clipped."""
        super().on_after_backward()
        if not self._weighs_steps or self.trainer.fit_loop._should_accumulate():
            return
        factor = self._step_mean.finish(self.trainer.accumulate_grad_batches)
        if factor != 1:
            for optimizer in self.trainer.optimizers:
                for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
