"""Head of continuous data: one value for each element."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.bfn.bins import bin_log_prob, check_num_bins
from zoo.bfn.continuous_flow import ContinuousFlow, noise_to_data
from zoo.bfn.flow import Flow, expand_time
from zoo.bfn.heads.head import Head, OutputDistribution, Statistic

__all__ = ["Delta", "DeltaHead"]


@dataclass
class Delta(OutputDistribution):
    """All probability on one value.

    Args:
        unclipped: the value, before clipping (B, ...).
        clip: largest absolute value of the data.
        num_bins: levels of the data.
        std: standard deviation of the normal distribution around the value that scores quantised data.
    """

    unclipped: Tensor
    clip: float
    num_bins: int
    std: float

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the value."""
        return self.unclipped.dtype

    def mean(self) -> Tensor:
        """The value."""
        return self.unclipped.clamp(-self.clip, self.clip)

    def mode(self) -> Tensor:
        """The value."""
        return self.mean()

    def sample(self, random: SampleRandom, name: str) -> Tensor:
        """The value."""
        return self.mean()

    def take(self, statistic: Statistic, random: SampleRandom, name: str) -> Tensor:
        """The value, clipped in its own memory."""
        return self.unclipped.clamp_(-self.clip, self.clip)

    def log_prob(self, x: Tensor) -> Tensor:
        """ln probability of the data's bins under a normal distribution around the value; see `bin_log_prob`."""
        return bin_log_prob(x, self.mean(), self.std, self.num_bins)

    def message_kl(self, x: Tensor, alpha: Tensor, random: SampleRandom | None = None) -> Tensor:
        """alpha (x - value)^2 / 2, exactly."""
        return expand_time(alpha, x) * (x - self.mean()).square() / 2

    def unclipped_mean(self) -> Tensor:
        """The value before clipping."""
        return self.unclipped


class DeltaHead(Head):
    """Continuous data: the network estimates the noise in the state, which implies one value for each element.

    Source: arXiv 2308.07037, section 4.4; before t = 1e-6 the value is 0.

    Args:
        clip: the value is confined to [-clip, clip].
        num_bins: levels of the data, for scoring the reconstruction.
        reconstruction_std: standard deviation of the reconstruction, in units of the flow's final one. Published: 0.7
            with 16 levels and min_variance 1e-3, 1.0 with 256 levels and 1e-6.

    Raises:
        ValueError: an argument that is not positive, or fewer than 2 bins.
    """

    flow_type = ContinuousFlow

    def __init__(self, clip: float = 1.0, num_bins: int = 16, reconstruction_std: float = 0.7) -> None:
        check_num_bins(num_bins, "DeltaHead")
        if not (clip > 0 and reconstruction_std > 0):
            raise ValueError(f"DeltaHead: clip={clip} and reconstruction_std={reconstruction_std} must be positive.")
        self.clip = clip
        self.num_bins = num_bins
        self.reconstruction_std = reconstruction_std

    def __call__(self, output: Tensor, state: Tensor, t: Tensor | float, flow: Flow) -> Delta:
        """See `Head`."""
        assert isinstance(flow, ContinuousFlow)
        noise = output.reshape(state.shape)
        if noise.dtype != state.dtype:
            noise = noise.to(state.dtype)
        if isinstance(t, Tensor):
            value = noise_to_data(state, noise, *flow.noise_coefficients(expand_time(t, state)))
        else:
            value = noise_to_data(state, noise, *flow.noise_coefficients(t))
        return Delta(value, self.clip, self.num_bins, self.reconstruction_std * math.sqrt(flow.min_variance))
