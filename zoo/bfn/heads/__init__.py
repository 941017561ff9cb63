"""Heads: what distribution over the data the network's output means. One file a head."""

from zoo.bfn.heads.bernoulli import BernoulliHead
from zoo.bfn.heads.categorical import Categorical, CategoricalHead
from zoo.bfn.heads.delta import Delta, DeltaHead
from zoo.bfn.heads.discretized_normal import DiscretizedNormal, DiscretizedNormalHead
from zoo.bfn.heads.head import Head, OutputDistribution, Statistic

__all__ = [
    "BernoulliHead",
    "Categorical",
    "CategoricalHead",
    "Delta",
    "DeltaHead",
    "DiscretizedNormal",
    "DiscretizedNormalHead",
    "Head",
    "OutputDistribution",
    "Statistic",
]
