"""Heads: what distribution over the data the network's output means. One file a head."""

from zoo.bfn.heads.categorical import Categorical, CategoricalHead
from zoo.bfn.heads.delta import Delta, DeltaHead
from zoo.bfn.heads.head import Head, OutputDistribution

__all__ = ["Categorical", "CategoricalHead", "Delta", "DeltaHead", "Head", "OutputDistribution"]
