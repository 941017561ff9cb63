"""Bayesian flow networks and their fast solvers."""

from zoo.bfn.continuous_flow import ContinuousFlow
from zoo.bfn.denoiser import Denoiser, Guide, InPainting
from zoo.bfn.discrete_flow import DiscreteFlow
from zoo.bfn.flow import Flow
from zoo.bfn.heads import BernoulliHead, CategoricalHead, DeltaHead, DiscretizedNormalHead, Head, OutputDistribution
from zoo.bfn.module import BFN
from zoo.bfn.networks import Network, ResidualMLP
from zoo.bfn.solvers import (
    ODE1,
    ODE2M,
    ODE2S,
    ODE3M,
    SDE1,
    SDE2M,
    BFNSampler,
    BrownianNoise,
    ODEEuler,
    SDEEuler,
    Solver,
    find_solver,
    solver_names,
)
from zoo.bfn.statistics import DataStatistics

__all__ = [
    "BFN",
    "ODE1",
    "ODE2M",
    "ODE2S",
    "ODE3M",
    "SDE1",
    "SDE2M",
    "BFNSampler",
    "BernoulliHead",
    "BrownianNoise",
    "CategoricalHead",
    "ContinuousFlow",
    "DataStatistics",
    "DeltaHead",
    "Denoiser",
    "DiscreteFlow",
    "DiscretizedNormalHead",
    "Flow",
    "Guide",
    "Head",
    "InPainting",
    "Network",
    "ODEEuler",
    "OutputDistribution",
    "ResidualMLP",
    "SDEEuler",
    "Solver",
    "find_solver",
    "solver_names",
]
