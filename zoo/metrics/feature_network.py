"""Small image classifiers whose penultimate activations are the features of our feature distances.

Shape suffixes: B images, C channels, H height, W width, D features, K classes.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.base.hyperparameters import Configurable


class Features(NamedTuple):
    """Output of a feature network for a batch of images.

    Attributes:
        features: (B, D), the penultimate activations.
        logits: (B, K), the class scores.
    """

    features: Tensor
    logits: Tensor


class FeatureNetwork(Configurable, nn.Module, ABC):
    """Base of the classifiers: images in, penultimate features and logits out.

    Nothing in such a network may depend on the other images of a batch, so that a feature is a function of its image.

    Args:
        image_shape: (C, H, W) of the images.
        num_features: Number of penultimate features D.
        num_classes: Number of classes K.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_features: int, num_classes: int) -> None:
        super().__init__()
        for name, size in (*zip("CHW", image_shape, strict=True), ("features", num_features), ("classes", num_classes)):
            if size < 1:
                raise ValueError(f"{type(self).__name__}: number of {name} must be at least 1, got {size}.")
        self.image_shape = tuple(image_shape)
        self.num_features = num_features
        self.num_classes = num_classes
        self.classify = nn.Linear(num_features, num_classes)

    @abstractmethod
    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Penultimate features (B, D) of images in [0, 1]."""

    def forward(self, image_BCHW: Tensor) -> Features:
        """Features and logits of a batch.

        Args:
            image_BCHW: (B, C, H, W) in [0, 1], in the network's dtype.

        Raises:
            ValueError: If the images have another shape than the network was made for.
        """
        if tuple(image_BCHW.shape[1:]) != self.image_shape:
            raise ValueError(
                f"{type(self).__name__} was made for images of shape {self.image_shape}, got {tuple(image_BCHW.shape[1:])}."
            )
        features_BD = self.embed(image_BCHW)
        return Features(features_BD, self.classify(features_BD))


class FeatureMLP(FeatureNetwork):
    """Multilayer perceptron on the pixels, for small images such as the 8x8 digits.

    Args:
        image_shape: (C, H, W) of the images.
        widths: Widths of the hidden layers; the last one is the number of features.
        num_classes: Number of classes.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 8, 8), widths: Sequence[int] = (128, 32), num_classes: int = 10
    ) -> None:
        if not widths:
            raise ValueError("FeatureMLP: `widths` must name at least one hidden layer, got none.")
        super().__init__(image_shape, widths[-1], num_classes)
        sizes = [math.prod(image_shape), *widths]
        self.layers = nn.Sequential(nn.Flatten())
        for size_in, size_out in itertools.pairwise(sizes):
            self.layers.extend([nn.Linear(size_in, size_out), nn.ReLU()])

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Penultimate features (B, D) of images in [0, 1]."""
        return self.layers(image_BCHW)


class FeatureCNN(FeatureNetwork):
    """Convolutional network for 28x28 to 64x64 images: stride-2 convolutions with group normalisation, then one layer.

    The last feature map is flattened, not pooled, so that the features see where strokes and edges lie.

    Args:
        image_shape: (C, H, W) of the images.
        channels: Channels of the convolutions; every one after the first halves the image. Multiples of 8.
        num_features: Number of features.
        num_classes: Number of classes.

    Raises:
        ValueError: If a number of channels is no multiple of 8.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        channels: Sequence[int] = (24, 48, 64, 64),
        num_features: int = 64,
        num_classes: int = 10,
    ) -> None:
        if not channels or any(c < 1 or c % 8 for c in channels):
            raise ValueError(f"FeatureCNN: `channels` must be positive multiples of 8, got {list(channels)}.")
        super().__init__(image_shape, num_features, num_classes)
        channels_in, height, width = image_shape
        self.layers = nn.Sequential()
        for depth, channels_out in enumerate(channels):
            stride = 2 if depth else 1
            self.layers.extend(
                [
                    nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
                    nn.GroupNorm(channels_out // 8, channels_out),
                    nn.ReLU(),
                ]
            )
            channels_in, height, width = channels_out, math.ceil(height / stride), math.ceil(width / stride)
        self.layers.extend([nn.Flatten(), nn.Linear(channels_in * height * width, num_features), nn.ReLU()])

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Penultimate features (B, D) of images in [0, 1]."""
        return self.layers(image_BCHW)


def random_affine(
    image_BCHW: Tensor,
    uniform_B5: Tensor,
    *,
    rotation: float = 0.0,
    shift: float = 0.0,
    scale: float = 0.0,
    flip: bool = False,
) -> Tensor:
    """Turn, shift, scale and mirror every image by its own random numbers (bilinear, black outside).

    Args:
        image_BCHW: (B, C, H, W).
        uniform_B5: (B, 5) in [0, 1): what decides rotation, horizontal shift, vertical shift, scale and mirror.
        rotation: Largest angle, in degrees, either way.
        shift: Largest shift, as a fraction of the image's side, either way.
        scale: Largest relative change of size, either way.
        flip: Mirror left and right with probability 1/2.

    Returns:
        (B, C, H, W), the transformed images.

    Example:
        >>> image = torch.rand(2, 1, 8, 8)
        >>> torch.allclose(random_affine(image, torch.rand(2, 5)), image, atol=1e-6)
        True
    """
    signed_B5 = 2 * uniform_B5.to(image_BCHW) - 1
    angle_B = signed_B5[:, 0] * math.radians(rotation)
    size_B = 1 + scale * signed_B5[:, 3]
    mirror_B = torch.where(signed_B5[:, 4] < 0, -1.0, 1.0) if flip else torch.ones_like(angle_B)
    cos_B, sin_B = torch.cos(angle_B) / size_B, torch.sin(angle_B) / size_B
    # The grid maps output to input coordinates in [-1, 1], where one side of the image is 2 long.
    row_x_B3 = torch.stack([mirror_B * cos_B, -mirror_B * sin_B, 2 * shift * signed_B5[:, 1]], dim=1)
    row_y_B3 = torch.stack([sin_B, cos_B, 2 * shift * signed_B5[:, 2]], dim=1)
    grid_BHW2 = nn.functional.affine_grid(torch.stack([row_x_B3, row_y_B3], dim=1), list(image_BCHW.shape), align_corners=False)
    return nn.functional.grid_sample(image_BCHW, grid_BHW2, align_corners=False)
