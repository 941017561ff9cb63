"""Labelled images that are mirrored left to right in half of the epochs, whole batches at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base.loader import epoch_generator

__all__ = ["MirroredImages"]


class MirroredImages(Dataset[tuple[Tensor, Tensor]], ABC):
    """The base of labelled images: which of them are mirrored is a pure function of (``flip_seed``, epoch, index).

    Args:
        flip_seed: If given, each image is mirrored in half of the epochs.
    """

    def __init__(self, flip_seed: int | None) -> None:
        self.flip_seed = flip_seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw which images are mirrored in this epoch."""
        if self.flip_seed is not None:
            self.flipped = torch.rand(len(self), generator=epoch_generator(self.flip_seed, epoch, "flip")) < 0.5

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([index])
        return images[0], labels[0]

    @abstractmethod
    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: images float (B, C, H, W) in [0, 1] and labels (B,)."""

    def mirrored(self, images: Tensor, indices: list[int]) -> Tensor:
        """The images (B, C, H, W) of these indices, those mirrored whose turn it is."""
        if self.flip_seed is None:
            return images
        return torch.where(self.flipped[indices, None, None, None], images.flip(-1), images)
