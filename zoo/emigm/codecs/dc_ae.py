"""DC-AE: the deterministic autoencoder of stride 32, as the package diffusers has it.

Source: section 3.4 and appendix D of arXiv 2503.07197; arXiv 2410.10733 (deep compression autoencoder).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.emigm.codecs.codec import LatentCodec, check_scale

__all__ = ["DCAE"]


class DCAE(LatentCodec):
    """DC-AE f32c32: 32 channels at a thirty-second of the resolution, of an image scaled to [-1, 1]; no noise.

    A cache holds latents that are scaled already. Reading the weights needs the extra ``emigm`` (diffusers).

    Args:
        path: folder with the weights in the layout of diffusers (``config.json`` and safetensors), or their name on the
            hub, such as ``mit-han-lab/dc-ae-f32c32-in-1.0-diffusers``. Without it there is no network, and `encode` and
            `decode` refuse to work: enough to train on cached latents. On the meta device nothing is read.
        image_size: side of the images, a multiple of 32.
        scale: brings latents to unit variance.

    Raises:
        ImportError: a path is given, but the extra ``emigm`` is not installed.
        ValueError: an argument out of range, or weights that are missing or another autoencoder's.
    """

    stride: Literal[32] = 32

    def __init__(self, path: str | None = None, image_size: int = 512, scale: float = 0.3189) -> None:
        super().__init__()
        if image_size < self.stride or image_size % self.stride:
            raise ValueError(f"DCAE: image_size={image_size} must be a multiple of {self.stride}.")
        self.scale = check_scale("DCAE", scale)
        self.path = path
        self.image_shape = (3, image_size, image_size)
        self.latent_shape = (32, image_size // self.stride, image_size // self.stride)
        if path is not None and torch.empty(0).device.type != "meta":
            self.freeze(_read_autoencoder(path, self.latent_shape[0], self.stride))

    def require_weights(self) -> None:
        """See `LatentCodec`."""
        if not self._frozen:
            raise ValueError(
                "DCAE has no weights: set path to a folder in the layout of diffusers, or to a name on the hub such as"
                " mit-han-lab/dc-ae-f32c32-in-1.0-diffusers."
            )

    def moments(self, image_BCHW: Tensor) -> Tensor:
        """The latents, scaled; see `LatentCodec`."""
        self.require_weights()
        self._check_images(image_BCHW)
        autoencoder: Any = self._frozen[0]
        return autoencoder.encode((image_BCHW * 2 - 1).to(autoencoder.dtype)).latent.float() * self.scale

    def from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Themselves, whatever the noise: the posterior has no variance; see `LatentCodec`."""
        self._check_latents(moments_BCHW)
        self._check_noise(noise, len(moments_BCHW))
        return moments_BCHW.float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """See `LatentCodec`."""
        self.require_weights()
        self._check_latents(latents_BCHW)
        autoencoder: Any = self._frozen[0]
        image_BCHW = autoencoder.decode((latents_BCHW / self.scale).to(autoencoder.dtype)).sample
        return (image_BCHW.float() / 2 + 0.5).clamp(0, 1)


def _read_autoencoder(path: str, latent_channels: int, stride: int) -> Any:
    try:
        from diffusers import AutoencoderDC  # of the extra
    except ImportError as error:
        raise ImportError(
            "DCAE reads its weights with the package diffusers, which is not installed: pip install 'lightning-zoo[emigm]'."
        ) from error
    try:
        autoencoder = AutoencoderDC.from_pretrained(path, use_safetensors=True)
    except OSError as error:
        raise ValueError(
            f"DCAE: path={path!r} holds no autoencoder in the layout of diffusers (config.json and safetensors): {error}"
        ) from error
    found = (autoencoder.config.latent_channels, autoencoder.spatial_compression_ratio)
    if found != (latent_channels, stride):
        raise ValueError(
            f"DCAE: {path!r} is an autoencoder of {found[0]} channels and stride {found[1]}, not of {latent_channels} and"
            f" {stride}: give dc-ae-f32c32."
        )
    return autoencoder
