"""Latent codecs: how images become the latents that the model sees, and latents become images. One file a codec."""

from zoo.emigm.codecs.codec import LatentCodec
from zoo.emigm.codecs.dc_ae import DCAE
from zoo.emigm.codecs.kl_vae import KLVAE
from zoo.emigm.codecs.pixel import PixelCodec

__all__ = ["DCAE", "KLVAE", "LatentCodec", "PixelCodec"]
