"""Mean of a quantity over samples, and how far it may be off."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Float64Sums", "Mean", "MeanAndError"]


class Float64Sums(Metric):
    """Metric whose states are sums in float64, also inside a module that is converted to another float type.

    A count in bfloat16 ends at 256, since 256 + 1 rounds to 256.

    Args:
        names: Names of the sums.
        shape: Shape of each.
        kwargs: Arguments of ``Metric``.
    """

    def __init__(self, *names: str, shape: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in names:
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Self:
        kept = {name: getattr(self, name) for name in self._defaults}
        super()._apply(fn, *args, **kwargs)
        for name, before in kept.items():
            device = getattr(self, name).device
            setattr(self, name, before.to(device))
            self._defaults[name] = torch.zeros(before.shape, dtype=torch.float64, device=device)
        return self


class Mean(Float64Sums):
    """Mean over samples, weighted or not, over all batches and ranks.

    Example:
        >>> metric = Mean().to(torch.bfloat16)
        >>> metric.update(torch.ones(1000))
        >>> metric.update(torch.zeros(1000))
        >>> metric.compute().item()
        0.5
    """

    count: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("count", "total", **kwargs)

    def update(self, values: Tensor, weights: Tensor | float = 1.0) -> None:
        """Add the values of some samples, of any shape.

        Args:
            values: the values.
            weights: what each counts for; of the same shape, or one for all.
        """
        values = values.detach().double()
        weights = torch.as_tensor(weights, dtype=torch.float64, device=values.device).expand_as(values)
        self.count += weights.sum()
        # Not a product with zero: what has no weight may be infinite.
        self.total += torch.where(weights == 0, 0, values * weights).sum()

    def compute(self) -> Tensor:
        """The mean, float32 as logged numbers are."""
        return (self.total / self.count).float()


class MeanAndError(Float64Sums):
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
        super().__init__("count", "total", "squares", **kwargs)

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
