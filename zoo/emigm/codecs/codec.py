"""Base class of latent codecs, which turn images into the latents that the model sees and back.

Shape suffixes: B samples, C channels, H height, W width.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from zoo.base.hyperparameters import Configurable

__all__ = ["LatentCodec"]

N = TypeVar("N", bound=nn.Module)


class LatentCodec(Configurable, nn.Module, ABC):
    """Turns images (B, C, H, W) in [0, 1] into latents of about unit variance, and latents into images.

    A codec is not trained: the network that it may hold (`frozen`) is in evaluation mode for good, without gradients, and is
    kept out of the tree of modules. So it has no part in ``parameters()``, ``state_dict()``, ``train()`` or the averaging of
    weights, a checkpoint of the model neither holds nor misses it, and it follows the module to its device all the same.
    """

    #: (channels, height, width) of the images.
    image_shape: tuple[int, int, int]
    #: (channels, height, width) of one sample's latents.
    latent_shape: tuple[int, int, int]
    #: Pixels to a latent position along each axis.
    stride: int
    #: Factor that brings latents to unit variance.
    scale: float = 1.0
    #: What `moments` gives: mean and log-variance side by side, unscaled, or the latents themselves, scaled.
    cache_kind: ClassVar[Literal["moments", "latent"]] = "latent"

    def __init__(self) -> None:
        super().__init__()
        # In a tuple, nn.Module does not see it as a child.
        self._frozen: tuple[nn.Module, ...] = ()

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what `moments` gives of one sample."""
        channels, height, width = self.latent_shape
        return (2 * channels if self.cache_kind == "moments" else channels, height, width)

    def encode(self, image_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images.

        Args:
            image_BCHW: (B, *image_shape) in [0, 1].
            noise: standard normal (B, *latent_shape), for a codec whose posterior has a variance; None for its mean.

        Returns:
            (B, *latent_shape), scaled to about unit variance.

        Raises:
            ValueError: another shape, values outside [0, 1], or a codec without weights.
        """
        return self.from_moments(self.moments(image_BCHW), noise)

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images (B, *image_shape), clamped to [0, 1], of latents (B, *latent_shape).

        Raises:
            ValueError: another shape, or a codec without weights.
        """

    @abstractmethod
    def moments(self, image_BCHW: Tensor) -> Tensor:
        """Entries of images for a cache of latents: (B, *moments_shape); see `cache_kind`.

        Raises:
            ValueError: as for `encode`.
        """

    @abstractmethod
    def from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, *latent_shape), as `encode` gives them, from what a cache stores.

        Args:
            moments_BCHW: (B, *moments_shape), as `moments` gives it.
            noise: as for `encode`.

        Raises:
            ValueError: another shape.
        """

    def require_weights(self) -> None:
        """Refuse to work with weights that were never trained.

        Raises:
            ValueError: the codec was built without its file of weights; the message says what to give.
        """

    def fingerprint(self) -> str:
        """A digest of the frozen weights, so that latents of two codecs are not mixed; empty without weights."""
        if not self._frozen:
            return ""
        digest = hashlib.blake2b(digest_size=16)
        for network in self._frozen:
            for name, tensor in sorted(network.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
        return digest.hexdigest()

    def freeze(self, network: N) -> N:
        """Take up a network as frozen, see the class."""
        network.requires_grad_(False).eval()
        self._frozen = (*self._frozen, network)
        return network

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the frozen network along, with ``to``, ``cuda``, ``half`` and the like."""
        super()._apply(fn, recurse)
        for network in self._frozen:
            network._apply(fn, recurse)
        return self

    def _check_images(self, image_BCHW: Tensor) -> None:
        if image_BCHW.dim() != 4 or tuple(image_BCHW.shape[1:]) != self.image_shape:
            raise ValueError(
                f"{type(self).__name__} was built for images of shape (B, {_listed(self.image_shape)}), but got"
                f" {tuple(image_BCHW.shape)}: set the codec's size to the data's."
            )
        if not image_BCHW.is_floating_point() or not bool(((image_BCHW >= 0) & (image_BCHW <= 1)).all()):  # also for NaN
            raise ValueError(
                f"{type(self).__name__} takes floating-point images in [0, 1], but got {image_BCHW.dtype} from"
                f" {image_BCHW.min().item():.4g} to {image_BCHW.max().item():.4g}: scale them as torchvision's ToTensor does."
            )

    def _check_latents(self, latents_BCHW: Tensor, name: str = "latents") -> None:
        shape = self.moments_shape if name == "moments" else self.latent_shape
        if latents_BCHW.dim() != 4 or tuple(latents_BCHW.shape[1:]) != shape:
            raise ValueError(
                f"{type(self).__name__}: {name} must have the shape (B, {_listed(shape)}), got {tuple(latents_BCHW.shape)}."
            )

    def _check_noise(self, noise: Tensor | None, batch_size: int) -> None:
        if noise is not None and tuple(noise.shape) != (batch_size, *self.latent_shape):
            raise ValueError(
                f"{type(self).__name__}: noise must have the shape ({batch_size}, {_listed(self.latent_shape)}),"
                f" got {tuple(noise.shape)}."
            )


def check_scale(name: str, scale: float) -> float:
    """A scale factor, or an error.

    Raises:
        ValueError: it is not a positive, finite number.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name}: scale={scale} must be a positive number.")
    return scale


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
