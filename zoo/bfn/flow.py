"""Bayesian flows: how the belief about the data sharpens from nothing (t = 0) to certainty (t = 1).

Every flow is, up to a factor that depends on time alone, the same process. With the data embedded as ``e(x)``,

    state(t) = scale(t) * (beta(t) * e(x) + sqrt(c * beta(t)) * z),   z ~ N(0, 1),

where ``beta`` is the accuracy received so far and ``c`` the variance of a message of accuracy 1. Continuous data: the
state is the mean of the belief, e(x) = x, c = 1, scale = 1 / (1 + beta). Samplers and losses need nothing else.

Three kinds of tensors appear: *data* x as the user has it, *estimates* of it (the network's prediction; for continuous
data of the same form), and *states*. Time t is a number, or one number per sample, (B,).

Source: Graves et al., "Bayesian Flow Networks", arXiv 2308.07037, section 4; seen as a linear SDE: Xue et al.,
"Unifying Bayesian Flow Networks and Diffusion Models through Stochastic Differential Equations", arXiv 2404.15766.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from zoo.base.hyperparameters import Configurable

__all__ = ["Flow", "Time", "expand_time", "quadratic_weights"]

Time = TypeVar("Time", float, Tensor)


class Flow(Configurable, ABC):
    """Accuracy schedule, sender and Bayesian update of one kind of data."""

    #: Variance c of a message of accuracy 1.
    noise_variance: float = 1.0
    #: What messages are centred at is e(x) = embed_gain x + embed_offset.
    embed_gain: float = 1.0
    embed_offset: float = 0.0

    @abstractmethod
    def beta(self, t: Time) -> Time:
        """Accuracy received until time t; 0 at t = 0."""

    @abstractmethod
    def beta_rate(self, t: Time) -> Time:
        """Accuracy received per time, the derivative of `beta`."""

    @abstractmethod
    def time(self, beta: float) -> float:
        """The time at which the accuracy is ``beta``: inverse of `beta`."""

    @abstractmethod
    def scale(self, t: Time) -> Time:
        """Factor between the state and the sum of the messages."""

    @abstractmethod
    def log_scale_rate(self, t: float) -> float:
        """Derivative of ln `scale`."""

    @abstractmethod
    def midpoint(self, start: float, end: float) -> float:
        """The time at which single-step methods of second order evaluate the estimate once more."""

    @abstractmethod
    def extrapolation(self, times: Sequence[float], end: float, *, stochastic: bool) -> tuple[float, ...]:
        """Weights w, which sum to 1, of the last estimates in ``sum_j w_j x_j``, the mean estimate over the step.

        Args:
            times: of the estimates, latest first; the step starts at the first. One to three: the estimate is taken as
                constant, as linear, as quadratic.
            end: time at which the step ends.
            stochastic: for the SDE instead of the ODE; up to two times.
        """

    @abstractmethod
    def from_levels(self, levels: Tensor, num_levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Data from level numbers 0 ... K - 1, int64 of the data's shape.

        Args:
            levels: the numbers.
            num_levels: K.
            dtype: float type of continuous data.
        """

    @abstractmethod
    def to_levels(self, x: Tensor, num_levels: int) -> Tensor:
        """Level numbers of data; of continuous data they may lie between whole numbers, and outside 0 ... K - 1."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Data as an estimate that is certain of it."""

    @abstractmethod
    def decode(self, estimate: Tensor) -> Tensor:
        """The data that an estimate favours most."""

    @abstractmethod
    def network_input(self, state: Tensor) -> Tensor:
        """The state in the form that networks see."""

    @abstractmethod
    def belief(self, state: Tensor) -> Tensor:
        """The state as an estimate of the data."""

    @abstractmethod
    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample's state, from the shape of one sample's data."""

    @abstractmethod
    def sender(self, estimate: Tensor, alpha: float, noise: Tensor) -> Tensor:
        """Message about the data.

        Args:
            estimate: the data, encoded.
            alpha: accuracy of the message, > 0.
            noise: standard normal, of the state's shape.
        """

    @abstractmethod
    def update(self, state: Tensor, message: Tensor, alpha: float, beta: float) -> Tensor:
        """Bayesian update of the state by a message.

        Args:
            state: belief before.
            message: of the state's shape.
            alpha: accuracy of the message.
            beta: accuracy received before it.
        """

    @abstractmethod
    def squared_error(self, x: Tensor, estimate: Tensor) -> Tensor:
        """|e(x) - e(estimate)|^2 / c for each data element: twice the KL divergence per accuracy; shape of ``x``."""

    def alpha(self, step: Time, num_steps: int) -> Time:
        """Accuracy of message ``step`` = 1 ... ``num_steps`` when they are sent at equal distances of time."""
        return self.beta(step / num_steps) - self.beta((step - 1) / num_steps)

    def embed(self, estimate: Tensor) -> Tensor:
        """The centre of the messages: e(x)."""
        return self.embed_gain * estimate + self.embed_offset

    def prior(self, shape: tuple[int, ...], **options: object) -> Tensor:
        """States before any message: (\\*shape, state), ``options`` as for ``torch.zeros``."""
        return torch.zeros(self.state_shape(shape), **options)  # type: ignore[call-overload]

    def sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw the state at time t of each sample: the flow distribution.

        Args:
            x: data (B, ...).
            t: (B,) in [0, 1].
            noise: standard normal, of the state's shape (B, ...).
        """
        t = expand_time(t, noise)
        beta, scale = self.beta(t), self.scale(t)
        return scale * beta * self.embed(self.encode(x)) + scale * (self.noise_variance * beta).sqrt() * noise


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Times (B,) in the form (B, 1, ..., 1) that broadcasts against ``like``."""
    return t.view(-1, *(1,) * (like.dim() - 1))


def quadratic_weights(back: float, far: float, first: float, second: float) -> tuple[float, float, float]:
    """Weights of three values whose interpolating quadratic has the given mean over a step.

    Args:
        back: distance of the second value behind the first, > 0.
        far: distance of the third value behind the first, > ``back``.
        first: mean distance from the first value over the step.
        second: mean squared distance.

    Returns:
        Weights of the first, second and third value; their sum is 1.
    """
    near_weight = -(second + first * far) / (back * (far - back))
    far_weight = (second + first * back) / (far * (far - back))
    return 1 - near_weight - far_weight, near_weight, far_weight
