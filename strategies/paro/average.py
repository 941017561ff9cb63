"""Exponential moving averages of the weights, of which each rank keeps what it keeps of the masters."""

from typing import Any

import torch
from torch import Tensor

from strategies.paro.checkpoint import weights
from strategies.paro.engine import PaROEngine

__all__ = ["ShardAverage"]


class ShardAverage:
    """The average of each trained unit's master, at the granularity of the optimizer; it begins at the present weights.

    Args:
        engine: holds the masters.
        device: where the average is kept; None: beside the masters.
    """

    def __init__(self, engine: PaROEngine, device: torch.device | str | None = None) -> None:
        self.engine = engine
        self._masters = [unit.master.detach() for unit in engine.units if unit.master is not None]
        self._averages = [master.to(device, copy=True) for master in self._masters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """``average <- decay * average + (1 - decay) * masters``; no communication."""
        if self._averages:
            current: list[Tensor] = [master.to(self._averages[0].device) for master in self._masters]
            torch._foreach_lerp_(self._averages, current, 1 - decay)

    @torch.no_grad()
    def _exchange(self) -> None:
        for master, average in zip(self._masters, self._averages, strict=True):
            held = master.clone()
            master.copy_(average)
            average.copy_(held)

    def swap(self) -> None:
        """Put the average into the network, and what was there into the average; a collective call."""
        self._exchange()
        self.engine.sync_parameters()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the present weights."""
        for master, average in zip(self._masters, self._averages, strict=True):
            average.copy_(master)

    def weights(self, keep: bool) -> dict[str, Any]:
        """The module's whole ``state_dict()`` with averaged parameters, as `strategies.paro.checkpoint.weights` gives it."""
        self._exchange()
        try:
            return weights(self.engine, keep)
        finally:
            self._exchange()
