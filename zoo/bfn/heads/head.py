"""Base class of heads, which read the network's output, and of distributions, which losses and samplers use."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zoo.base.hyperparameters import Configurable
from zoo.base.random import SampleRandom
from zoo.bfn.flow import Flow

__all__ = ["Head", "OutputDistribution", "Statistic"]

#: What a sampler takes of a predicted distribution.
Statistic = Literal["mean", "mode", "sample"]


class OutputDistribution(ABC):
    """Distribution over the data that a network predicts; all that losses and samplers ask of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the estimates."""
        return self.mean().dtype

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

    def take(self, statistic: Statistic, random: SampleRandom, name: str) -> Tensor:
        """Estimate (B, ...) for a sampler; it may reuse the memory of the distribution, which is then spent.

        Args:
            statistic: mean, mode, or a draw.
            random: the batch's random numbers, for a draw.
            name: names the draw.
        """
        if statistic == "sample":
            return self.sample(random, name)
        return self.mean() if statistic == "mean" else self.mode()

    def unclipped_mean(self) -> Tensor:
        """Mean before it was confined to the data's range, where a head does so."""
        return self.mean()


class Head(Configurable, ABC):
    """Reads the network's output as a distribution."""

    #: Kind of flow that the head belongs to.
    flow_type: ClassVar[type[Flow]]
    #: Numbers that the network gives for each element of the data; where the flow decides it, see `num_outputs_for`.
    num_outputs: int = 1
    #: Levels of quantised data. Heads of classes have none of their own, see `num_levels`.
    num_bins: int

    def check(self, flow: Flow) -> None:
        """Refuse a flow that does not belong to the head.

        Raises:
            ValueError: saying in one sentence what does not fit.
        """
        if not isinstance(flow, self.flow_type):
            raise ValueError(
                f"{type(self).__name__} belongs to a {self.flow_type.__name__}, not to a {type(flow).__name__}:"
                " choose head and flow of the same kind of data."
            )

    def num_outputs_for(self, flow: Flow) -> int:
        """Numbers that the network gives for each element of the flow's data."""
        return self.num_outputs

    def num_levels(self, flow: Flow) -> int:
        """Levels that the flow's data have: bins or classes."""
        return self.num_bins

    def check_output(self, output: Tensor, state: Tensor, flow: Flow) -> None:
        """Refuse the output of a network that was built for another head, or that moved the data's axes.

        Args:
            output: the network's.
            state: what it was computed from.
            flow: that of the states.

        Raises:
            ValueError: the output is not (B, *data shape, `num_outputs_for`).
        """
        expected = self.num_outputs_for(flow)
        if output.shape[-1] != expected:
            raise ValueError(
                f"The network gives {output.shape[-1]} numbers per element, but {type(self).__name__} reads {expected}:"
                f" set the network's num_outputs to {expected}."
            )
        data_shape = state.shape[:-1] if flow.state_shape(()) else state.shape
        if output.shape[:-1] != data_shape:
            raise ValueError(
                f"The network's output is {tuple(output.shape)}, but must be {(*data_shape, expected)}: the data's shape, for"
                " images channels last, and the numbers per element."
            )

    @abstractmethod
    def __call__(self, output: Tensor, state: Tensor, t: Tensor | float, flow: Flow) -> OutputDistribution:
        """Distribution over the data.

        Args:
            output: the network's (B, *data shape, num_outputs), in any float type.
            state: what it was computed from (B, *state shape); the result has its float type.
            t: time, one number or (B,).
            flow: that of the states.
        """
