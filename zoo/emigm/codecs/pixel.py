"""Pixels as latents: images normalised by the mean and standard deviation of the data."""

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from zoo.emigm.codecs.codec import LatentCodec

__all__ = ["PixelCodec"]


class PixelCodec(LatentCodec):
    """Latents are the pixels themselves, ``(image - mean) / std``; nothing is lost.

    Args:
        image_shape: (channels, height, width) of the images.
        mean: mean of the training pixels, one for all channels or one for each; of padded images, the padding counts.
        std: their standard deviation, likewise.
        pad_to: side of the square to which images are padded with black (0) on all sides alike before they are normalised,
            such as 32 for 28 x 28 images that shall be divided into patches; None for none. `decode` cuts it off again.
        num_levels: grey levels of the data, such as 256, to which `decode` rounds; None leaves the pixels as they come.

    Raises:
        ValueError: a size below 1, a deviation that is not positive, as many values as there are channels are not given, or
            a padded side below the image's.
    """

    stride: Literal[1] = 1

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        pad_to: int | None = None,
        num_levels: int | None = None,
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"PixelCodec: image_shape={tuple(image_shape)} must be (channels, height, width), each at least 1.")
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        if pad_to is not None and pad_to < max(height, width):
            raise ValueError(f"PixelCodec: pad_to={pad_to} must be at least the image's side, {max(height, width)}, or null.")
        if num_levels is not None and num_levels < 2:
            raise ValueError(f"PixelCodec: num_levels={num_levels} must be at least 2, or null for no rounding.")
        for name, value in (("mean", mean), ("std", std)):
            values = [value] if isinstance(value, int | float) else list(value)
            if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
                raise ValueError(f"PixelCodec: {name}={value} must be one finite number, or one for each of {channels} channels.")
            if name == "std" and min(values) <= 0:
                raise ValueError(f"PixelCodec: std={value} must be positive.")
        # No buffers: a module in half precision would round them.
        self.mean = [float(mean)] if isinstance(mean, int | float) else list(mean)
        self.std = [float(std)] if isinstance(std, int | float) else list(std)
        self.num_levels = num_levels
        self.pad_to = pad_to
        above, left = ((0 if pad_to is None else (pad_to - side) // 2) for side in (height, width))
        self.latent_shape = self.image_shape if pad_to is None else (channels, pad_to, pad_to)
        self._corner = (above, left)

    def moments(self, image_BCHW: Tensor) -> Tensor:
        """The latents; see `LatentCodec`."""
        self._check_images(image_BCHW)
        (above, left), (_, height, width) = self._corner, self.latent_shape
        below, right = height - self.image_shape[1] - above, width - self.image_shape[2] - left
        return (pad(image_BCHW, (left, right, above, below)) - _of_channels(self.mean, image_BCHW)) / _of_channels(
            self.std, image_BCHW
        )

    def from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Themselves, whatever the noise: the posterior has no variance; see `LatentCodec`."""
        self._check_latents(moments_BCHW)
        self._check_noise(noise, len(moments_BCHW))
        return moments_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Without the padding, clamped to [0, 1], rounded to `num_levels`; see `LatentCodec`."""
        self._check_latents(latents_BCHW)
        (above, left), (_, height, width) = self._corner, self.image_shape
        latents_BCHW = latents_BCHW[..., above : above + height, left : left + width]
        image_BCHW = latents_BCHW * _of_channels(self.std, latents_BCHW) + _of_channels(self.mean, latents_BCHW)
        image_BCHW = image_BCHW.clamp(0, 1)
        return image_BCHW if self.num_levels is None else (image_BCHW * (self.num_levels - 1)).round() / (self.num_levels - 1)


def _of_channels(values: list[float], x_BCHW: Tensor) -> Tensor:
    """One value for each channel, or for all, as x has them."""
    return x_BCHW.new_tensor(values).view(-1, 1, 1)
