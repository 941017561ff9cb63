"""Data with finitely many levels: K bins of equal width that cover [-1, 1].

Bin k covers [-1 + 2k/K, -1 + 2(k+1)/K] and stands for its centre c_k = -1 + (2k+1)/K.
Source: Graves et al., arXiv 2308.07037, section 5.
"""

import math

import torch
from torch import Tensor

__all__ = ["bin_centre", "bin_index", "bin_log_prob", "check_num_bins"]


def check_num_bins(num_bins: int, owner: str) -> None:
    """Refuse a number of bins below 2.

    Raises:
        ValueError: naming ``owner``, whose argument it is.
    """
    if num_bins < 2:
        raise ValueError(f"{owner}: num_bins={num_bins} must be at least 2; grey digits have 16, 8-bit images 256.")


def bin_index(x: Tensor, num_bins: int) -> Tensor:
    """Bin that each value of [-1, 1] falls into; values outside fall into the end bins. int64 of the same shape."""
    return ((x / 2 + 0.5) * num_bins).floor().clamp_(0, num_bins - 1).long()


def bin_centre(index: Tensor, num_bins: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centre of each bin, in (-1, 1)."""
    return ((2 * index + 1).to(dtype) / num_bins).sub_(1)


def bin_log_prob(x: Tensor, mean: Tensor, std: Tensor | float, num_bins: int) -> Tensor:
    """ln of the probability (nats) that a normal variable falls into the bin of ``x``; tails belong to the end bins.

    Below 1e-5 the probability is taken as density at the centre times the bin's width, so that the result stays finite.

    Args:
        x: values in [-1, 1].
        mean: of the normal variable, broadcastable to ``x``.
        std: its standard deviation, > 0.
        num_bins: K.
    """
    index = bin_index(x, num_bins)
    centre = bin_centre(index, num_bins, x.dtype)
    upper = torch.where(index == num_bins - 1, 1.0, torch.special.ndtr((centre + 1 / num_bins - mean) / std))
    lower = torch.where(index == 0, 0.0, torch.special.ndtr((centre - 1 / num_bins - mean) / std))
    prob = upper - lower
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    log_density = -((centre - mean) / std).square() / 2 - log_std - math.log(2 * math.pi) / 2
    return torch.where(prob >= 1e-5, prob.clamp(min=1e-10).log(), log_density + math.log(2 / num_bins))
