"""Images as the data of a flow."""

import math
from typing import Any

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.base.samples import Samples, TextSamples
from zoo.bfn.bins import bin_index
from zoo.bfn.codecs.codec import Codec

__all__ = ["ImageCodec"]


class ImageCodec(Codec):
    """Images (B, C, H, W) in [0, 1], quantised to K levels, channels last.

    Args:
        shape: (channels, height, width).
        dynamic_binarization: two levels, drawn anew at each look with the pixel's value as the probability of white, as
            usual for MNIST. Otherwise [0, 1] is divided into K intervals of equal width.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), dynamic_binarization: bool = False) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"ImageCodec: shape={tuple(shape)} must be (channels, height, width), each at least 1.")
        self.shape = tuple(shape)
        self.dynamic_binarization = dynamic_binarization
        channels, height, width = self.shape
        self.data_shape = (height, width, channels)

    def units(self) -> dict[str, float]:
        """Bits per dimension; for binarised images also nats per image, the custom there."""
        units = {"bits_per_dim": 1 / math.log(2)}
        return units | ({"nats_per_image": float(math.prod(self.shape))} if self.dynamic_binarization else {})

    def check(self, num_levels: int) -> None:
        """See `Codec`."""
        if self.dynamic_binarization and num_levels != 2:
            raise ValueError(
                f"ImageCodec: dynamic_binarization gives 2 levels, but head and flow are made for {num_levels}:"
                " use a DiscreteFlow with num_classes=2, or leave dynamic_binarization out."
            )

    def encode(self, batch: Any, num_levels: int, random: SampleRandom) -> Tensor:
        """Levels of ``(image (B, C, H, W) in [0, 1], label)``; see `Codec`."""
        images: Tensor = batch[0]
        self._check(images)
        if self.dynamic_binarization:
            threshold = random.uniform("binarization", self.data_shape).to(images.device)
            return (threshold < images.movedim(1, -1)).long()
        return self._quantize(images, num_levels)

    def known(self, batch: Any, num_levels: int) -> tuple[Tensor, Tensor] | None:
        """Levels of ``image`` (B, C, H, W) in [0, 1] where ``mask`` (B, 1, H, W) is true; see `Codec`."""
        if "image" not in batch:
            return None
        mask = batch.get("mask")
        shape = (len(batch["image"]), 1, *self.shape[1:])
        if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            given = "none" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(
                f'In-painting needs "mask" beside "image", bool {shape}, true where a pixel is known; it is {given}.'
            )
        images = batch["image"].where(mask, 0)  # what unknown pixels hold does not matter
        self._check(images)
        levels = self._quantize(images, num_levels)
        return levels, mask.movedim(1, -1).expand(levels.shape)

    def samples(self, levels: Tensor, nfe: int, trajectory: Tensor | None, num_levels: int) -> Samples:
        """Level 0 is black, level K - 1 is white; see `Codec`."""
        return Samples(
            self._images(levels, num_levels), nfe, None if trajectory is None else self._images(trajectory, num_levels)
        )

    def prediction(self, samples: Samples | TextSamples, batch: dict[str, Any]) -> dict[str, Any]:
        """``images`` (B, C, H, W), and ``trajectory`` (B, T, C, H, W) if it was recorded; see `Codec`."""
        assert isinstance(samples, Samples)
        images = samples.images
        if "image" in batch:
            images = torch.where(batch["mask"].to(images.device), batch["image"].to(images), images)
        return {"images": images} | ({} if samples.trajectory is None else {"trajectory": samples.trajectory})

    def _check(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"BFN was built for images of shape {self.shape}, but the data has {tuple(images.shape[1:])}:"
                " set model.codec.shape (and the network's size) to the data's."
            )
        if not bool(((images >= 0) & (images <= 1)).all()):  # also for NaN
            raise ValueError(
                f"BFN takes images in [0, 1], but the data reaches from {images.min().item():.4g} to {images.max().item():.4g}:"
                " scale them as torchvision's ToTensor does."
            )

    @staticmethod
    def _quantize(images: Tensor, num_levels: int) -> Tensor:
        x = images.movedim(1, -1)
        return bin_index(x.to(x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32) * 2 - 1, num_levels)

    @staticmethod
    def _images(levels: Tensor, num_levels: int) -> Tensor:
        dtype = levels.dtype if levels.is_floating_point() else torch.float32
        return levels.movedim(-1, -3).to(dtype).div(num_levels - 1).clamp_(0, 1)
