"""Bounds of the negative log-likelihood over a test, each with the standard error of its mean over the samples."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from zoo.metrics.mean_and_error import MeanAndError

__all__ = ["LikelihoodBounds"]


class LikelihoodBounds(nn.ModuleDict):
    """Means over all samples and processes, by unit and number of messages.

    Args:
        units: Factors from nats per element, by name.
        steps: Numbers of messages; 0 stands for infinitely many.
    """

    def __init__(self, units: Mapping[str, float], steps: Sequence[int]) -> None:
        super().__init__({_name(unit, part): MeanAndError() for unit in units for part in (*steps, None)})
        self.factors = dict(units)

    def add(self, bounds: Mapping[int | None, Tensor]) -> None:
        """Add samples.

        Args:
            bounds: Nats per element (B,) by number of messages; None stands for the part that the reconstruction has in all.
        """
        for unit, factor in self.factors.items():
            for part, bound_B in bounds.items():
                cast(MeanAndError, self[_name(unit, part)]).update(bound_B * factor)

    def compute(self) -> dict[str, Tensor]:
        """Means and standard errors by name since the last call."""
        values = {}
        for name, bound in self.items():
            values[name], values[f"{name}/standard_error"] = cast(MeanAndError, bound).compute()
            cast(MeanAndError, bound).reset()
        return values


def _name(unit: str, num_steps: int | None) -> str:
    return f"{unit}/{'reconstruction' if num_steps is None else f'n={num_steps}' if num_steps else 'continuous'}"
