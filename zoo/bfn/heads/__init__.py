"""Heads: what distribution over the data the network's output means. One file a head."""

from zoo.bfn.heads.delta import Delta, DeltaHead
from zoo.bfn.heads.head import Head, OutputDistribution

__all__ = ["Delta", "DeltaHead", "Head", "OutputDistribution"]
