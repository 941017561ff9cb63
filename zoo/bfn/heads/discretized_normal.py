"""Head of discretised data: a normal distribution over each element, seen through the data's bins."""

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.bfn.bins import (
    bin_centre,
    bin_index,
    bin_log_prob,
    bin_log_probs,
    bin_mean,
    bin_mode,
    check_num_bins,
    in_chunks,
    truncated_normal,
)
from zoo.bfn.continuous_flow import MIN_TIME, ContinuousFlow, noise_to_data
from zoo.bfn.flow import Flow, expand_time
from zoo.bfn.heads.head import Head, OutputDistribution
from zoo.bfn.heads.messages import check_message_samples, mean_over_messages, require_random

__all__ = ["DiscretizedNormal", "DiscretizedNormalHead"]


@dataclass
class DiscretizedNormal(OutputDistribution):
    """The probability of each bin is that of a normal variable to fall into it.

    Args:
        location: mean of the normal variable (B, ...).
        std: its standard deviation (B, ...).
        num_bins: levels of the data.
        clip: see `DiscretizedNormalHead`.
        min_prob: see `DiscretizedNormalHead`.
        message_samples: see `DiscretizedNormalHead`.
    """

    location: Tensor
    std: Tensor
    num_bins: int
    clip: bool = True
    min_prob: float = 1e-5
    message_samples: int = 10

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the estimates."""
        return self.location.dtype

    def log_probs(self) -> Tensor:
        """ln probability of every bin (B, ..., K)."""
        return bin_log_probs(self.location, self.std, self.num_bins, clip=self.clip)

    def mean(self) -> Tensor:
        """Mean of the bins' centres."""
        return bin_mean(self.location, self.std, self.num_bins, clip=self.clip)

    def mode(self) -> Tensor:
        """Centre of the most probable bin."""
        return self._centre(bin_mode(self.location, self.std, self.num_bins, clip=self.clip))

    def sample(self, random: SampleRandom, name: str) -> Tensor:
        """Centre of the bin that a draw of the normal variable falls into."""
        shape = tuple(self.location.shape[1:])
        if self.clip:
            drawn = self.location + self.std * random.normal(name, shape, self.dtype)
        else:
            drawn = truncated_normal(self.location, self.std, random.uniform(name, shape, self.dtype))
        return self._centre(bin_index(drawn, self.num_bins))

    def log_prob(self, x: Tensor) -> Tensor:
        """ln probability of the data's bins; see `bin_log_prob`."""
        return bin_log_prob(x, self.location, self.std, self.num_bins, clip=self.clip, min_prob=self.min_prob)

    def message_kl(self, x: Tensor, alpha: Tensor, random: SampleRandom | None = None) -> Tensor:
        """E_y[ln N(y; x, 1 / alpha) - ln sum_k p_k N(y; c_k, 1 / alpha)], y ~ N(x, 1 / alpha), by drawn messages."""
        draws = require_random(random)
        # Multiplied by the number of messages, the rounding of float32 would show; with gradients it is one batch's noise.
        dtype = self.dtype if torch.is_grad_enabled() else torch.float64

        def estimate(location: Tensor, std: Tensor, x: Tensor, alpha: Tensor, index_B: Tensor) -> Tensor:
            centres = bin_centre(torch.arange(self.num_bins, device=x.device), self.num_bins, dtype)
            log_probs = bin_log_probs(location, std, self.num_bins, clip=self.clip)
            # With y = x + z / sqrt(alpha), alpha ((y - c)^2 - (y - x)^2) / 2 = gap z + gap^2 / 2.
            gap = expand_time(alpha, log_probs).sqrt() * (x[..., None] - centres)

            def log_ratio(noise: Tensor, weights: Tensor) -> Tensor:
                return -torch.addcmul(weights, gap, noise[..., None], value=-1).logsumexp(-1)

            batch = SampleRandom(draws.seed, index_B, draws.epoch)
            weights = log_probs - gap.square() / 2
            return mean_over_messages(log_ratio, weights, self.message_samples, batch, tuple(x.shape[1:]))

        row_size = self.location[0].numel() * self.num_bins
        tensors = *(tensor.to(dtype) for tensor in (self.location, self.std, x, alpha)), draws.index_B
        return in_chunks(estimate, row_size, *tensors).to(self.dtype)

    def _centre(self, index: Tensor) -> Tensor:
        return bin_centre(index, self.num_bins, self.dtype)


class DiscretizedNormalHead(Head):
    """Discretised data: the network gives mean and ln standard deviation of the noise, which imply those of the data.

    The data estimate's mean is mu / gamma - sqrt((1 - gamma) / gamma) m, its standard deviation sqrt((1 - gamma) / gamma)
    exp(l); before t = 1e-6 they are 0 and 1. Source: arXiv 2308.07037, section 5.

    Args:
        num_bins: levels of the data.
        clip: what lies outside [-1, 1] belongs to the end bins; otherwise the normal distribution ends there.
        min_std: least standard deviation.
        max_std: greatest standard deviation.
        min_prob: where the probability of the data's bin is less, it is taken as density times width.
        message_samples: messages drawn to estimate the loss of finitely many messages.

    Raises:
        ValueError: an argument out of range.
    """

    flow_type = ContinuousFlow
    num_outputs = 2

    def __init__(
        self,
        num_bins: int,
        clip: bool = True,
        min_std: float = 1e-3,
        max_std: float = 10.0,
        min_prob: float = 1e-5,
        message_samples: int = 10,
    ) -> None:
        check_num_bins(num_bins, "DiscretizedNormalHead")
        check_message_samples(message_samples, "DiscretizedNormalHead")
        if not 0 < min_std <= max_std:
            raise ValueError(f"DiscretizedNormalHead: min_std={min_std} and max_std={max_std} must be positive and in order.")
        if not 0 < min_prob < 1:
            raise ValueError(f"DiscretizedNormalHead: min_prob={min_prob} must lie between 0 and 1; published: 1.0e-5.")
        self.num_bins = num_bins
        self.clip = clip
        self.min_std = min_std
        self.max_std = max_std
        self.min_prob = min_prob
        self.message_samples = message_samples

    def __call__(self, output: Tensor, state: Tensor, t: Tensor | float, flow: Flow) -> DiscretizedNormal:
        """See `Head`."""
        assert isinstance(flow, ContinuousFlow)
        noise, log_std = output.to(state.dtype).reshape(*state.shape, 2).unbind(-1)
        spread = log_std.clamp(-10, 10).exp()
        if isinstance(t, Tensor):
            t = expand_time(t, state)
            inverse_gamma, noise_scale = flow.noise_coefficients(t)
            location = noise_to_data(state, noise, inverse_gamma, noise_scale)
            std = torch.where(t < MIN_TIME, 1.0, (noise_scale * spread).clamp(self.min_std, self.max_std))
        else:
            number, scale = flow.noise_coefficients(t)
            location = noise_to_data(state, noise, number, scale)
            std = torch.ones_like(spread) if t < MIN_TIME else spread.mul(scale).clamp_(self.min_std, self.max_std)
        return DiscretizedNormal(location, std, self.num_bins, self.clip, self.min_prob, self.message_samples)
