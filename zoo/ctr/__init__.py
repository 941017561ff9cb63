"""Click-through rates: xDeepFM, DCN-v2, DLRM and MeLU's network, and the parts of their networks."""

from zoo.ctr.click_network import ClickNetwork
from zoo.ctr.compressed_interaction import CompressedInteraction
from zoo.ctr.cross_layers import CrossLayers
from zoo.ctr.dcn import DCNNetwork
from zoo.ctr.deep_layers import DeepLayers
from zoo.ctr.dlrm import DLRMNetwork
from zoo.ctr.field_embedding import FieldEmbedding
from zoo.ctr.melu import MeLUNetwork
from zoo.ctr.module import DCN, DLRM, XDeepFM
from zoo.ctr.module import ClickModule as ClickModule
from zoo.ctr.xdeepfm import XDeepFMNetwork

__all__ = [
    "DCN",
    "DLRM",
    "ClickNetwork",
    "CompressedInteraction",
    "CrossLayers",
    "DCNNetwork",
    "DLRMNetwork",
    "DeepLayers",
    "FieldEmbedding",
    "MeLUNetwork",
    "XDeepFM",
    "XDeepFMNetwork",
]
