"""Passes of training and scoring over whole sequences, each as a module that a back end can wrap.

Shape suffixes: B samples, P prompt ids, N answer tokens, S = P + N, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from zoo.lm.backbone import Backbone
from zoo.rlhf.ppo import entropy

__all__ = ["PolicyNetwork", "ValueNetwork"]


class _Whole(nn.Module):
    """Base of networks whose divided weights can be gathered around any function."""

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that uses the weights."""
        return function(*args)


class PolicyNetwork(_Whole):
    """Log-probabilities of answers under a language model.

    Args:
        backbone: The model.
        temperature: Divisor of the logits, that of the draws.
    """

    def __init__(self, backbone: Backbone, temperature: float = 1.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.temperature = temperature or 1.0

    @override
    def forward(self, ids_BS: Tensor, mask_BS: Tensor, num_tokens: int, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probability in nats, float32 or wider, and entropy of each of the last tokens, (B, N) both.

        Args:
            ids_BS: Prompts, padded on the left, with their answers.
            mask_BS: 0 for padding.
            num_tokens: N.
            with_entropy: Whether the entropy is wanted; else it is 0.
        """
        hidden_BND = self.backbone(ids_BS, mask_BS)[:, -num_tokens - 1 : -1]
        logits_BNV = self.backbone.logits(hidden_BND)
        logits_BNV = logits_BNV.to(torch.promote_types(logits_BNV.dtype, torch.float32)) / self.temperature
        token_BN = ids_BS[:, -num_tokens:]
        logp_BN = logits_BNV.gather(-1, token_BN[..., None]).squeeze(-1) - logits_BNV.logsumexp(-1)
        return logp_BN, entropy(logits_BNV) if with_entropy else torch.zeros_like(logp_BN)


class ValueNetwork(_Whole):
    """Values of the states before each token of an answer.

    Args:
        backbone: A model with a scalar head.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @override
    def forward(self, ids_BS: Tensor, mask_BS: Tensor, num_tokens: int) -> Tensor:
        """(B, N), float32 or wider; arguments as of `PolicyNetwork`."""
        value_BS = self.backbone.values(ids_BS, mask_BS)
        value_BN = value_BS[:, -num_tokens - 1 : -1].contiguous()  # a view would be one of what a back end gives back
        return value_BN.to(torch.promote_types(value_BS.dtype, torch.float32))
