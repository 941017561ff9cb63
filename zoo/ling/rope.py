"""Rotary positions, with linear, dynamic and YaRN scaling. Angles are always float32.

Shape suffixes: B batch, T positions, H heads, W width of a head.
"""

import math

import torch
from torch import Tensor, nn

from zoo.ling.config import RopeScaling

__all__ = ["RotaryEmbedding", "rotate", "yarn_frequencies", "yarn_scale"]


def yarn_scale(factor: float, mscale: float) -> float:
    """``0.1 mscale ln factor + 1`` for a factor above 1, else 1; with 4 and 1 it is 1.13863."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_frequencies(inv_freq: Tensor, width: int, theta: float, scaling: RopeScaling, trained: int) -> Tensor:
    """Frequencies of YaRN: those that turn slowly over the trained length are divided by ``factor``, a ramp in between.

    Args:
        inv_freq: (W/2,) frequencies of plain rotary positions.
        width: W.
        theta: base.
        scaling: factor and the ramp's ends.
        trained: length that was trained.
    """

    def place(rotations: float) -> float:
        return width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = float(max(math.floor(place(scaling.beta_fast)), 0))
    high = float(min(math.ceil(place(scaling.beta_slow)), width - 1))
    if low == high:
        high += 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32, device=inv_freq.device) - low) / (high - low)).clamp(0, 1)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions, to be shared by all layers.

    Args:
        width: width W of a head.
        theta: base.
        max_length: length that was trained; longer sequences get what they need.
        scaling: None for plain positions.
    """

    def __init__(self, width: int, theta: float, max_length: int, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.width = width
        self.theta = theta
        self.max_length = max_length
        self.scaling = scaling
        self.scale = 1.0
        if scaling is not None and scaling.type == "yarn":
            self.scale = yarn_scale(scaling.factor, scaling.mscale) / yarn_scale(scaling.factor, scaling.mscale_all_dim)

    def frequencies(self, length: int, device: torch.device | None = None) -> Tensor:
        """Angles per position, (W/2,) float32.

        Args:
            length: the sequence's length, which ``dynamic`` scaling depends on.
            device: Device of the result.
        """
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=device) / self.width
        scaling = self.scaling
        if scaling is None:
            return self.theta**-exponent
        if scaling.type == "linear":
            return self.theta**-exponent / scaling.factor
        if scaling.type == "dynamic":
            theta = self.theta
            if length > self.max_length:
                stretch = scaling.factor * length / self.max_length - (scaling.factor - 1)
                theta = theta * stretch ** (self.width / (self.width - 2))
            return theta**-exponent
        trained = scaling.original_max_position_embeddings or self.max_length
        return yarn_frequencies(self.theta**-exponent, self.width, self.theta, scaling, trained)

    def forward(self, position_BT: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, W), in ``dtype``.

        Args:
            position_BT: positions, integers.
            length: the sequence's length with what is cached, for ``dynamic`` scaling.
            dtype: of the result; angles are float32 (float64 where ``dtype`` is).
        """
        accurate = torch.promote_types(dtype, torch.float32)
        with torch.autocast(position_BT.device.type, enabled=False):
            frequency_F = self.frequencies(length, position_BT.device).to(accurate)
            angle_BTF = position_BT[..., None].to(accurate) * frequency_F
            angle_BTW = torch.cat([angle_BTF, angle_BTF], dim=-1)
            return (angle_BTW.cos() * self.scale).to(dtype), (angle_BTW.sin() * self.scale).to(dtype)


def rotate(x_BHTW: Tensor, cos_BTW: Tensor, sin_BTW: Tensor) -> Tensor:
    """Rotate the halves of each head against one another: ``x cos + (-b, a) sin`` for ``x = (a, b)``."""
    a, b = x_BHTW.chunk(2, dim=-1)
    return x_BHTW * cos_BTW[:, None] + torch.cat([-b, a], dim=-1) * sin_BTW[:, None]
