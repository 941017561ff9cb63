"""Data with finitely many levels: K bins of equal width that cover [-1, 1].

Bin k covers [-1 + 2k/K, -1 + 2(k+1)/K] and stands for its centre c_k = -1 + (2k+1)/K. A normal variable falls into bin k
with some probability; what lies outside [-1, 1] belongs to the end bins (``clip``), or the probabilities are divided by
that of [-1, 1].

Source: Graves et al., arXiv 2308.07037, section 5.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "bin_centre",
    "bin_index",
    "bin_log_prob",
    "bin_log_probs",
    "bin_mean",
    "bin_mode",
    "check_num_bins",
    "in_chunks",
    "normal_log_mass",
    "truncated_normal",
]

#: Stands for infinity where an edge of an end bin lies there; its square is finite and has no gradient of inf - inf.
_FAR = 1e9
#: A normal variable that falls into [-1, 1] with less probability than this says nothing about the bins.
_MIN_INSIDE = 1e-5
#: Numbers that a table of all bins may hold at a time.
_MAX_TABLE = 2**22


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


def bin_log_prob(
    x: Tensor, mean: Tensor, std: Tensor | float, num_bins: int, *, clip: bool = True, min_prob: float = 1e-5
) -> Tensor:
    """ln of the probability (nats) that a normal variable falls into the bin of ``x``.

    Below ``min_prob`` the probability is taken as density at the centre times the bin's width.

    Args:
        x: values in [-1, 1].
        mean: of the normal variable, broadcastable to ``x``.
        std: its standard deviation, > 0.
        num_bins: K.
        clip: what lies outside [-1, 1] belongs to the end bins.
        min_prob: least probability that is taken from the distribution function.
    """
    index = bin_index(x, num_bins)
    centre = bin_centre(index, num_bins, x.dtype)
    lower, upper = centre - 1 / num_bins, centre + 1 / num_bins
    if clip:
        lower, upper = lower.masked_fill(index == 0, -_FAR), upper.masked_fill(index == num_bins - 1, _FAR)
    log_prob = normal_log_mass((lower - mean) / std, (upper - mean) / std)
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    log_density = -((centre - mean) / std).square() / 2 - log_std - math.log(2 * math.pi) / 2
    log_density = log_density + math.log(2 / num_bins)
    if clip:
        return torch.where(log_prob >= math.log(min_prob), log_prob, log_density)
    inside = _log_inside(mean, std)
    log_prob, log_density = log_prob - inside, log_density - inside
    log_prob = torch.where(log_prob >= math.log(min_prob), log_prob, log_density)
    return torch.where(inside >= math.log(_MIN_INSIDE), log_prob, -math.log(num_bins))


def bin_log_probs(mean: Tensor, std: Tensor, num_bins: int, *, clip: bool = True) -> Tensor:
    """ln of the probability (nats) that a normal variable falls into each bin, exact however small it is.

    Without ``clip``, all bins are equally probable where almost nothing lies in [-1, 1].

    Args:
        mean: of the normal variable (...).
        std: its standard deviation, > 0, of the same shape.
        num_bins: K.
        clip: what lies outside [-1, 1] belongs to the end bins.

    Returns:
        Table (..., K).
    """
    edges = torch.arange(num_bins + 1, device=mean.device).to(mean.dtype) * 2 / num_bins - 1
    if clip:
        edges[0], edges[-1] = -_FAR, _FAR
    z = (edges - mean[..., None]) / std[..., None]
    log_probs = normal_log_mass(z[..., :-1], z[..., 1:])
    if clip:
        return log_probs
    inside = _log_inside(mean, std)[..., None]
    return torch.where(inside >= math.log(_MIN_INSIDE), log_probs - inside, -math.log(num_bins))


def bin_mean(mean: Tensor, std: Tensor, num_bins: int, *, clip: bool = True) -> Tensor:
    """Mean of the bins' centres, each with the probability that a normal variable falls into it; shape of ``mean``.

    With ``clip`` the sum over bins is one over their inner edges e, by partial summation: sum_k p_k c_k =
    sum_e erf((mean - e) / (sqrt(2) std)) / K. No probability has to be computed.
    """

    def from_edges(mean: Tensor, std: Tensor) -> Tensor:
        edges = torch.arange(1, num_bins, device=mean.device).to(mean.dtype) * 2 / num_bins - 1
        inverse = math.sqrt(0.5) / std
        z = torch.addcmul(mean * inverse, inverse, edges[:, None], value=-1)
        return (z.erf() if z.requires_grad else z.erf_()).sum(0) / num_bins

    def from_probabilities(mean: Tensor, std: Tensor) -> Tensor:
        centres = bin_centre(torch.arange(num_bins, device=mean.device), num_bins, mean.dtype)
        return (bin_log_probs(mean, std, num_bins, clip=False).exp() * centres).sum(-1)  # a product `@` autocast would round

    function = from_edges if clip else from_probabilities
    return in_chunks(function, num_bins, mean.flatten(), std.flatten()).view_as(mean)


def bin_mode(mean: Tensor, std: Tensor, num_bins: int, *, clip: bool = True) -> Tensor:
    """Bin that a normal variable falls into with the greatest probability; int64 of the shape of ``mean``.

    Of bins of equal width that is the one closest to the mean; with ``clip`` an end bin may gain more from its tail.
    """
    index = bin_index(mean, num_bins)
    if not clip:
        return index
    to_centre = bin_centre(index, num_bins, mean.dtype) - mean
    closest = torch.special.ndtr((to_centre + 1 / num_bins) / std) - torch.special.ndtr((to_centre - 1 / num_bins) / std)
    first = torch.special.ndtr((2 / num_bins - 1 - mean) / std)
    last = torch.special.ndtr((2 / num_bins - 1 + mean) / std)
    end = (last > first) * (num_bins - 1)
    return torch.where(torch.maximum(first, last) >= closest, end, index)


def truncated_normal(mean: Tensor, std: Tensor, uniform: Tensor) -> Tensor:
    """Draws of a normal variable that is known to lie in [-1, 1], by its inverse distribution function.

    Where almost nothing lies there, the draws are uniform, as the probabilities of `bin_log_probs`.

    Args:
        mean: of the normal variable (...).
        std: its standard deviation, > 0, of the same shape.
        uniform: draws from [0, 1), of the same shape.
    """
    # Mirrored to means above 0, where the distribution function in [-1, 1] is small and so resolved well.
    lower, upper = (torch.special.ndtr((end - mean.abs()) / std) for end in (-1, 1))
    quantile = (lower + uniform * (upper - lower)).clamp(torch.finfo(mean.dtype).tiny, 1 - torch.finfo(mean.dtype).eps)
    drawn = (mean.abs() + std * torch.special.ndtri(quantile)).clamp(-1, 1)
    drawn = torch.where(mean < 0, -drawn, drawn)
    return torch.where(upper - lower >= _MIN_INSIDE, drawn, 2 * uniform - 1)


def normal_log_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """ln of the probability that a standard normal variable lies in [lower, upper], accurate far out on either side.

    Value and gradient are finite wherever the arguments are.
    """
    # By symmetry to the side where the middle of the interval is positive.
    flip = lower + upper < 0
    near, far = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    tiny = torch.finfo(near.dtype).tiny
    around_zero = ((far * math.sqrt(0.5)).erf() - (near * math.sqrt(0.5)).erf()).clamp(min=tiny)
    # Beside zero: Q(near) - Q(far) with Q(z) = exp(-z^2 / 2) erfcx(z / sqrt(2)) / 2, the first exponential taken out.
    start = near.clamp(min=0)
    decay = torch.exp((start - far) * (start + far) / 2)
    beside_zero = torch.special.erfcx(start * math.sqrt(0.5)) - decay * torch.special.erfcx(far * math.sqrt(0.5))
    log_beside = beside_zero.clamp(min=tiny).log() - start.square() / 2
    return torch.where(near > 0, log_beside, around_zero.log()) - math.log(2)


def in_chunks(function: Callable[..., Tensor], row_size: int, *tensors: Tensor) -> Tensor:
    """Apply a function to some rows at a time, so that its tables of all bins stay small.

    The backward pass computes them again, one chunk at a time.

    Args:
        function: maps rows of each tensor to rows of the result.
        row_size: numbers in one row of the function's table.
        tensors: with the same number of rows.
    """
    rows = max(1, _MAX_TABLE // row_size)
    if len(tensors[0]) <= rows:
        return function(*tensors)
    chunks = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


def _log_inside(mean: Tensor, std: Tensor | float) -> Tensor:
    """ln of the probability that a normal variable falls into [-1, 1]."""
    return normal_log_mass((-1 - mean) / std, (1 - mean) / std)
