"""Networks: what predicts the data from the belief and the time. One file a network."""

from zoo.bfn.networks.network import Network
from zoo.bfn.networks.residual_mlp import ResidualMLP

__all__ = ["Network", "ResidualMLP"]
