"""Proximal policy optimisation of answers: KL, rewards of tokens, advantages, losses.

Shape suffixes: R samples, N answer tokens, V vocabulary. Log-probabilities and KL are in nats. ``mask_RN``, bool, has the tokens
that count; values elsewhere change nothing, even if they are not finite. Computed in float32, or in float64 if given that.

Sources: Schulman et al., "Proximal policy optimization algorithms", arXiv 1707.06347; the same, "High-dimensional continuous
control using generalized advantage estimation", arXiv 1506.02438; Schulman, "Approximating KL divergence" (k1, k2, k3);
Ouyang et al. (InstructGPT), arXiv 2203.02155.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ImportanceMode",
    "KLCoefficient",
    "KLKind",
    "KLMeasure",
    "entropy",
    "generalized_advantages",
    "importance_weights",
    "kl_estimate",
    "kl_sums",
    "masked_sum",
    "policy_loss",
    "shaped_score",
    "token_mean",
    "token_rewards",
    "value_loss",
    "whiten",
]

KLKind = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]
KLMeasure = Literal["sequence", "token"]
ImportanceMode = Literal["truncate", "mask"]

_MAX_LOG_RATIO = 20.0


def _accurate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _masked(x_RN: Tensor, mask_RN: Tensor) -> Tensor:
    return _accurate(x_RN).masked_fill(~mask_RN, 0)


def masked_sum(x_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """Sum over the tokens of the mask."""
    return _masked(x_RN, mask_RN).sum()


def token_mean(loss_RN: Tensor, count: Tensor | float) -> Tensor:
    """Sum of losses, which are 0 where no token counts, divided by the number of tokens that count in the whole minibatch.

    With ``count`` over all ranks and micro-batches, parts add up to the mean however the minibatch is divided; 0 is taken as 1.
    """
    return loss_RN.sum() / torch.as_tensor(count).clamp(min=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each distribution, (..., V) finite logits to (...)."""
    logp = _accurate(logits).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def kl_estimate(logp: Tensor, reference: Tensor, kind: KLKind = "k1", clamp: float | None = None) -> Tensor:
    """Estimate of KL(policy || reference) from each token that the policy drew.

    With ``d = logp - reference``: k1 ``d``, k2 ``d^2 / 2``, k3 ``exp(-d) - 1 + d``, abs ``|d|``. k1 and k3 have the
    expectation of the KL, but as a loss not that of its gradient (k1's gradient has the expectation 0). k2's gradient has.
    "k1+" and "k3+" are straight-through: the values of k1 and k3, the gradient of k2.

    Args:
        logp: Log-probabilities under the policy.
        reference: The same under the reference; gets no gradient.
        kind: Estimator; the exponent of k3 is kept within 20.
        clamp: Bound of the absolute value, where the gradient stops (not that of "k1+" and "k3+"); None: no bound.
    """
    d = _accurate(logp) - _accurate(reference.detach())
    k2 = 0.5 * d.square()
    k3 = (-d).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).expm1() + d
    values = {"k1": d, "k2": k2, "k3": k3, "abs": d.abs()}
    if kind not in get_args(KLKind):
        raise ValueError(f"kl_estimate: kind={kind!r} must be one of {', '.join(get_args(KLKind))}.")
    value = values[kind.removesuffix("+")]
    if clamp is not None:
        value = value.clamp(-clamp, clamp)
    return value.detach() + (k2 - k2.detach()) if kind.endswith("+") else value


def kl_sums(kl_RN: Tensor, mask_RN: Tensor, measure: KLMeasure = "sequence") -> tuple[Tensor, Tensor]:
    """Sum over sequences of their KL, and number of sequences with tokens; both add up over parts of a rollout.

    The KL of a sequence is the sum of its tokens' estimates (``measure`` sequence, as in TRL), or the mean (token, verl).
    """
    kl_R, length_R = _masked(kl_RN, mask_RN).sum(1), mask_RN.sum(1)
    if measure == "token":
        kl_R = kl_R / length_R.clamp(min=1)
    return kl_R.sum(), (length_R > 0).sum()


