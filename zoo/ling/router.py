"""The router: which experts a token visits, its losses, and its stochastic warm-up.

Shape suffixes: N tokens, D width, E experts, k experts of a token.
Source: arXiv 2503.05139, section 3; balance loss as in Megatron-LM, z-loss as in ST-MoE.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Router",
    "RouterStatistics",
    "Routing",
    "assignment_counts",
    "balance_loss",
    "layer_losses",
    "router_statistics",
    "warm_up_logits",
    "z_loss",
]


class Routing(NamedTuple):
    """Experts, weights and scores of N tokens.

    Attributes:
        ids_Nk: experts of each token, by falling probability.
        weights_Nk: weights of their sum, float32.
        logits_NE: scores as the weight gives them, float32.
        probs_NE: probabilities that were chosen from (of the noisy scores during the warm-up), float32.
    """

    ids_Nk: Tensor
    weights_Nk: Tensor
    logits_NE: Tensor
    probs_NE: Tensor


def balance_loss(probs_NE: Tensor, ids_Nk: Tensor, valid_N: Tensor | None = None, load_E: Tensor | None = None) -> Tensor:
    """``E sum_e f_e P_e``: f the share of assignments to expert e (no gradient), P the mean probability; 1 at balance.

    Args:
        probs_NE: probabilities.
        ids_Nk: chosen experts.
        valid_N: bool, tokens that count; None: all.
        load_E: assignments to each expert, counted elsewhere (over all ranks); None: those of ``ids_Nk``.
    """
    E = probs_NE.shape[-1]
    count_E = assignment_counts(ids_Nk, E, valid_N) if load_E is None else load_E
    share_E = count_E.to(probs_NE.dtype) / count_E.sum().clamp(min=1)
    return E * (share_E * masked_mean(probs_NE, valid_N)).sum()


def z_loss(logits_NE: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Mean of the squared ``logsumexp`` of the logits; ``(ln E)^2`` for zero logits."""
    return masked_mean(logits_NE.logsumexp(-1).square(), valid_N)


def assignment_counts(ids_Nk: Tensor, num_experts: int, valid_N: Tensor | None = None) -> Tensor:
    """Number of valid assignments of each expert, (E,) int64."""
    weight_Nk = torch.ones_like(ids_Nk) if valid_N is None else valid_N[:, None].expand_as(ids_Nk).to(torch.int64)
    zero_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_Nk.device)
    return zero_E.scatter_add_(0, ids_Nk.reshape(-1), weight_Nk.reshape(-1))


def masked_mean(x: Tensor, valid_N: Tensor | None) -> Tensor:
    """Mean over the first axis of the valid tokens; 0 if there is none."""
    if valid_N is None:
        return x.mean(0) if len(x) else x.sum(0)
    weight = valid_N.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return (x * weight).sum(0) / weight.sum().clamp(min=1)


