"""Lightning strategies: where things run, never what they compute."""

import importlib
from typing import TYPE_CHECKING, Any

from strategies.forking import leave_inherited_garbage

if TYPE_CHECKING:
    from strategies.antdt.ps.strategy import ParameterServerStrategy
    from strategies.antdt.strategy import AntDTStrategy
    from strategies.edit import EDiTShardedStrategy, EDiTStrategy
    from strategies.expert import ExpertParallelStrategy
    from strategies.hybrid import HybridStrategy
    from strategies.paro import PaROStrategy
    from strategies.placement import FlatteningStrategy, InterleavingStrategy, PlacementStrategy, SeparationStrategy

__all__ = [
    "AntDTStrategy",
    "EDiTShardedStrategy",
    "EDiTStrategy",
    "ExpertParallelStrategy",
    "FlatteningStrategy",
    "HybridStrategy",
    "InterleavingStrategy",
    "PaROStrategy",
    "ParameterServerStrategy",
    "PlacementStrategy",
    "SeparationStrategy",
]

_HOME = {
    "AntDTStrategy": "antdt.strategy",
    "EDiTShardedStrategy": "edit",
    "EDiTStrategy": "edit",
    "ExpertParallelStrategy": "expert",
    "FlatteningStrategy": "placement",
    "HybridStrategy": "hybrid",
    "InterleavingStrategy": "placement",
    "PaROStrategy": "paro",
    "ParameterServerStrategy": "antdt.ps.strategy",
    "PlacementStrategy": "placement",
    "SeparationStrategy": "placement",
}

leave_inherited_garbage()


def __getattr__(name: str) -> Any:
    """Import lazily: the data-sharding server, which is in this package, starts without torch and Lightning."""
    if name not in _HOME:
        raise AttributeError(f"module 'strategies' has no attribute {name!r}")
    return getattr(importlib.import_module(f"strategies.{_HOME[name]}"), name)
