"""Networks: what predicts the data from the belief and the time. One file a network."""

from zoo.bfn.networks.adapters import FourierImageInputAdapter, OutputAdapter, TextInputAdapter
from zoo.bfn.networks.improved_unet import ImprovedUNet
from zoo.bfn.networks.network import Network
from zoo.bfn.networks.residual_mlp import ResidualMLP
from zoo.bfn.networks.text_convnet import TextConvNet
from zoo.bfn.networks.transformer import BFNTransformer
from zoo.bfn.networks.unet_vdm import UNetVDM

__all__ = [
    "BFNTransformer",
    "FourierImageInputAdapter",
    "ImprovedUNet",
    "Network",
    "OutputAdapter",
    "ResidualMLP",
    "TextConvNet",
    "TextInputAdapter",
    "UNetVDM",
]
