"""Flow of discrete data: the belief is a probability for each class, kept as logits.

Source: Graves et al., arXiv 2308.07037, section 6; as a linear SDE of the logits: Xue et al., arXiv 2404.15766, section 5.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zoo.bfn.flow import Flow, Time, quadratic_weights

__all__ = ["DiscreteFlow"]


class DiscreteFlow(Flow):
    """Flow of K classes: the state is zeta, the logits of the belief; zeta(t) ~ N(beta (K e_x - 1), beta K I).

    beta(t) = b t^2 with b = ``max_sqrt_beta``^2. Data are class numbers (B, ...), int64; estimates are probabilities
    (B, ..., K); states are logits (B, ..., K).

    Networks see the probabilities, of two classes only 2 p_0 - 1, of the data's shape: with the published sign, so that
    the *input* is positive where class *0* is likely.

    Args:
        num_classes: K.
        max_sqrt_beta: square root of the accuracy received until t = 1. Published: 0.75 for text (K = 27), 3 for
            binary images.

    Raises:
        ValueError: fewer than 2 classes, or ``max_sqrt_beta`` not positive.
    """

    def __init__(self, num_classes: int = 27, max_sqrt_beta: float = 0.75) -> None:
        if num_classes < 2:
            raise ValueError(f"DiscreteFlow: num_classes={num_classes} must be at least 2.")
        if not 0 < max_sqrt_beta < math.inf:
            raise ValueError(f"DiscreteFlow: max_sqrt_beta={max_sqrt_beta} must be positive; published: 0.75 and 3.")
        self.num_classes = num_classes
        self.max_sqrt_beta = max_sqrt_beta
        self.max_beta = max_sqrt_beta**2
        self.noise_variance = self.embed_gain = float(num_classes)
        self.embed_offset = -1.0

    def beta(self, t: Time) -> Time:
        """b t^2."""
        return self.max_beta * t * t

    def beta_rate(self, t: Time) -> Time:
        """2 b t."""
        return 2 * self.max_beta * t

    def time(self, beta: float) -> float:
        """sqrt(beta / b)."""
        return math.sqrt(beta / self.max_beta)

    def scale(self, t: Time) -> Time:
        """1: the state is the sum of the messages."""
        return torch.ones_like(t) if isinstance(t, Tensor) else 1.0

    def log_scale_rate(self, t: float) -> float:
        """0."""
        return 0.0

    def midpoint(self, start: float, end: float) -> float:
        """Midway in time, as in the single-step BFN-Solver2."""
        return (start + end) / 2

    def extrapolation(self, times: Sequence[float], end: float, *, stochastic: bool) -> tuple[float, ...]:
        """Polynomials in time, integrated exactly.

        The ODE is an integral over time, the SDE one over beta, so over t^2.
        """
        if len(times) == 1:
            return (1.0,)
        at, *before = times
        step = end - at
        first = step * (at + 2 * end) / (3 * (at + end)) if stochastic else step / 2
        if len(times) == 2:
            slope = first / (at - before[0])
            return 1 + slope, -slope
        assert not stochastic
        return quadratic_weights(at - before[0], at - before[1], first, step * step / 3)

    def from_levels(self, levels: Tensor, num_levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels are the classes."""
        return levels

    def to_levels(self, x: Tensor, num_levels: int) -> Tensor:
        """The classes are the levels."""
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Probability 1 for each element's class, float32 (B, ..., K)."""
        return one_hot(x, self.num_classes).float()

    def decode(self, estimate: Tensor) -> Tensor:
        """The most probable class, int64."""
        return estimate.argmax(-1)

    def network_input(self, state: Tensor) -> Tensor:
        """Probabilities (B, ..., K); of two classes 2 p_0 - 1, (B, ...)."""
        if self.num_classes == 2:
            return torch.tanh((state[..., 0] - state[..., 1]) / 2)
        return state.softmax(-1)

    def belief(self, state: Tensor) -> Tensor:
        """Probabilities (B, ..., K)."""
        return state.softmax(-1)

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The data's shape, and K numbers for each element."""
        return (*shape, self.num_classes)

    def sender(self, estimate: Tensor, alpha: float, noise: Tensor) -> Tensor:
        """y ~ N(alpha (K p - 1), alpha K I)."""
        return self.embed(estimate).mul_(alpha).add_(noise, alpha=math.sqrt(alpha * self.num_classes))

    def update(self, state: Tensor, message: Tensor, alpha: float, beta: float) -> Tensor:
        """Add the message to the logits: the probabilities are multiplied by exp(y)."""
        return state + message

    def squared_error(self, x: Tensor, estimate: Tensor) -> Tensor:
        """K |e_x - p|^2, of the data's shape."""
        return self.num_classes * (self.encode(x).to(estimate.dtype) - estimate).square().sum(-1)
