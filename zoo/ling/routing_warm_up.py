"""Stochastic routing warm-up: noise of the scores' mean and deviation fades into the learned scores.

Shape suffixes: B sequences, T tokens of a sequence, L layers with experts, E experts, N = B T.
Source: arXiv 2503.05139, equation 3.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.ling.config import LingConfig
from zoo.ling.network import RouterNoise
from zoo.ling.router import Router, RouterStatistics

__all__ = ["RoutingWarmUp"]


class RoutingWarmUp:
    """Noise for the routers of a training, and the statistics of its steps.

    Args:
        num_steps: W, applied steps over which learned scores replace noise; 0: no warm-up.
        momentum: Weight of the old value in the running mean and deviation of the scores.
    """

    def __init__(self, num_steps: int, momentum: float) -> None:
        self.num_steps = num_steps
        self.momentum = momentum
        self._moments: list[Tensor] = []  # of the micro-batches of the current step

    def noise(
        self, config: LingConfig, num_tokens: int, applied_steps: int, random: SampleRandom, dtype: torch.dtype
    ) -> tuple[RouterNoise, Tensor]:
        """Noise of each layer, and the share of the learned scores.

        Args:
            config: The architecture.
            num_tokens: T.
            applied_steps: Steps so far, fewer than W.
            random: Random numbers of the batch.
            dtype: Type of the noise.
        """
        first, num_layers = config.first_k_dense_replace, config.num_moe_layers
        names = [f"router/{layer}" for layer in range(first, first + num_layers)]
        noise = random.normals(names, (num_tokens, config.num_experts), dtype)
        noise_LNE = noise.view(num_layers, -1, config.num_experts)
        share = torch.tensor(applied_steps / self.num_steps, dtype=dtype, device=noise.device)
        return lambda layer: noise_LNE[layer - first], share

    def observe(self, statistics: RouterStatistics | None, applied_steps: int) -> None:
        """Keep the scores' mean and mean square of a micro-batch until its step is applied or skipped."""
        if statistics is not None and applied_steps < self.num_steps:
            self._moments.append(torch.stack([statistics.logit_mean, statistics.logit_square]))

    def update(self, routers: Iterable[Router], sum_over: Callable[[Tensor], tuple[Tensor, int]], first: bool) -> None:
        """Take the mean and deviation of an applied step into the running ones.

        Args:
            routers: One a layer.
            sum_over: Gives the sum of a tensor over the processes of the step, and their number.
            first: Whether there is no old value yet.
        """
        if self._moments:
            total_2L, num_processes = sum_over(torch.stack(self._moments).mean(0))
            mean_L, square_L = total_2L / num_processes
            std_L = (square_L - mean_L.square()).clamp(min=0).sqrt()
            for router, mean, std in zip(routers, mean_L, std_L, strict=True):
                router.update(mean, std, self.momentum, first=first)
            self.forget()

    def forget(self) -> None:
        """Drop what was observed, of a step that was skipped."""
        self._moments.clear()
