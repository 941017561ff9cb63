"""Layers that begin at zero, so that a block adds nothing until it has learned to."""

from typing import TypeVar

from torch import nn

__all__ = ["zero_init"]

M = TypeVar("M", bound=nn.Module)


def zero_init(module: M) -> M:
    """Set all parameters of a module to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
