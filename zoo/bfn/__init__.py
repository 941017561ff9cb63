"""Bayesian flow networks and their fast solvers."""

from zoo.bfn.codecs import Codec, ImageCodec, TextCodec
from zoo.bfn.continuous_flow import ContinuousFlow
from zoo.bfn.data_statistics_writer import DataStatisticsWriter
from zoo.bfn.denoiser import Denoiser, Guide, InPainting
from zoo.bfn.discrete_flow import DiscreteFlow
from zoo.bfn.flow import Flow
from zoo.bfn.heads import BernoulliHead, CategoricalHead, DeltaHead, DiscretizedNormalHead, Head, OutputDistribution
from zoo.bfn.module import BFN
from zoo.bfn.networks import BFNTransformer, ImprovedUNet, Network, ResidualMLP, TextConvNet, UNetVDM
from zoo.bfn.official_config import OfficialConfig, read_official_config
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
from zoo.bfn.state_dict_adapter import from_official, load_official, read_official_weights, to_official
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
    "BFNTransformer",
    "BernoulliHead",
    "BrownianNoise",
    "CategoricalHead",
    "Codec",
    "ContinuousFlow",
    "DataStatistics",
    "DataStatisticsWriter",
    "DeltaHead",
    "Denoiser",
    "DiscreteFlow",
    "DiscretizedNormalHead",
    "Flow",
    "Guide",
    "Head",
    "ImageCodec",
    "ImprovedUNet",
    "InPainting",
    "Network",
    "ODEEuler",
    "OfficialConfig",
    "OutputDistribution",
    "ResidualMLP",
    "SDEEuler",
    "Solver",
    "TextCodec",
    "TextConvNet",
    "UNetVDM",
    "find_solver",
    "from_official",
    "load_official",
    "read_official_config",
    "read_official_weights",
    "solver_names",
    "to_official",
]
