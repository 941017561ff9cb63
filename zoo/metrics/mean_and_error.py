"""Mean of a quantity over samples, and how far it may be off."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanAndError"]


class MeanAndError(Metric):
    """Mean over samples and its standard error, over all batches and ranks.

    The standard error is the sample standard deviation over sqrt(N); NaN for a single sample.

    Example:
        >>> metric = MeanAndError()
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0]))
        >>> [round(value.item(), 4) for value in metric.compute()]
        [2.0, 0.5774]
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the values (B,) of some samples."""
        values = values.detach().double()
        self.count += values.numel()
        self.total += values.sum()
        self.squares += values.square().sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard error, float64."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0) * self.count / (self.count - 1)
        return mean, (variance / self.count).sqrt()
