"""PaRO: parameters, gradients and optimizer state, each whole, divided inside groups of ranks, or divided among all."""

from strategies.paro.checkpoint import consolidate
from strategies.paro.collectives import Collectives
from strategies.paro.engine import PaROEngine
from strategies.paro.grid import RankGrid, Work
from strategies.paro.ho_ring import FlatRing, HORing
from strategies.paro.partition import CODES, Granularity, Partition
from strategies.paro.precision import StatePrecision
from strategies.paro.strategy import PaROStrategy

__all__ = [
    "CODES",
    "Collectives",
    "FlatRing",
    "Granularity",
    "HORing",
    "PaROEngine",
    "PaROStrategy",
    "Partition",
    "RankGrid",
    "StatePrecision",
    "Work",
    "consolidate",
]