def shaped_score(
    score_R: Tensor, score_clip: float | None = None, ended_R: Tensor | None = None, missing_eos_penalty: float | None = None
) -> Tensor:
    """Scores (R,) within ``score_clip`` of 0, then less a penalty for answers that have no end by ``ended_R``, bool.

    The penalty comes last, so that an answer at the lower bound is punished too. None: no bound, no penalty.
    """
    score_R = _accurate(score_R)
    if score_clip is not None:
        score_R = score_R.clamp(-score_clip, score_clip)
    if missing_eos_penalty is None:
        return score_R
    if ended_R is None:
        raise ValueError(f"shaped_score: missing_eos_penalty={missing_eos_penalty} needs ended_R, whether answers end.")
    return score_R - missing_eos_penalty * (~ended_R).to(score_R.dtype)


def token_rewards(score_R: Tensor, kl_RN: Tensor, mask_RN: Tensor, beta: float, per_length: bool = False) -> Tensor:
    """Reward of each token, ``-beta kl``, and the score at the last one, (R, N) without gradient; 0 outside the mask.

    Args:
        score_R: Rewards of whole answers, see `shaped_score`.
        kl_RN: Estimates of the KL, 0 where a position is rewarded but has no token, see `Convention.reward_mask`.
        mask_RN: Positions that are rewarded, from the first one; a row may have none.
        beta: Weight of the KL.
        per_length: Divide the KL by the number of the row's positions.
    """
    length_R1 = mask_RN.sum(1, keepdim=True)
    reward_RN = _masked(kl_RN.detach(), mask_RN) * -beta
    if per_length:
        reward_RN = reward_RN / length_R1.clamp(min=1)
    score_R1 = score_R.detach()[:, None].masked_fill(length_R1 == 0, 0)
    return reward_RN.scatter_add(1, (length_R1 - 1).clamp(min=0), score_R1.to(reward_RN.dtype))


