"""Mask schedules gamma(t): the probability that a token is masked at time t, from 0 (whole image) to 1 (nothing seen).

Source: You et al., arXiv 2503.07197, table 4 and appendix D; the published code for ``poly-0.5`` and for the constant 5.
Shape suffixes: N tokens, K mask-prediction steps.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["ScheduleName", "elbo_weight", "expected_reveals", "gamma", "reveal_probability", "step_times"]

ScheduleName = Literal["linear", "cosine", "poly-0.5", "exp", "log"]

_RATE = 5.0  # of exp and log
_LOG_SLOPE = math.expm1(_RATE)


def gamma(schedule: ScheduleName, t: Tensor) -> Tensor:
    """Probability that a token is masked at time t.

    It is 0 at t = 0 and 1 at t = 1, but for ``exp``, which ends at 1 - exp(-5) = 0.9933; sampling starts fully masked anyway.

    Args:
        schedule: name of the schedule.
        t: times in [0, 1], any shape.

    Raises:
        ValueError: unknown schedule.
    """
    check_schedule(schedule)
    match schedule:
        case "linear":
            return t
        case "cosine":
            return torch.cos(math.pi / 2 * (1 - t))
        case "poly-0.5":
            return t.sqrt()
        case "exp":
            return -torch.expm1(-_RATE * t)
        case _:
            return torch.log1p(_LOG_SLOPE * t) / _RATE


def elbo_weight(schedule: ScheduleName, t: Tensor) -> Tensor:
    """Weight gamma'(t) / gamma(t) that makes the loss a bound of the likelihood (table 4 prints it with a minus sign).

    Args:
        schedule: name of the schedule.
        t: times in (0, 1], any shape.

    Raises:
        ValueError: unknown schedule.
    """
    check_schedule(schedule)
    match schedule:
        case "linear":
            return 1 / t
        case "cosine":
            return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))
        case "poly-0.5":
            return 0.5 / t
        case "exp":
            return _RATE / torch.expm1(_RATE * t)
        case _:
            inside = 1 + _LOG_SLOPE * t
            return _LOG_SLOPE / (inside * inside.log())


def reveal_probability(schedule: ScheduleName, t: Tensor, s: Tensor) -> Tensor:
    """Probability that a token masked at time t is revealed on the way to s < t: 1 - gamma(s) / gamma(t) (equation 6).

    Appendix B.2 of the paper prints gamma(s) in the denominator; equation 6 and the published code have gamma(t).

    Args:
        schedule: name of the schedule.
        t: start of the step.
        s: end of the step, of the same shape.
    """
    return 1 - gamma(schedule, s) / gamma(schedule, t)


def step_times(num_iter: int, eps: float = 1e-5) -> Tensor:
    """Times tau_0 = 1 > ... > tau_K = ``eps`` of K mask-prediction steps, float64 (K + 1,).

    The small end is part of the published grid: it decides which steps lie in a guidance window.

    Raises:
        ValueError: fewer than one step.
    """
    if num_iter < 1:
        raise ValueError(f"num_iter={num_iter} must be at least 1: it counts the mask-prediction steps.")
    return torch.linspace(1, eps, num_iter + 1, dtype=torch.float64)


def reveal_probabilities(schedule: ScheduleName, num_iter: int, eps: float = 1e-5) -> list[float]:
    """Probability of each of the K steps that a masked token is revealed in it; 1 for the last."""
    tau = step_times(num_iter, eps)
    return [*reveal_probability(schedule, tau[:-2], tau[1:-1]).tolist(), 1.0]


def expected_reveals(
    schedule: ScheduleName, num_tokens: int, num_iter: int, at_least_one: bool = True, eps: float = 1e-5
) -> Tensor:
    """Mean number of tokens that each step reveals, float64 (K,), exactly (the Markov chain of the masked count).

    A step reveals Binomial(masked, p) tokens, at least one if any is masked, and the last step all of them.

    Args:
        schedule: name of the schedule.
        num_tokens: number of tokens N.
        num_iter: number of steps K.
        at_least_one: whether a step must reveal something.
        eps: last time of the grid.
    """
    law = torch.zeros(num_tokens + 1, dtype=torch.float64)  # of the masked count before the step
    law[num_tokens] = 1
    counts = torch.arange(num_tokens + 1, dtype=torch.float64)
    log_factorial = torch.lgamma(counts + 1)
    means = []
    for p in reveal_probabilities(schedule, num_iter, eps):
        masked, revealed = counts[:, None], counts[None, :]
        kept = masked - revealed
        possible = kept >= 0
        log_choose = log_factorial[:, None] - log_factorial[None, :] - torch.lgamma(kept.clamp(min=0) + 1)
        q = torch.tensor(p, dtype=torch.float64)
        log_law = log_choose + torch.xlogy(revealed, q) + torch.xlogy(kept.clamp(min=0), 1 - q)
        binomial = torch.where(possible, log_law.exp(), 0.0)  # [masked, revealed]
        if at_least_one:
            binomial[1:, 1] += binomial[1:, 0]
            binomial[1:, 0] = 0
        joint = law[:, None] * binomial
        means.append((joint * revealed).sum())
        law = torch.zeros_like(law).index_add_(0, kept[possible].long(), joint[possible])
    return torch.stack(means)


def check_schedule(schedule: str) -> None:
    """Refuse a name that is none.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in get_args(ScheduleName):
        raise ValueError(f"There is no mask schedule {schedule!r}; there are {', '.join(get_args(ScheduleName))}.")
