"""Evaluation mode for a while."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode"]

_USERS: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
_MODES: "weakref.WeakKeyDictionary[nn.Module, dict[nn.Module, bool]]" = weakref.WeakKeyDictionary()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode (no dropout), and every part of it back into its own mode afterwards.

    It may be entered several times, and left in any order: the last one to leave puts the modes back.

    Args:
        network: the network.
    """
    if not _USERS.get(network):
        _MODES[network] = {part: part.training for part in network.modules()}
        network.eval()
    _USERS[network] = _USERS.get(network, 0) + 1
    try:
        yield
    finally:
        _USERS[network] -= 1
        if not _USERS[network]:
            for part, mode in _MODES.pop(network).items():
                part.training = mode
