"""Click-through rates: xDeepFM."""

from zoo.ctr.click_network import ClickNetwork
from zoo.ctr.compressed_interaction import CompressedInteraction
from zoo.ctr.deep_layers import DeepLayers
from zoo.ctr.field_embedding import FieldEmbedding
from zoo.ctr.module import ClickModule as ClickModule
from zoo.ctr.module import XDeepFM
from zoo.ctr.xdeepfm import XDeepFMNetwork

__all__ = [
    "ClickNetwork",
    "CompressedInteraction",
    "DeepLayers",
    "FieldEmbedding",
    "XDeepFM",
    "XDeepFMNetwork",
]
