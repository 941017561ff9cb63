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
        sizes = [each.numel() for each in self.parameters]
        #: All gradients one after the other, and for each parameter the number of passes that gave it one, float64.
        self.total = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float64, device=device)
        *self._parts, self._passes = self.total.split([*sizes, len(sizes)])

    def add(self) -> None:
        """Add the gradients of a pass, and forget them."""
        for number, (part, parameter) in enumerate(zip(self._parts, self.parameters, strict=True)):
            if parameter.grad is not None:
                part += parameter.grad.flatten()
                parameter.grad = None
                self._passes[number] += 1

    def give(self, add_up: Callable[[Tensor], object]) -> None:
        """Make the sum the gradient of the parameters that any process found one for, and begin again.

        Args:
            add_up: Adds the totals of all processes, in place.
        """
        add_up(self.total)
        for passes, part, parameter in zip(self._passes.tolist(), self._parts, self.parameters, strict=True):
            if passes:  # an expert may have tokens on one process alone
                parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True)
        self.total.zero_()
