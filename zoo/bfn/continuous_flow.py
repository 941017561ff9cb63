"""Flow of continuous data: the belief is a Gaussian whose mean moves from 0 to the data.

Source: Graves et al., arXiv 2308.07037, section 4.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from zoo.bfn.bins import bin_centre
from zoo.bfn.flow import Flow, Time, expand_time, quadratic_weights

__all__ = ["ContinuousFlow", "data_to_noise", "noise_to_data"]

#: Before this time the state carries no information that floats can resolve, and the estimate is 0.
MIN_TIME = 1e-6


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

    def midpoint(self, start: float, end: float) -> float:
        """Midway in the log-SNR, as in DPM-Solver++(2S)."""
        return self.time(math.sqrt(self.beta(start) * self.beta(end)))

    def extrapolation(self, times: Sequence[float], end: float, *, stochastic: bool) -> tuple[float, ...]:
        """Polynomials in half the log-SNR, l = ½ ln beta, as in DPM-Solver++.

        Two times: midpoint rule, as in DPM-Solver++(2M), for ODE and SDE alike. Three: exact integrals of the quadratic.
        (The code of DPM-Solver++(3M) takes half of the square's integral, which leaves it at second order.) An estimate
        at t = 0 is infinitely far away in l and gets no weight.
        """
        if len(times) > 1 and times[-1] == 0:
            return (*self.extrapolation(times[:-1], end, stochastic=stochastic), 0.0)
        if len(times) == 1:
            return (1.0,)
        after, at, *before = (math.log(self.beta(t)) / 2 for t in (end, *times))
        h = after - at
        if len(times) == 2:
            slope = h / (at - before[0]) / 2
            return 1 + slope, -slope
        assert not stochastic
        # The step is an integral over sqrt(beta) = exp(l): moments of l - l_start with that weight.
        total = math.expm1(h)
        first = (h * math.exp(h) - total) / total
        second = h * h * math.exp(h) / total - 2 * first
        return quadratic_weights(at - before[0], at - before[1], first, second)

    def from_levels(self, levels: Tensor, num_levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Centres of the bins; see `Flow.from_levels`."""
        return bin_centre(levels, num_levels, dtype)

    def to_levels(self, x: Tensor, num_levels: int) -> Tensor:
        """Linear: the centre of bin k becomes k."""
        return (x + 1).mul_(num_levels / 2).sub_(0.5)

    def encode(self, x: Tensor) -> Tensor:
        """The data itself."""
        return x

    def decode(self, estimate: Tensor) -> Tensor:
        """The estimate itself."""
        return estimate

    def network_input(self, state: Tensor) -> Tensor:
        """The mean of the belief itself."""
        return state

    def belief(self, state: Tensor) -> Tensor:
        """The mean itself."""
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
        gamma, variance = -torch.expm1(self.log_variance * t), torch.exp(self.log_variance * t)
        return gamma * x + (gamma * variance).sqrt() * noise

    def noise_coefficients(self, t: Time) -> tuple[Time, Time]:
        """The factors (1 / gamma, sqrt((1 - gamma) / gamma)) of `noise_to_data`; both 0 before `MIN_TIME`.

        Args:
            t: time, a number or a tensor.
        """
        if isinstance(t, Tensor):
            log_variance = self.log_variance * t.clamp(min=MIN_TIME)
            gamma, known = -torch.expm1(log_variance), t >= MIN_TIME
            return known / gamma, known * (log_variance.exp() / gamma).sqrt()
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


@lru_cache(maxsize=8192)  # so that a sampler's loop computes nothing but tensors
def _noise_coefficients(log_variance: float, t: float) -> tuple[float, float]:
    if t < MIN_TIME:
        return 0.0, 0.0
    gamma = -math.expm1(log_variance * t)
    return 1 / gamma, math.sqrt(math.exp(log_variance * t) / gamma)


def _expm1(value: Time) -> Time:
    return torch.expm1(value) if isinstance(value, Tensor) else math.expm1(value)
