"""Head of binary data: one logit for each element."""

import torch
from torch import Tensor

from zoo.bfn.discrete_flow import DiscreteFlow
from zoo.bfn.flow import Flow
from zoo.bfn.heads.categorical import Categorical, CategoricalHead

__all__ = ["BernoulliHead"]


class BernoulliHead(CategoricalHead):
    """Discrete data of two classes: the network gives one logit, that of class 1.

    Its sign is opposite to that of the network's input, 2 p_0 - 1, as published: an input near 1 says class *0*, a
    large output class *1*. Source: arXiv 2308.07037, section 6.

    Args:
        receiver: see `CategoricalHead`.
        message_samples: messages drawn to estimate the loss of finitely many messages.

    Raises:
        ValueError: unknown receiver, or no messages.
    """

    def check(self, flow: Flow) -> None:
        """Refuse flows of other data, and of more classes than two.

        Raises:
            ValueError: saying in one sentence what does not fit.
        """
        super().check(flow)
        assert isinstance(flow, DiscreteFlow)
        if flow.num_classes != 2:
            raise ValueError(
                f"BernoulliHead tells two classes apart, but the flow has num_classes={flow.num_classes}:"
                " use CategoricalHead, or a flow of 2 classes."
            )

    def num_outputs_for(self, flow: Flow) -> int:
        """One logit for each element."""
        return 1

    def __call__(self, output: Tensor, state: Tensor, t: Tensor | float, flow: Flow) -> Categorical:
        """See `Head`."""
        logit = output.to(state.dtype).reshape(state.shape[:-1])
        return Categorical(torch.stack((torch.zeros_like(logit), logit), -1), self.receiver, self.message_samples)
