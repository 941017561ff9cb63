"""Head of discrete data: a probability for each class."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zoo.base.random import SampleRandom
from zoo.bfn.discrete_flow import DiscreteFlow
from zoo.bfn.flow import Flow, expand_time
from zoo.bfn.heads.head import Head, OutputDistribution
from zoo.bfn.heads.messages import check_message_samples, mean_over_messages, require_random

__all__ = ["Categorical", "CategoricalHead", "Receiver"]

#: Predicted distribution of a message: of all its K numbers together, or of each as if they were independent.
Receiver = Literal["joint", "marginal"]


@dataclass
class Categorical(OutputDistribution):
    """A probability for each of K classes.

    Args:
        logits: ln probabilities up to a constant (B, ..., K).
        receiver: see `CategoricalHead`.
        message_samples: see `CategoricalHead`.
    """

    logits: Tensor
    receiver: Receiver = "joint"
    message_samples: int = 10

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the probabilities."""
        return self.logits.dtype

    def mean(self) -> Tensor:
        """The probabilities."""
        return self.logits.softmax(-1)

    def mode(self) -> Tensor:
        """Probability 1 for the most probable class."""
        return self._certain(self.logits.argmax(-1))

    def sample(self, random: SampleRandom, name: str) -> Tensor:
        """Probability 1 for a class drawn from the probabilities."""
        cumulative = self.mean().cumsum(-1)
        uniform = random.uniform(name, tuple(cumulative.shape[1:-1]), cumulative.dtype)
        # Scaled by the rounded total, no draw lies beyond the last class; `<=` passes over classes of probability 0.
        drawn = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)
        return self._certain(drawn.clamp_(max=cumulative.shape[-1] - 1))

    def log_prob(self, x: Tensor) -> Tensor:
        """ln probability of each element's class."""
        return _pick(self.logits.log_softmax(-1), x)

    def message_kl(self, x: Tensor, alpha: Tensor, random: SampleRandom | None = None) -> Tensor:
        """E_y[ln p_sender(y) - ln p_receiver(y)], y ~ N(alpha (K e_x - 1), alpha K I), estimated by drawn messages."""
        num_classes = self.logits.shape[-1]
        energy = expand_time(alpha.to(self.dtype), self.logits) * num_classes  # alpha K
        log_prob, truth = self.logits.log_softmax(-1), self._certain(x)
        if self.receiver == "joint":
            # Up to a constant that all classes share, ln N(y; alpha (K e_k - 1), alpha K I) is y_k.
            def log_ratio(noise: Tensor, log_prob: Tensor) -> Tensor:
                message = energy * truth + energy.sqrt() * noise
                return _pick(message, x) - (log_prob + message).logsumexp(-1)

        else:
            # Coordinate k has mean alpha (K - 1) with probability p_k and -alpha otherwise; their log-likelihood ratio is y.
            def log_ratio(noise: Tensor, log_prob: Tensor) -> Tensor:
                message = energy * (truth - 0.5) + energy.sqrt() * noise
                return _pick(message, x) - torch.logaddexp(_log_of_others(log_prob), log_prob + message).sum(-1)

        return mean_over_messages(log_ratio, log_prob, self.message_samples, require_random(random))

    def _certain(self, index: Tensor) -> Tensor:
        return one_hot(index, self.logits.shape[-1]).to(self.dtype)


class CategoricalHead(Head):
    """Discrete data: the network gives the logits of all classes.

    Source: arXiv 2308.07037, section 6.

    Args:
        receiver: what the loss of finitely many messages takes as the predicted distribution of a message in R^K.
            ``joint``: the mixture over the classes, as the framework defines it. ``marginal``: the product of that
            mixture's K marginals, with which the published losses were computed: higher for few, strong messages.
        message_samples: messages drawn to estimate that loss.

    Raises:
        ValueError: unknown receiver, or no messages.
    """

    flow_type = DiscreteFlow

    def __init__(self, receiver: Receiver = "joint", message_samples: int = 10) -> None:
        if receiver not in get_args(Receiver):
            raise ValueError(f"{type(self).__name__}: receiver={receiver!r} must be one of {get_args(Receiver)}.")
        check_message_samples(message_samples, type(self).__name__)
        self.receiver = receiver
        self.message_samples = message_samples

    def num_outputs_for(self, flow: Flow) -> int:
        """One logit for each class."""
        return self.num_levels(flow)

    def num_levels(self, flow: Flow) -> int:
        """The flow's number of classes."""
        assert isinstance(flow, DiscreteFlow)
        return flow.num_classes

    def __call__(self, output: Tensor, state: Tensor, t: Tensor | float, flow: Flow) -> Categorical:
        """See `Head`."""
        return Categorical(output.reshape(state.shape).to(state.dtype), self.receiver, self.message_samples)


def _log_of_others(log_prob: Tensor) -> Tensor:
    """ln(1 - p) of each class (B, ..., K), accurate also where p is close to 1: there it is the sum over all others."""
    top = one_hot(log_prob.argmax(-1), log_prob.shape[-1]).bool()
    rest = log_prob.masked_fill(top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(top, rest, torch.log1p(-log_prob.masked_fill(top, -1.0).exp()))


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """The value (...) at each index (...) of the last axis of (..., K)."""
    return values.gather(-1, index[..., None])[..., 0]
