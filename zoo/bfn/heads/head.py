"""What every head is: how it reads the network's output, and what losses and samplers ask of the distribution."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from zoo.bfn.flow import Flow
from zoo.hyperparameters import Configurable
from zoo.random import SampleRandom

__all__ = ["Head", "OutputDistribution"]


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
