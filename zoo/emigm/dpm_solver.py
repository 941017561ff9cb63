"""DPM-Solver++ for the head: singlestep, order 3, data prediction, steps uniform in the log signal-to-noise ratio.

Source: Lu et al., arXiv 2211.01095, as the published code of arXiv 2503.07197 sets it up. Three of its choices decide the
samples and are kept: steps with half log-SNR below -5.1 are dropped (996 of 1000 remain), the network is told the time
(t - 1/996) 1000, and coefficients are computed in float32.
Shape suffixes: R rows (tokens), C channels of a token.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.emigm.diffusion import cosine_betas

__all__ = ["DPMSolver", "NoiseSchedule", "solver_orders"]

_LEAST_LOG_SNR = -5.1


class NoiseSchedule:
    """ln alpha as a piecewise linear function of continuous time, from the betas of a discrete process.

    Args:
        betas: variance added by each step, float64.
        dtype: float type of everything computed; float32 is published.
    """

    def __init__(self, betas: Tensor, dtype: torch.dtype = torch.float32) -> None:
        log_alpha = 0.5 * torch.log1p(-betas).cumsum(0)
        half_log_snr = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
        kept = int((half_log_snr >= _LEAST_LOG_SNR).sum())
        self.num_steps = kept
        self.log_alphas = log_alpha[:kept].to(dtype)
        self.ts = (torch.arange(1, kept + 1, dtype=torch.float64) / kept).to(dtype)
        self.first, self.last = self.ts[-1], self.ts[0]

    def log_alpha(self, t: Tensor) -> Tensor:
        """ln alpha(t)."""
        return _interpolate(t, self.ts, self.log_alphas)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t)."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t) = sqrt(1 - alpha^2), by the published expression: near t_0 its float32 rounding is part of the samples."""
        return torch.sqrt(1.0 - torch.exp(2.0 * self.log_alpha(t)))

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = ln alpha - ln sigma."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(1.0 - torch.exp(2.0 * log_alpha))

    def time(self, half_log_snr: Tensor) -> Tensor:
        """Inverse of `half_log_snr`."""
        log_alpha = -0.5 * torch.logaddexp(torch.zeros_like(half_log_snr), -2.0 * half_log_snr)
        return _interpolate(log_alpha, self.log_alphas.flip(0), self.ts.flip(0))

    def network_time(self, t: Tensor) -> float:
        """Time t as the network takes it."""
        return float((t - 1.0 / self.num_steps) * 1000.0)


class _Stage(NamedTuple):
    """A network call and what follows: x <- keep x0 + (weights of the data estimates so far), with x0 the step's start."""

    time: float
    alpha: float
    sigma: float
    keep: float
    weights: tuple[float, ...]


def solver_orders(num_steps: int) -> list[int]:
    """Orders of the outer steps that spend exactly this number of network calls, thirds as far as possible.

    Raises:
        ValueError: fewer than one call.
    """
    if num_steps < 1:
        raise ValueError(f"The DPM-Solver head takes at least 1 step, not {num_steps}; published are 8 and 14.")
    thirds, rest = divmod(num_steps, 3)
    if rest == 0:
        return [3] * (thirds - 1) + ([2, 1] if num_steps > 0 else [])
    return [3] * thirds + [rest]


class DPMSolver:
    """All network calls of one sampling run, with their coefficients.

    Args:
        num_steps: number of network calls.
        dtype: float type of the coefficients; float32 is published.

    Raises:
        ValueError: fewer than one network call.
    """

    def __init__(self, num_steps: int, dtype: torch.dtype = torch.float32) -> None:
        self.schedule = schedule = NoiseSchedule(cosine_betas(), dtype)
        orders = solver_orders(num_steps)
        outer = self._uniform(schedule.first, schedule.last, len(orders))
        self.steps = [self._step(start, end, order) for start, end, order in zip(outer[:-1], outer[1:], orders, strict=True)]

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def with_steps(num_steps: int, dtype: torch.dtype = torch.float32) -> "DPMSolver":
        """A solver, built once for each number of steps."""
        return DPMSolver(num_steps, dtype)

    def _uniform(self, start: Tensor, end: Tensor, intervals: int) -> Tensor:
        """Times from ``start`` to ``end``, uniform in lambda."""
        first, last = self.schedule.half_log_snr(start), self.schedule.half_log_snr(end)
        return self.schedule.time(torch.linspace(float(first), float(last), intervals + 1, dtype=first.dtype))

    def _step(self, start: Tensor, end: Tensor, order: int) -> list[_Stage]:
        """One singlestep of the given order from ``start`` to ``end`` (Lu et al., algorithm 1 and its third order)."""
        schedule = self.schedule
        grid = schedule.half_log_snr(self._uniform(start, end, order))
        at, after = schedule.half_log_snr(start), schedule.half_log_snr(end)
        h, inner = after - at, grid[-1] - grid[0]
        ratios = [(grid[i] - grid[0]) / inner for i in range(1, order)]  # 1/2, or 1/3 and 2/3, to rounding
        times = [start, *(schedule.time(at + r * h) for r in ratios)]
        targets = [*times[1:], end]
        stages = []
        for i, (time, target) in enumerate(zip(times, targets, strict=True)):
            share = h if i == order - 1 else ratios[i] * h
            phi, alpha = torch.expm1(-share), schedule.alpha(target)
            weights = [-alpha * phi]
            if order == 2 and i == 1:
                correction = -(0.5 / ratios[0]) * alpha * phi
                weights = [weights[0] - correction, correction]
            elif order == 3 and i > 0:
                scale = ratios[1] / ratios[0] if i == 1 else 1.0 / ratios[1]
                correction = scale * alpha * (phi / share + 1.0)
                weights = [weights[0] - correction, *([torch.zeros(())] if i == 2 else []), correction]
            keep = schedule.sigma(target) / schedule.sigma(start)
            stages.append(
                _Stage(
                    schedule.network_time(time),
                    float(schedule.alpha(time)),
                    float(schedule.sigma(time)),
                    float(keep),
                    tuple(map(float, weights)),
                )
            )
        return stages

    def sample(self, network: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
        """Integrate from noise to tokens.

        Args:
            network: (x, time) to the noise estimate, (R, C) both.
            x: standard normal (R, C).
        """
        for stages in self.steps:
            start, data = x, list[Tensor]()
            for stage in stages:
                data.append(torch.sub(x, network(x, stage.time), alpha=stage.sigma).div_(stage.alpha))
                x = start * stage.keep
                for estimate, weight in zip(data, stage.weights, strict=True):
                    if weight:
                        x = x.add_(estimate, alpha=weight)
        return x


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs ascending; the outermost pieces go on beyond the ends."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[i - 1], xs[i], ys[i - 1], ys[i]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)
