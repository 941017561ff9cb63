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

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from zoo.hyperparameters import Configurable

__all__ = ["ContinuousFlow", "Flow", "data_to_noise", "expand_time", "noise_to_data"]

Time = TypeVar("Time", float, Tensor)

#: Before this time the state carries no information that floats can resolve, and the estimate is 0.
MIN_TIME = 1e-6


class Flow(Configurable, ABC):
    """Accuracy schedule, sender and Bayesian update of one kind of data."""

    #: Variance c of a message of accuracy 1.
    noise_variance: float = 1.0

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
    def slope_weight(self, previous: float, start: float, end: float, *, stochastic: bool) -> float:
        """Weight w in ``x_i + w * (x_i - x_(i-1))``, the mean estimate over the step by linear extrapolation.

        Args:
            previous: time of the estimate before.
            start: time of the present estimate, where the step begins.
            end: time at which the step ends.
            stochastic: for the SDE instead of the ODE.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Data as an estimate that is certain of it."""

    @abstractmethod
    def decode(self, estimate: Tensor) -> Tensor:
        """The data that an estimate, or a state, favours most."""

    @abstractmethod
    def embed(self, estimate: Tensor) -> Tensor:
        """What messages are centred at: e(x)."""

    @abstractmethod
    def network_input(self, state: Tensor) -> Tensor:
        """The state in the form that networks see."""

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


class ContinuousFlow(Flow):
    """Flow of real numbers in [-1, 1]: the state is the mean mu of a Gaussian of precision 1 + beta(t).

    beta(t) = s^(-2t) - 1 with s^2 = ``min_variance``, so that the variance of the belief falls to s^2 at t = 1;
    with gamma = 1 - s^(2t), mu(t) ~ N(gamma x, gamma (1 - gamma)).

    Args:
        min_variance: variance of the belief at t = 1, in (0, 1). Published: 1e-3 for 16 levels, 1e-6 for 256.

    Raises:
        ValueError: ``min_variance`` outside (0, 1).
    """

    def __init__(self, min_variance: float = 1e-3) -> None:
        if not 0 < min_variance < 1:
            raise ValueError(
                f"ContinuousFlow: min_variance={min_variance} must lie between 0 and 1; 1.0e-3 suits 16 levels, 1.0e-6 suits 256."
            )
        self.min_variance = min_variance
        self.log_variance = math.log(min_variance)

    def beta(self, t: Time) -> Time:
        """s^(-2t) - 1."""
        return _expm1(-self.log_variance * t)

    def beta_rate(self, t: Time) -> Time:
        """-ln(s^2) s^(-2t)."""
        return -self.log_variance * (1 + self.beta(t))

    def time(self, beta: float) -> float:
        """ln(1 + beta) / -ln(s^2)."""
        return math.log1p(beta) / -self.log_variance

    def scale(self, t: Time) -> Time:
        """The belief's variance, s^(2t)."""
        return self.min_variance**t

    def log_scale_rate(self, t: float) -> float:
        """ln(s^2)."""
        return self.log_variance

    def slope_weight(self, previous: float, start: float, end: float, *, stochastic: bool) -> float:
        """Midpoint rule in half the log-SNR, ½ ln beta, as in DPM-Solver++(2M), for ODE and SDE alike."""
        if previous == 0:  # infinitely far away in the log-SNR
            return 0.0
        before, at, after = (math.log(self.beta(t)) for t in (previous, start, end))
        return (after - at) / (at - before) / 2

    def encode(self, x: Tensor) -> Tensor:
        """The data itself."""
        return x

    def decode(self, estimate: Tensor) -> Tensor:
        """The estimate itself."""
        return estimate

    def embed(self, estimate: Tensor) -> Tensor:
        """The estimate itself."""
        return estimate

    def network_input(self, state: Tensor) -> Tensor:
        """The mean of the belief itself."""
        return state

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The data's shape."""
        return shape

    def sender(self, estimate: Tensor, alpha: float, noise: Tensor) -> Tensor:
        """y ~ N(x, 1 / alpha)."""
        return estimate.add(noise, alpha=1 / math.sqrt(alpha))

    def update(self, state: Tensor, message: Tensor, alpha: float, beta: float) -> Tensor:
        """(rho mu + alpha y) / (rho + alpha) with precision rho = 1 + beta."""
        total = 1 + beta + alpha
        return ((1 + beta) / total * state).add_(message, alpha=alpha / total)

    def squared_error(self, x: Tensor, estimate: Tensor) -> Tensor:
        """(x - estimate)^2."""
        return (x - estimate).square()

    def sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """gamma x + sqrt(gamma (1 - gamma)) z; see `Flow.sample`."""
        t = expand_time(t, noise)
        gamma = -torch.expm1(self.log_variance * t)
        return gamma * x + (gamma * (1 - gamma)).sqrt() * noise

    def noise_coefficients(self, t: Time) -> tuple[Time, Time]:
        """The factors (1 / gamma, sqrt((1 - gamma) / gamma)) of `noise_to_data`; both 0 before `MIN_TIME`.

        Args:
            t: time, a number or a tensor.
        """
        if isinstance(t, Tensor):
            gamma = -torch.expm1(self.log_variance * t.clamp(min=MIN_TIME))
            known = t >= MIN_TIME
            return known / gamma, known * ((1 - gamma) / gamma).sqrt()
        return _noise_coefficients(self.log_variance, t)


def noise_to_data(state: Tensor, noise: Tensor, inverse_gamma: Time, noise_scale: Time) -> Tensor:
    """The data estimate that a noise estimate implies: mu / gamma - sqrt((1 - gamma) / gamma) noise.

    Args:
        state: mu.
        noise: estimate of z in mu = gamma x + sqrt(gamma (1 - gamma)) z.
        inverse_gamma: 1 / gamma, number or tensor, from `ContinuousFlow.noise_coefficients`.
        noise_scale: sqrt((1 - gamma) / gamma), likewise.
    """
    if isinstance(noise_scale, Tensor):
        return torch.addcmul(inverse_gamma * state, noise_scale, noise, value=-1)
    return (inverse_gamma * state).sub_(noise, alpha=noise_scale)


def data_to_noise(state: Tensor, x: Tensor, inverse_gamma: Time, noise_scale: Time) -> Tensor:
    """The noise estimate that a data estimate implies: inverse of `noise_to_data`, with the same arguments."""
    return (inverse_gamma * state - x) / noise_scale


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Times (B,) in the form (B, 1, ..., 1) that broadcasts against ``like``."""
    return t.view(-1, *(1,) * (like.dim() - 1))


@lru_cache(maxsize=8192)  # so that a sampler's loop computes nothing but tensors
def _noise_coefficients(log_variance: float, t: float) -> tuple[float, float]:
    if t < MIN_TIME:
        return 0.0, 0.0
    gamma = -math.expm1(log_variance * t)
    return 1 / gamma, math.sqrt((1 - gamma) / gamma)


def _expm1(value: Time) -> Time:
    return torch.expm1(value) if isinstance(value, Tensor) else math.expm1(value)
