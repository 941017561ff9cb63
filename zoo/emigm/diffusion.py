"""Discrete diffusion of the head: cosine schedule of 1000 steps, loss with learned variance, DDPM sampling.

Sources: You et al., arXiv 2503.07197, and MAR's DiffLoss, which follow Nichol and Dhariwal, arXiv 2102.09672.
Shape suffixes: R rows (tokens), C channels of a token.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Diffusion", "cosine_betas"]

_LARGEST_BETA = 0.999
_BIN = 1 / 255  # half width of a bin of the discretised likelihood, as in the published code, though latents are no pixels
_EDGE = 0.999


def cosine_betas(num_steps: int = 1000) -> Tensor:
    """beta_i = min(1 - abar((i+1)/T) / abar(i/T), 0.999) with abar(u) = cos^2(((u + 0.008) / 1.008) pi / 2), float64 (T,)."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - abar[1:] / abar[:-1]).clamp(max=_LARGEST_BETA)


class Diffusion:
    """A discrete diffusion process and its tables, float64.

    Args:
        betas: variance added by each step (T,), float64.
        times: what the network is told at each step (T,): the steps of the process it was trained on.
    """

    def __init__(self, betas: Tensor, times: Tensor | None = None) -> None:
        self.num_steps = len(betas)
        self.times = torch.arange(len(betas), dtype=torch.float64) if times is None else times.double()
        abar = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        variance = betas * (1 - before) / (1 - abar)
        # The posterior variance of step 0 is 0; its logarithm is replaced by that of step 1.
        log_variance = torch.cat([variance[1:2], variance[1:]]).log() if len(betas) > 1 else betas.log()
        self.betas = betas
        self.abar = abar
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._tables = {
            "data": abar.sqrt(),
            "noise": (1 - abar).sqrt(),
            "x_to_data": (1 / abar).sqrt(),
            "noise_to_data": (1 / abar - 1).sqrt(),
            "data_to_mean": betas * before.sqrt() / (1 - abar),
            "x_to_mean": (1 - before) * (1 - betas).sqrt() / (1 - abar),
            "log_beta": betas.log(),
            "log_variance": log_variance,
        }

    def table(self, name: str, step: Tensor, dtype: torch.dtype) -> Tensor:
        """Entries of a table for steps (R,), as a column (R, 1)."""
        place = (name, step.device, dtype)
        if place not in self._placed:
            self._placed[place] = self._tables[name].to(step.device, dtype)
        return self._placed[place][step][:, None]

    @staticmethod
    @functools.cache
    def cosine(num_steps: int = 1000) -> "Diffusion":
        """The published process."""
        return Diffusion(cosine_betas(num_steps))

    @functools.lru_cache(maxsize=16)  # noqa: B019 (few processes, few numbers of steps)
    def respaced(self, num_steps: int) -> "Diffusion":
        """The process on evenly spaced steps of this one, first and last among them (Nichol and Dhariwal, section 4).

        Raises:
            ValueError: more steps than there are, or none.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"The DDPM head takes 1 to {self.num_steps} steps, not {num_steps}.")
        stride = (self.num_steps - 1) / (num_steps - 1) if num_steps > 1 else 1.0
        place, kept = 0.0, []
        for _ in range(num_steps):  # accumulated in floating point, as published
            kept.append(round(place))
            place += stride
        abar = self.abar[torch.tensor(kept)]
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        return Diffusion(1 - abar / before, self.times[torch.tensor(kept)])

    def noised(self, x: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """sqrt(abar) x + sqrt(1 - abar) noise, of tokens (R, C) at steps (R,)."""
        return self.table("data", step, x.dtype) * x + self.table("noise", step, x.dtype) * noise

    def losses(self, output: Tensor, x: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the loss of each row (R,): squared error of the noise, and the variance's bound in bits.

        The bound trains the variance only: the noise estimate enters it detached, and it is not scaled.

        Args:
            output: of the network at `noised`, (R, 2C): noise estimate and variance.
            x: tokens (R, C).
            step: steps (R,).
            noise: standard normal (R, C).
        """
        estimate, variance = output.chunk(2, dim=1)
        mse = (noise - estimate).square().mean(1)
        x_t = self.noised(x, step, noise)
        mean, log_variance = self.posterior(x_t, estimate.detach(), variance, step)
        true_mean = self.table("data_to_mean", step, x.dtype) * x + self.table("x_to_mean", step, x.dtype) * x_t
        true_log_variance = self.table("log_variance", step, x.dtype)
        gap = true_log_variance - log_variance
        kl = 0.5 * (gap.exp() - 1 - gap + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = -_discretised_log_likelihood(x, mean, 0.5 * log_variance)
        bound = torch.where((step == 0)[:, None], likelihood, kl)
        return mse, bound.mean(1) / math.log(2)

    def posterior(self, x_t: Tensor, noise: Tensor, variance: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t), (R, C) each; data estimates are not clipped.

        Args:
            x_t: state (R, C).
            noise: estimate of the noise (R, C).
            variance: output v (R, C); (v + 1) / 2 interpolates between the logarithms of the least and the largest variance.
            step: steps (R,).
        """
        dtype = x_t.dtype
        data = self.table("x_to_data", step, dtype) * x_t - self.table("noise_to_data", step, dtype) * noise
        mean = self.table("data_to_mean", step, dtype) * data + self.table("x_to_mean", step, dtype) * x_t
        share = (variance + 1) / 2
        low, high = self.table("log_variance", step, dtype), self.table("log_beta", step, dtype)
        return mean, share * high + (1 - share) * low

    def sample(
        self,
        network: Callable[[Tensor, float], tuple[Tensor, Tensor]],
        x: Tensor,
        noise: Callable[[int], Tensor],
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> Tensor:
        """DDPM sampling from noise to tokens.

        Args:
            network: (x, time) to noise estimate and variance output, (R, C) each.
            x: standard normal (R, C).
            noise: standard normal (R, C) for a step; not called for the last, which adds none.
            temperature: scales the added noise only.
            clip: confine the data estimate to [-clip, clip]; None, as published: do not.
        """
        for i in reversed(range(self.num_steps)):
            estimate, variance = network(x, float(self.times[i]))
            step = torch.full((len(x),), i, device=x.device)
            if clip is not None:
                scale, spread = self.table("x_to_data", step, x.dtype), self.table("noise_to_data", step, x.dtype)
                estimate = (scale * x - (scale * x - spread * estimate).clamp(-clip, clip)) / spread
            mean, log_variance = self.posterior(x, estimate, variance, step)
            x = mean if i == 0 else mean + (0.5 * log_variance).exp() * noise(i) * temperature
        return x


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """ln probability of x's bin under a normal distribution, with open bins beyond +-0.999 (Ho et al., section 3.3)."""
    inverse = (-log_scale).exp()
    upper = _normal_cdf((x - mean + _BIN) * inverse)
    lower = _normal_cdf((x - mean - _BIN) * inverse)
    probability = torch.where(x < -_EDGE, upper, torch.where(x > _EDGE, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The published approximation by a hyperbolic tangent."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3))))