def generalized_advantages(
    reward_RN: Tensor, value_RN: Tensor, mask_RN: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages (GAE) and returns ``A + V``, both (R, N) without gradient, 0 outside the mask; nothing is whitened.

    ``A_k = d_k + gamma lam A_{k+1}`` with ``d_k = r_k + gamma V_{k+1} - V_k``, where ``V_k`` is the value of the state before
    token k; A and V are 0 after the last position of a row, whose mask begins at the first one.
    """
    value_RN = _masked(value_RN.detach(), mask_RN)
    delta_RN = _masked(reward_RN.detach(), mask_RN) + gamma * F.pad(value_RN[:, 1:], (0, 1)) - value_RN
    advantages = [torch.zeros_like(delta_RN[:, 0])]
    for delta_R in reversed(delta_RN.unbind(1)):
        advantages.append(delta_R + gamma * lam * advantages[-1])
    advantage_RN = torch.stack(advantages[:0:-1], 1)
    return advantage_RN, advantage_RN + value_RN


def whiten(x_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """``(x - mean) / sqrt(variance + 1e-8)`` over the tokens of the mask, 0 outside; the variance is unbiased.

    A single token becomes 0. All tokens of the scope are needed at once: parts cannot be whitened one by one.
    """
    count = mask_RN.sum()
    centred_RN = _masked(_accurate(x_RN) - masked_sum(x_RN, mask_RN) / count.clamp(min=1), mask_RN)
    variance = centred_RN.square().sum() / (count - 1).clamp(min=1)
    return centred_RN * (variance + 1e-8).rsqrt()


def _log_ratio(logp_RN: Tensor, other_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """``logp - other``, within 20 of 0, and 0 outside the mask."""
    return _masked(_accurate(logp_RN) - _accurate(other_RN.detach()), mask_RN).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def importance_weights(
    proximal_logp_RN: Tensor, behaviour_logp_RN: Tensor, mask_RN: Tensor, cap: float = 2.0, mode: ImportanceMode = "truncate"
) -> Tensor:
    """Weight ``exp(proximal - behaviour)`` of each token, (R, N) without gradient, for samples of older weights.

    Source: decoupled PPO, Hilton et al., arXiv 2110.00641, as used by AReaL, arXiv 2505.24298.

    Args:
        proximal_logp_RN: Log-probabilities under the weights at the start of the rollout's training.
        behaviour_logp_RN: The same under the weights that generated.
        mask_RN: The weight is 1 elsewhere.
        cap: Largest weight.
        mode: Weights above the cap become the cap, or 0.
    """
    weight_RN = _log_ratio(proximal_logp_RN.detach(), behaviour_logp_RN, mask_RN).exp()
    return weight_RN.clamp(max=cap) if mode == "truncate" else weight_RN.masked_fill(weight_RN > cap, 0)


def policy_loss(
    logp_RN: Tensor,
    old_logp_RN: Tensor,
    advantage_RN: Tensor,
    mask_RN: Tensor,
    clip: float = 0.2,
    dual_clip: float | None = None,
    weight_RN: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))`` of each token, see `token_mean`, and sums for reports.

    Args:
        logp_RN: Log-probabilities under the policy, with gradient.
        old_logp_RN: The same under the policy at the start; the ratio is ``exp(logp - old_logp)``, its exponent within 20.
        advantage_RN: Advantages.
        mask_RN: Tokens that count.
        clip: Distance from 1 beyond which a ratio gains nothing.
        dual_clip: Largest ratio that counts where the advantage is negative, above 1 (Ye et al., arXiv 1912.09729). None: none.
        weight_RN: Factor of each loss, see `importance_weights`.

    Returns:
        Losses (R, N), 0 outside the mask, and sums over tokens: ``clipped``, tokens whose loss is that of a clipped ratio;
        ``old_kl``, the estimate k3 of KL(old || policy); ``ratio``.
    """
    log_ratio_RN = _log_ratio(logp_RN, old_logp_RN, mask_RN)
    ratio_RN = log_ratio_RN.exp()
    advantage_RN = _masked(advantage_RN.detach(), mask_RN)
    plain_RN = -advantage_RN * ratio_RN
    clipped_RN = -advantage_RN * ratio_RN.clamp(1 - clip, 1 + clip)
    loss_RN = torch.maximum(plain_RN, clipped_RN)
    if dual_clip is not None:
        loss_RN = torch.where(advantage_RN < 0, torch.minimum(loss_RN, -dual_clip * advantage_RN), loss_RN)
    if weight_RN is not None:
        loss_RN = loss_RN * weight_RN.detach()
    with torch.no_grad():
        statistics = {
            "clipped": (clipped_RN > plain_RN).sum().to(ratio_RN.dtype),
            "old_kl": (log_ratio_RN.expm1() - log_ratio_RN).sum(),
            "ratio": masked_sum(ratio_RN, mask_RN),
        }
    return loss_RN, statistics


def value_loss(
    value_RN: Tensor, old_value_RN: Tensor, returns_RN: Tensor, mask_RN: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the larger squared error of each value and of the value within ``clip`` of the old one, (R, N), see `token_mean`.

    Returns:
        Losses, 0 outside the mask; ``clipped``, the number of states whose loss is that of a clipped value.
    """
    value_RN, old_RN, returns_RN = (_masked(x, mask_RN) for x in (value_RN, old_value_RN.detach(), returns_RN.detach()))
    plain_RN = (value_RN - returns_RN).square()
    clipped_RN = (old_RN + (value_RN - old_RN).clamp(-clip, clip) - returns_RN).square()
    return 0.5 * torch.maximum(plain_RN, clipped_RN), {"clipped": (clipped_RN > plain_RN).sum().to(plain_RN.dtype)}


class KLCoefficient:
    """Weight of the KL: it stays, or follows a target, ``beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) samples / horizon)``.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2.

    Args:
        coefficient: Weight at the start, above 0 if it adapts.
        target: KL to reach, in nats; None: the weight stays.
        horizon: Samples after which a KL far from the target has changed the weight by about 20 percent. A rollout must have
            fewer than five horizons, so that the weight stays positive.

    Raises:
        ValueError: If a number is not positive; in `update`, if a rollout is too large.
    """

    def __init__(self, coefficient: float, target: float | None = None, horizon: float = 10_000.0) -> None:
        if target is not None and not all(0 < x < math.inf for x in (coefficient, target, horizon)):
            raise ValueError(f"kl: coefficient={coefficient}, target={target} and horizon={horizon} must all be above 0.")
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Adapt to the mean KL of a rollout's samples, see `kl_sums`."""
        if self.target is None:
            return
        if samples >= 5 * self.horizon:
            raise ValueError(f"kl: horizon={self.horizon} must be above a fifth of the {samples} samples of a rollout.")
        self.coefficient *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * samples / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """State as plain data; a weight that stays has none, as it is configured."""
        return {} if self.target is None else {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, unless the weight stays."""
        if self.target is not None:
            self.coefficient = float(state.get("coefficient", self.coefficient))
