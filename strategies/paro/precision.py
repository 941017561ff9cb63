"""Number format of each state of a model."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

__all__ = ["FloatName", "StatePrecision"]

FloatName = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class StatePrecision:
    """Formats of gathered parameters, of gradients on the wire and while they accumulate, and of the optimizer's masters.

    Masters are float32 (float64 where the parameters are): the optimizer never works in half precision [paper 3.1.1: 12 bytes a
    parameter are masters and Adam's moments]. No state of a float64 parameter is narrower than that.

    Args:
        parameters: format in which parameters are gathered and used; None: the one they have.
        reduce: format in which gradients travel; pieces of a narrow one are summed in float32.
        accumulate: format in which gradients wait for the end of a step.

    Raises:
        ValueError: a name that is neither ``float32`` nor ``bfloat16``.
    """

    parameters: FloatName | None = None
    reduce: FloatName = "float32"
    accumulate: FloatName = "float32"

    def __post_init__(self) -> None:
        for argument, value in vars(self).items():
            if value not in get_args(FloatName) and not (argument == "parameters" and value is None):
                raise ValueError(f"{argument}_dtype={value!r} must be one of {', '.join(get_args(FloatName))}.")

    def compute(self, dtype: torch.dtype) -> torch.dtype:
        """Of gathered parameters, given the format that the module has them in."""
        if self.parameters is None or not dtype.is_floating_point or dtype == torch.float64:
            return dtype
        return getattr(torch, self.parameters)

    def master(self, dtype: torch.dtype) -> torch.dtype:
        """Of masters."""
        return torch.promote_types(dtype, torch.float32)

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """Of gradients on their way."""
        return dtype if dtype == torch.float64 else getattr(torch, self.reduce)

    def accumulator(self, dtype: torch.dtype) -> torch.dtype:
        """Of gradients that accumulate."""
        return dtype if dtype == torch.float64 else getattr(torch, self.accumulate)
