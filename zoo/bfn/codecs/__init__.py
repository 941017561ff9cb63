"""Codecs: how batches of images or text become the data of a flow, and samples become images or text. One file a codec."""

from zoo.bfn.codecs.codec import Codec
from zoo.bfn.codecs.image_codec import ImageCodec
from zoo.bfn.codecs.text_codec import TextCodec

__all__ = ["Codec", "ImageCodec", "TextCodec"]