def warm_up_logits(logits: Tensor, noise: Tensor, share: float | Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``a s + (1 - a)(mu + sigma eps)``, a = ``share`` of the learned scores: equation 3 of the report.

    Args:
        logits: s.
        noise: eps, standard normal, of the same shape.
        share: a in [0, 1].
        mean: running mean mu.
        std: running standard deviation sigma.
    """
    return share * logits + (1 - share) * (mean + std * noise)


class RouterStatistics(NamedTuple):
    """Statistics of the routers of L layers on a micro-batch, without gradient.

    Attributes:
        counts: (L, E) int64, valid assignments to each expert.
        mean_probability: (L, E), mean of the probabilities over the valid tokens.
        logit_mean: (L,), mean of the scores over tokens and experts.
        logit_square: (L,), mean of their squares.
    """

    counts: Tensor
    mean_probability: Tensor
    logit_mean: Tensor
    logit_square: Tensor

    @property
    def logit_std(self) -> Tensor:
        """(L,), standard deviation of the scores."""
        return (self.logit_square - self.logit_mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def router_statistics(routings: Sequence[Routing], valid_N: Tensor | None = None) -> RouterStatistics:
    """Statistics of the layers' routings over the valid tokens.

    Args:
        routings: one a layer.
        valid_N: bool, tokens that count; None: all.
    """
    num_experts = routings[0].probs_NE.shape[-1]
    return RouterStatistics(
        torch.stack([assignment_counts(routing.ids_Nk, num_experts, valid_N) for routing in routings]),
        torch.stack([masked_mean(routing.probs_NE, valid_N) for routing in routings]),
        torch.stack([masked_mean(routing.logits_NE.mean(-1), valid_N) for routing in routings]),
        torch.stack([masked_mean(routing.logits_NE.square().mean(-1), valid_N) for routing in routings]),
    )


def layer_losses(routings: Sequence[Routing], load_LE: Tensor, valid_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Balance loss and z-loss of each layer, (L,) each.

    Args:
        routings: One a layer.
        load_LE: Assignments to each expert that balance is judged by.
        valid_N: Bool, tokens that count; None: all.
    """
    aux = [
        balance_loss(routing.probs_NE, routing.ids_Nk, valid_N, load_E)
        for routing, load_E in zip(routings, load_LE.unbind(), strict=True)
    ]
    return torch.stack(aux), torch.stack([z_loss(routing.logits_NE, valid_N) for routing in routings])


class Router(nn.Module):
    """Scores ``W x``, softmax in float32, the k largest; weights divided by their sum if ``normalize`` and k > 1.

    During the stochastic warm-up (`forward` with noise) the scores are mixed with balanced noise of the same mean and
    standard deviation, kept as running averages in ``running_mean`` and ``running_std``, float32 also where weights are of half
    precision. They change in `update` alone, which the training calls once per applied step, so that a skipped step leaves no
    trace.

    Args:
        num_experts: E.
        hidden_size: D.
        num_experts_per_tok: k.
        normalize: whether weights sum to one.
        accurate: compute scores in float32 whatever the weights' type; otherwise in the tokens' type, as published.
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self, num_experts: int, hidden_size: int, num_experts_per_tok: int, normalize: bool = True, accurate: bool = True
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.normalize = normalize
        self.accurate = accurate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("running_mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("running_std", torch.ones((), dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as any module, but keep the averages in float32 at least: half precision would lose small changes."""
        averages = {"running_mean": self.running_mean, "running_std": self.running_std}
        super()._apply(fn, recurse)
        for name, exact in averages.items():
            converted = getattr(self, name)
            if converted.dtype.itemsize < exact.dtype.itemsize == 4:
                setattr(self, name, exact.to(converted.device))
        return self

    def forward(self, x_ND: Tensor, noise_NE: Tensor | None = None, share: float | Tensor = 1.0) -> Routing:
        """Choose experts.

        Args:
            x_ND: tokens.
            noise_NE: standard normal numbers of the warm-up; None: no warm-up.
            share: share of the learned scores in the warm-up.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            if self.accurate:
                dtype = torch.promote_types(x_ND.dtype, torch.float32)
                logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype))
            else:
                logits_NE = F.linear(x_ND.to(self.weight.dtype), self.weight)
                logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
            scores_NE = logits_NE
            if noise_NE is not None:
                scores_NE = warm_up_logits(logits_NE, noise_NE, share, self.running_mean, self.running_std)
            probs_NE = scores_NE.softmax(-1)
            weights_Nk, ids_Nk = probs_NE.topk(self.num_experts_per_tok, dim=-1)
            if self.normalize and self.num_experts_per_tok > 1:
                weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        return Routing(ids_Nk, weights_Nk, logits_NE, probs_NE)

    @torch.no_grad()
    def update(self, mean: Tensor, std: Tensor, momentum: float, first: bool) -> None:
        """Take a step's mean and standard deviation into the running ones.

        Args:
            mean: mean of the step's scores.
            std: their standard deviation.
            momentum: weight of the old average.
            first: whether there is no old average yet.
        """
        weight = 1.0 if first else 1 - momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_std.lerp_(std.to(self.running_std.dtype), weight)
