"""Losses of Bayesian flow networks, in nats per element of the data, one number per sample (B,).

Together, ``loss + reconstruction_loss`` bounds the negative log-likelihood: `bits` of it are bits per dimension.
Source: Graves et al., arXiv 2308.07037, sections 3 and 4.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.bfn.continuous_flow import ContinuousFlow
from zoo.bfn.flow import Flow, expand_time
from zoo.bfn.heads import Head, OutputDistribution

__all__ = ["bits", "continuous_time_loss", "discrete_time_loss", "predict_from_data", "reconstruction_loss"]


def predict_from_data(
    network: Callable[[Tensor, Tensor], Tensor], flow: Flow, head: Head, x: Tensor, t: Tensor, noise: Tensor
) -> OutputDistribution:
    """Let the network predict the data from what the flow shows of it at a time.

    Args:
        network: maps (network input, t) to the output that ``head`` reads.
        flow: of the data.
        head: of the network.
        x: data (B, ...), int64 class numbers or floats.
        t: times (B,) in [0, 1], of the noise's float type.
        noise: standard normal, of the state's shape; float32 or float64, which decides the precision of the loss.
    """
    state = flow.sample(x, t, noise)
    output = network(flow.network_input(state), t)
    head.check_output(output, state, flow)
    return head(output, state, t, flow)


def continuous_time_loss(
    flow: Flow,
    prediction: OutputDistribution,
    x: Tensor,
    t: Tensor,
    clip: bool = True,
    min_variance: float | None = None,
) -> Tensor:
    """Loss of infinitely many messages, estimated at time t: ½ beta'(t) |e(x) - e(x̂)|^2 / c, with the mean estimate x̂.

    Its mean over t ~ U(0, 1) is the loss. Continuous data: -½ ln(s^2) s^(-2t) (x - x̂)^2; K classes: K b t |e_x - p|^2.

    Args:
        flow: of the data.
        prediction: for the flow's state at t.
        x: data (B, ...), int64 class numbers or floats.
        t: times (B,).
        clip: compare with the estimate confined to the data's range. Where it is confined, no gradient flows.
        min_variance: for continuous data, the weight beta'(t) stops growing where the belief's variance s^(2t) has
            fallen to this; the result is then below the loss. None: it never stops.

    Raises:
        ValueError: ``min_variance`` outside (0, 1], or given for other than continuous data.
    """
    if min_variance is not None:
        if not isinstance(flow, ContinuousFlow) or not 0 < min_variance <= 1:
            raise ValueError(
                f"continuous_time_loss: min_variance={min_variance} must be None, or lie in (0, 1] with a ContinuousFlow;"
                f" the flow is a {type(flow).__name__}."
            )
        t = t.clamp(max=flow.time(1 / min_variance - 1))
    estimate = prediction.mean() if clip else prediction.unclipped_mean()
    error = flow.squared_error(x, estimate)
    return (expand_time(flow.beta_rate(t).to(error.dtype), error) * error / 2).flatten(1).mean(1)


def discrete_time_loss(
    flow: Flow,
    prediction: OutputDistribution,
    x: Tensor,
    step: Tensor,
    num_steps: int,
    random: SampleRandom | None = None,
) -> Tensor:
    """Loss of ``num_steps`` messages, estimated at one of them: n KL(true message, predicted message).

    Its mean over steps drawn uniformly from 1 ... n is the loss; the network sees the state at t = (step - 1) / n.

    Args:
        flow: of the data.
        prediction: for the flow's state at (step - 1) / num_steps.
        x: data (B, ...), int64 class numbers or floats.
        step: number of the message (B,), from 1.
        num_steps: n.
        random: for heads that estimate the divergence by drawing messages: all but `DeltaHead`.

    Raises:
        ValueError: the head draws messages, and ``random`` is missing.
    """
    alpha = flow.alpha(step.to(torch.float64), num_steps).to(prediction.dtype)
    return num_steps * prediction.message_kl(x, alpha, random).flatten(1).mean(1)


def reconstruction_loss(prediction: OutputDistribution, x: Tensor) -> Tensor:
    """Cost of the data given everything that was sent: -ln p(x) of the prediction for the flow's state at t = 1.

    Args:
        prediction: for the flow's state at t = 1.
        x: data (B, ...), int64 class numbers or floats.
    """
    return -prediction.log_prob(x).flatten(1).mean(1)


def bits(nats: Tensor) -> Tensor:
    """Nats as bits."""
    return nats / math.log(2)
