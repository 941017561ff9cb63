"""Expectations over messages, by drawing them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.base.random import SampleRandom

__all__ = ["check_message_samples", "mean_over_messages", "require_random"]


def check_message_samples(message_samples: int, owner: str) -> None:
    """Refuse to estimate by no message at all.

    Raises:
        ValueError: naming ``owner``, whose argument it is.
    """
    if message_samples < 1:
        raise ValueError(f"{owner}: message_samples={message_samples} must be at least 1; published: 10.")


def require_random(random: SampleRandom | None) -> SampleRandom:
    """The batch's random numbers, for a loss that draws messages.

    Raises:
        ValueError: they are missing.
    """
    if random is None:
        raise ValueError("message_kl: random=None, but this head draws messages; pass the batch's SampleRandom.")
    return random


def mean_over_messages(
    log_ratio: Callable[[Tensor, Tensor], Tensor],
    prediction: Tensor,
    message_samples: int,
    random: SampleRandom,
    noise_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Mean of ``log_ratio(noise, prediction)`` over draws of a message's standard normal noise.

    Every second draw is the one before with its sign changed. To first order in the noise the ratio is odd, so that the
    error of a pair is far smaller than that of two separate draws, above all for the weak messages of many steps.
    Messages are drawn again in the backward pass instead of being stored: memory does not grow with their number.

    Args:
        log_ratio: ln sender - ln receiver of one message, from its noise and the prediction.
        prediction: what the receiver depends on (B, ...); gradients flow into it.
        message_samples: number of draws.
        random: the batch's random numbers.
        noise_shape: of one sample's noise; by default that of the prediction.
    """
    shape = tuple(prediction.shape[1:]) if noise_shape is None else noise_shape

    def ratio(number: int, prediction: Tensor) -> Tensor:
        noise = random.normal(f"message {number // 2}", shape, prediction.dtype)
        return log_ratio(-noise if number % 2 else noise, prediction)

    total = torch.zeros((), dtype=prediction.dtype, device=prediction.device)
    for number in range(message_samples):
        total = total + checkpoint(ratio, number, prediction, use_reentrant=False, preserve_rng_state=False)
    return total / message_samples
