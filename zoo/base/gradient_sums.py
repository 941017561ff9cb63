"""Gradients of several passes, added in an order that does not matter."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["GradientSums"]


class GradientSums:
    """Sum of the gradients of several passes, in float64, so that the order in which they are added is lost in rounding.

    Passes of the same samples then give the same step, whichever process makes them. It takes 8 bytes a trained parameter.

    Args:
        parameters: Those with ``requires_grad`` are added.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        device = self.parameters[0].device if self.parameters else None
        #: All gradients one after the other, float64.
        self.total = torch.zeros(sum(each.numel() for each in self.parameters), dtype=torch.float64, device=device)
        self._parts = self.total.split([each.numel() for each in self.parameters])
        self._found: set[int] = set()

    def add(self) -> None:
        """Add the gradients of a pass, and forget them."""
        for number, (part, parameter) in enumerate(zip(self._parts, self.parameters, strict=True)):
            if parameter.grad is not None:
                part += parameter.grad.flatten()
                parameter.grad = None
                self._found.add(number)

    def give(self, add_up: Callable[[Tensor], object]) -> None:
        """Make the sum the parameters' gradient, and begin again.

        Args:
            add_up: Adds the totals of all processes, in place.
        """
        add_up(self.total)
        for number in self._found:
            parameter = self.parameters[number]
            parameter.grad = self._parts[number].view_as(parameter).to(parameter.dtype, copy=True)
        self.total.zero_()
        self._found.clear()
