"""The learning-rate schedule of the published training."""

import math
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["WarmUp"]

Shape = Literal["constant", "cosine"]


class WarmUp(LambdaLR):
    """Linear warm-up from 0, then constant (published) or a half cosine down to ``min_lr``.

    At step i < ``warmup_steps`` the rate is lr i / ``warmup_steps``. Source: You et al., arXiv 2503.07197, appendix D, where
    the warm-up takes 100 of 800 epochs.

    Args:
        optimizer: the optimizer.
        warmup_steps: optimizer steps of the warm-up.
        shape: what follows.
        total_steps: step at which the cosine ends; needed for it alone.
        min_lr: where the cosine ends.

    Raises:
        ValueError: numbers out of range, or a cosine without its end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        shape: Shape = "constant",
        total_steps: int | None = None,
        min_lr: float = 0.0,
    ) -> None:
        if shape not in get_args(Shape):
            raise ValueError(f"WarmUp: shape={shape!r} must be one of {', '.join(get_args(Shape))}.")
        if warmup_steps < 0 or min_lr < 0:
            raise ValueError(f"WarmUp: warmup_steps={warmup_steps} and min_lr={min_lr} must not be negative.")
        if shape == "cosine" and (total_steps is None or total_steps <= warmup_steps):
            raise ValueError(f"WarmUp: the cosine needs total_steps={total_steps} greater than warmup_steps={warmup_steps}.")
        base = optimizer.defaults["lr"]

        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            if shape == "constant":
                return 1.0
            assert total_steps is not None
            done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            low = min_lr / base
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)
