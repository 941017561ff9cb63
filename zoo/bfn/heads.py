"""Heads: what distribution over the data the network's output means."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zoo.bfn.bins import bin_log_prob, check_num_bins
from zoo.bfn.flow import ContinuousFlow, Flow, expand_time, noise_to_data
from zoo.hyperparameters import Configurable
from zoo.random import SampleRandom

__all__ = ["Delta", "DeltaHead", "Head", "OutputDistribution"]


class OutputDistribution(ABC):
    """Distribution over the data that a network predicts; all that losses and samplers ask of it."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Mean estimate (B, ...)."""

    @abstractmethod
    def mode(self) -> Tensor:
        """Most probable data, as an estimate (B, ...)."""

    @abstractmethod
    def sample(self, random: SampleRandom, name: str) -> Tensor:
        """Data drawn at random, as an estimate (B, ...).

        Args:
            random: the batch's random numbers.
            name: names this draw.
        """

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """ln probability (nats) of each element of the data; shape of ``x``."""

    @abstractmethod
    def message_kl(self, x: Tensor, alpha: Tensor, random: SampleRandom | None = None) -> Tensor:
        """KL divergence (nats per element, shape of ``x``) of the predicted message from the true one.

        Args:
            x: data (B, ...).
            alpha: accuracy of the message, per sample (B,).
            random: for heads that estimate it by drawing messages.
        """

    def unclipped_mean(self) -> Tensor:
        """Mean before it was confined to the data's range, where a head does so."""
        return self.mean()


class Head(Configurable, ABC):
    """Reads the network's output as a distribution."""

    #: Kind of flow that the head belongs to.
    flow_type: ClassVar[type[Flow]]
    #: Numbers that the network gives for each element of the data.
    num_outputs: int = 1
    #: Levels of the data that the head distinguishes.
    num_bins: int

    @abstractmethod
    def __call__(self, output: Tensor, state: Tensor, t: Tensor | float, flow: Flow) -> OutputDistribution:
        """Distribution over the data.

        Args:
            output: the network's (B, *data shape, num_outputs), in any float type.
            state: what it was computed from (B, *state shape); the result has its float type.
            t: time, one number or (B,).
            flow: that of the states.
        """


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

    def mean(self) -> Tensor:
        """The value."""
        return self.unclipped.clamp(-self.clip, self.clip)

    def mode(self) -> Tensor:
        """The value."""
        return self.mean()

    def sample(self, random: SampleRandom, name: str) -> Tensor:
        """The value."""
        return self.mean()

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
        if clip <= 0 or reconstruction_std <= 0:
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
