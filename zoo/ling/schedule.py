"""Learning rates of the three training stages.

Source: "Every FLOP Counts", arXiv 2503.05139, sections 3.4.1 to 3.4.3.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["WSD", "Annealing", "annealed"]

Form = Literal["minus_sqrt", "inverse_sqrt"]


def annealed(lr_start: float, lr_end: float, share: float, form: Form = "minus_sqrt") -> float:
    """Learning rate after a share u of the annealing; exactly ``lr_start`` at 0 and ``lr_end`` at 1.

    The report says "inverse square root decay" without a formula, and over four decades of learning rate a plain 1/sqrt(step)
    does not fit into its number of steps. ``minus_sqrt`` is ``lr_end + (lr_start - lr_end) (1 - sqrt(u))``; ``inverse_sqrt`` is
    ``lr_start / sqrt(1 + ((lr_start / lr_end)^2 - 1) u)``, which spends nearly all its steps near ``lr_end``.

    Args:
        lr_start: learning rate at u = 0.
        lr_end: learning rate at u = 1.
        share: u; below 0 and above 1 the rate stays as at these.
        form: One of the two curves.

    Example:
        >>> [f"{annealed(1.2e-4, 1.2e-8, share):.4g}" for share in (0.0, 0.25, 1.0)]
        ['0.00012', '6.001e-05', '1.2e-08']
    """
    if share <= 0:
        return lr_start
    if share >= 1:
        return lr_end
    if form == "minus_sqrt":
        return lr_end + (lr_start - lr_end) * (1 - math.sqrt(share))
    return lr_start / math.sqrt(1 + ((lr_start / lr_end) ** 2 - 1) * share)


class _RateOfStep(LRScheduler):
    """A learning rate that is a function of the step and the group's own rate.

    A checkpoint holds the step but not the function, so that a resumed run follows the arguments it is given.
    """

    def __init__(self, optimizer: Optimizer, rate: Callable[[int, float], float]) -> None:
        self._rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """One rate for each parameter group."""
        return [self._rate(self.last_epoch, float(base)) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The step, as plain data."""
        return {name: value for name, value in super().state_dict().items() if name != "_rate"}


class WSD(_RateOfStep):
    """Linear warm-up from 0, constant, half of it, and if wanted an annealing at the end.

    The optimizer's own learning rate is the peak, 2.4e-4 in the report. The report's annealing is a stage with data of its own,
    for which `Annealing` serves; ``annealing_steps`` puts it into the same run. The report's 60 % are of tokens: with batches of
    one size that is the same share of steps.

    Args:
        optimizer: the optimizer.
        total_steps: optimizer steps of the run, the annealing included; after them the rate stays.
        warmup_steps: steps of the warm-up: at step i the rate is lr i / ``warmup_steps``.
        halve_at: share of the steps before the annealing after which the rate is halved, once; 1: never.
        annealing_steps: steps of the annealing at the end; 0: none.
        lr_end: Learning rate at the end of the annealing.
        form: curve of the annealing, see `annealed`.

    Raises:
        ValueError: numbers out of range, or stages that do not fit into ``total_steps``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 2000,
        halve_at: float = 0.6,
        annealing_steps: int = 0,
        lr_end: float = 1.2e-8,
        form: Form = "minus_sqrt",
    ) -> None:
        if warmup_steps < 0 or annealing_steps < 0:
            raise ValueError(f"WSD: warmup_steps={warmup_steps} and annealing_steps={annealing_steps} must not be negative.")
        if not 0 < halve_at <= 1:
            raise ValueError(f"WSD: halve_at={halve_at} is a share of the steps: it must lie in (0, 1].")
        stable = total_steps - annealing_steps
        halved = round(halve_at * stable)
        if halved < warmup_steps or stable < 1:
            raise ValueError(
                f"WSD: of total_steps={total_steps} less annealing_steps={annealing_steps}, the share halve_at={halve_at} is "
                f"step {halved}, before the end of warmup_steps={warmup_steps}: make the warm-up shorter or the run longer."
            )
        if annealing_steps:
            _check_end("WSD", optimizer, lr_end, form, 0.5 if halve_at < 1 else 1.0)

        def rate(step: int, peak: float) -> float:
            if step < warmup_steps:
                return peak * step / warmup_steps
            lr = peak if step < halved or halve_at == 1 else 0.5 * peak
            return annealed(lr, lr_end, (step - stable) / annealing_steps, form) if annealing_steps else lr

        super().__init__(optimizer, rate)


class Annealing(_RateOfStep):
    """From the optimizer's learning rate (1.2e-4 in the report) down to ``lr_end``, then constant.

    Args:
        optimizer: the optimizer.
        total_steps: step at which the rate is exactly ``lr_end``.
        lr_end: Learning rate at the end.
        form: the curve, see `annealed`.

    Raises:
        ValueError: no steps, or an end that is not below the start.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, lr_end: float = 1.2e-8, form: Form = "minus_sqrt") -> None:
        if total_steps < 1:
            raise ValueError(f"Annealing: total_steps={total_steps} must be at least 1.")
        _check_end("Annealing", optimizer, lr_end, form, 1.0)
        super().__init__(optimizer, lambda step, start: annealed(start, lr_end, step / total_steps, form))


def _check_end(name: str, optimizer: Optimizer, lr_end: float, form: str, share: float) -> None:
    """Make sure that the curve exists and falls in every parameter group."""
    if form not in get_args(Form):
        raise ValueError(f"{name}: form={form!r} must be one of {', '.join(get_args(Form))}.")
    start = min(share * group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    if not 0 < lr_end <= start:
        raise ValueError(f"{name}: lr_end={lr_end} must be above 0 and at most {start:g}, where the annealing starts.")
