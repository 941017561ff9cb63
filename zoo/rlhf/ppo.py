"""Proximal policy optimisation of answers: KL, rewards of tokens, advantages, losses.

Shape suffixes: R samples, N answer tokens, V vocabulary.

All functions compute in float32 at least, whatever they are given, and in float64 if given that. Values where a mask is False
change nothing, even if they are not finite.

Sources: Schulman et al., "Proximal policy optimization algorithms", arXiv 1707.06347; the same, "High-dimensional continuous
control using generalized advantage estimation", arXiv 1506.02438; Schulman, "Approximating KL divergence" (k1, k2, k3);
Ouyang et al. (InstructGPT), arXiv 2203.02155.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "ImportanceMode",
    "KLKind",
    "KLMeasure",
    "divisor",
    "entropy",
    "generalized_advantages",
    "importance_weights",
    "kl_estimate",
    "kl_sums",
    "masked_sum",
    "policy_loss",
    "policy_token_losses",
    "shaped_score",
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


def masked_sum(x_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """Sum over the tokens of the mask."""
    return _accurate(x_RN).masked_fill(~mask_RN, 0).sum()


def divisor(count: Tensor | float) -> Tensor | float:
    """Number to divide a sum by: at least 1, so that a minibatch without tokens has the loss 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _log_ratio(logp_RN: Tensor, other_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """``logp - other``, within 20 nats of 0, and 0 outside the mask."""
    difference_RN = (_accurate(logp_RN) - _accurate(other_RN)).masked_fill(~mask_RN, 0)
    return difference_RN.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each distribution.

    Args:
        logits: (..., V), finite.
    """
    logp = _accurate(logits).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def kl_estimate(logp: Tensor, reference: Tensor, kind: KLKind = "k1", clamp: float | None = None) -> Tensor:
    """Estimate of KL(policy || reference) in nats from each token that the policy drew.

    With ``d = logp - reference``: k1 ``d``, k2 ``d^2 / 2``, k3 ``exp(-d) - 1 + d``, abs ``|d|``. k1 and k3 have the
    expectation of the KL, but their gradients in a loss do not have that of its gradient (k1's has the expectation 0). k2's
    has. "k1+" and "k3+" are straight-through: their values are those of k1 and k3, their gradient is k2's.

    Args:
        logp: Log-probabilities under the policy, in nats.
        reference: The same under the reference, without gradient.
        kind: Estimator.
        clamp: Bound of the estimate's absolute value, which stops its gradient beyond; not that of "k1+" and "k3+". None: no
            bound. The exponent of k3 is always kept within 20.
    """
    d = _accurate(logp) - _accurate(reference.detach())
    k2 = 0.5 * d.square()
    match kind.removesuffix("+"):
        case "k1":
            value = d
        case "k2":
            value = k2
        case "k3":
            value = (-d).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).expm1() + d
        case "abs":
            value = d.abs()
        case _:
            raise ValueError(f"kl_estimate: kind={kind!r} must be one of {', '.join(get_args(KLKind))}.")
    if clamp is not None:
        value = value.clamp(-clamp, clamp)
    return value.detach() + (k2 - k2.detach()) if kind.endswith("+") else value


def kl_sums(kl_RN: Tensor, mask_RN: Tensor, measure: KLMeasure = "sequence") -> tuple[Tensor, Tensor]:
    """Sum of the KL and the number to divide it by, each of which can be added up over parts of a rollout.

    Args:
        kl_RN: Estimates, see `kl_estimate`.
        mask_RN: bool, tokens that count.
        measure: Sum of a sequence's tokens, mean over sequences (TRL); or mean over tokens (verl).
    """
    count = mask_RN.any(1).sum() if measure == "sequence" else mask_RN.sum()
    return masked_sum(kl_RN, mask_RN), count


def shaped_score(
    score_R: Tensor, score_clip: float | None = None, ended_R: Tensor | None = None, missing_eos_penalty: float | None = None
) -> Tensor:
    """Scores within ``score_clip`` of 0, then less a penalty for answers without an end, (R,).

    The penalty comes last, so that an answer at the lower bound is punished too.

    Args:
        score_R: Rewards of whole answers.
        score_clip: Bound; None: none.
        ended_R: bool, whether an answer has an end; needed with a penalty.
        missing_eos_penalty: Amount to subtract; None: none.
    """
    score_R = _accurate(score_R)
    if score_clip is not None:
        score_R = score_R.clamp(-score_clip, score_clip)
    if missing_eos_penalty is not None:
        if ended_R is None:
            raise ValueError(f"shaped_score: missing_eos_penalty={missing_eos_penalty} needs ended_R, whether answers end.")
        score_R = score_R - missing_eos_penalty * (~ended_R).to(score_R.dtype)
    return score_R


def token_rewards(
    score_R: Tensor,
    kl_RN: Tensor,
    mask_RN: Tensor,
    beta: float,
    score_clip: float | None = None,
    ended_R: Tensor | None = None,
    missing_eos_penalty: float | None = None,
    per_length: bool = False,
) -> Tensor:
    """Reward of each token, ``-beta kl``, and the score at the last one, (R, N) without gradient; 0 outside the mask.

    Args:
        score_R: Rewards of whole answers, see `shaped_score` for ``score_clip``, ``ended_R`` and ``missing_eos_penalty``.
        kl_RN: Estimates of the KL, 0 where a position is rewarded but has no token, see `Convention.reward_mask`.
        mask_RN: bool, positions that are rewarded; a row may have none.
        beta: Weight of the KL.
        score_clip: Bound of the scores.
        ended_R: bool, whether an answer has an end.
        missing_eos_penalty: Penalty for an answer without.
        per_length: Divide the KL by the number of the row's positions.
    """
    score_R = shaped_score(score_R.detach(), score_clip, ended_R, missing_eos_penalty)
    length_R = mask_RN.sum(1)
    reward_RN = _accurate(kl_RN.detach()).masked_fill(~mask_RN, 0) * -beta
    if per_length:
        reward_RN = reward_RN / length_R.clamp(min=1)[:, None]
    last_R = (length_R - 1).clamp(min=0)
    put_R = score_R.masked_fill(length_R == 0, 0).to(reward_RN.dtype)
    return reward_RN.scatter_add(1, last_R[:, None], put_R[:, None])


def generalized_advantages(
    reward_RN: Tensor, value_RN: Tensor, mask_RN: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages (GAE) and returns ``A + V``, both (R, N) without gradient, 0 outside the mask; nothing is whitened.

    ``A_k = d_k + gamma lam A_{k+1}`` with ``d_k = r_k + gamma V_{k+1} - V_k``; after the last position of a row both are 0.

    Args:
        reward_RN: Rewards.
        value_RN: Value of the state before each token.
        mask_RN: bool, positions from the first to the last of each row.
        gamma: Discount.
        lam: Decay of the differences; 0: one step, 1: all rewards that follow.
    """
    reward_RN = _accurate(reward_RN.detach()).masked_fill(~mask_RN, 0)
    value_RN = _accurate(value_RN.detach()).masked_fill(~mask_RN, 0)
    dtype = torch.promote_types(reward_RN.dtype, value_RN.dtype)
    advantage_RN = reward_RN.new_zeros(reward_RN.shape, dtype=dtype)
    next_value_R = next_advantage_R = reward_RN.new_zeros(len(reward_RN), dtype=dtype)
    for k in reversed(range(reward_RN.shape[1])):
        delta_R = reward_RN[:, k] + gamma * next_value_R - value_RN[:, k]
        next_advantage_R = (delta_R + gamma * lam * next_advantage_R).masked_fill(~mask_RN[:, k], 0)
        advantage_RN[:, k] = next_advantage_R
        next_value_R = value_RN[:, k]
    return advantage_RN, advantage_RN + value_RN


def whiten(x_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """``(x - mean) / sqrt(variance + 1e-8)`` over the tokens of the mask, 0 outside; the variance is unbiased.

    A single token becomes 0. All tokens of the scope are needed at once: parts cannot be whitened one by one.
    """
    x_RN = _accurate(x_RN)
    count = mask_RN.sum()
    centred_RN = (x_RN - masked_sum(x_RN, mask_RN) / count.clamp(min=1)).masked_fill(~mask_RN, 0)
    variance = centred_RN.square().sum() / (count - 1).clamp(min=1)
    return centred_RN * (variance + 1e-8).rsqrt()


def importance_weights(
    proximal_logp_RN: Tensor, behaviour_logp_RN: Tensor, mask_RN: Tensor, cap: float = 2.0, mode: ImportanceMode = "truncate"
) -> Tensor:
    """Weight ``exp(proximal - behaviour)`` of each token, (R, N) without gradient, for samples of older weights.

    Source: decoupled PPO, Hilton et al., arXiv 2110.00641, as used by AReaL, arXiv 2505.24298.

    Args:
        proximal_logp_RN: Log-probabilities under the weights at the start of the rollout's training.
        behaviour_logp_RN: The same under the weights that generated.
        mask_RN: bool, tokens that count; 1 elsewhere.
        cap: Largest weight.
        mode: Weights above the cap become the cap, or 0.
    """
    weight_RN = _log_ratio(proximal_logp_RN.detach(), behaviour_logp_RN.detach(), mask_RN).exp()
    return weight_RN.clamp(max=cap) if mode == "truncate" else weight_RN.masked_fill(weight_RN > cap, 0)


def policy_token_losses(
    logp_RN: Tensor,
    old_logp_RN: Tensor,
    advantage_RN: Tensor,
    mask_RN: Tensor,
    clip: float = 0.2,
    dual_clip: float | None = None,
    weight_RN: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))`` of each token, 0 outside the mask, and sums for reports.

    Args:
        logp_RN: Log-probabilities under the policy, with gradient.
        old_logp_RN: The same under the policy at the start of the rollout; the ratio is the exponential of the difference,
            which is kept within 20.
        advantage_RN: Advantages.
        mask_RN: bool, tokens that count.
        clip: Distance from 1 beyond which a ratio gains nothing.
        dual_clip: Largest ratio that counts where the advantage is negative, above 1 (Ye et al., arXiv 1912.09729). None: none.
        weight_RN: Factor of each loss, see `importance_weights`.

    Returns:
        Losses (R, N), and sums over tokens: ``clipped``, tokens whose loss is that of a clipped ratio; ``old_kl``, the estimate
        k3 of KL(old || policy); ``ratio``.
    """
    log_ratio_RN = _log_ratio(logp_RN, old_logp_RN.detach(), mask_RN)
    ratio_RN = log_ratio_RN.exp()
    advantage_RN = _accurate(advantage_RN.detach()).masked_fill(~mask_RN, 0)
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
            "old_kl": masked_sum(log_ratio_RN.expm1() - log_ratio_RN, mask_RN),
            "ratio": masked_sum(ratio_RN, mask_RN),
        }
    return loss_RN, statistics


def policy_loss(
    logp_RN: Tensor,
    old_logp_RN: Tensor,
    advantage_RN: Tensor,
    mask_RN: Tensor,
    clip: float = 0.2,
    dual_clip: float | None = None,
    weight_RN: Tensor | None = None,
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of `policy_token_losses`, which has the other arguments, divided by ``count``; and the sums for reports.

    Args:
        count: Tokens of the whole minibatch over all ranks and micro-batches, so that the losses of its parts add up to its
            mean however it is divided. None: those of the mask.
    """
    loss_RN, statistics = policy_token_losses(logp_RN, old_logp_RN, advantage_RN, mask_RN, clip, dual_clip, weight_RN)
    return loss_RN.sum() / divisor(mask_RN.sum() if count is None else count), statistics


def value_loss(
    value_RN: Tensor,
    old_value_RN: Tensor,
    returns_RN: Tensor,
    mask_RN: Tensor,
    clip: float = 0.2,
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the larger squared error of the value and of the value clipped around the old one, summed and divided by ``count``.

    Args:
        value_RN: Values of the critic, with gradient.
        old_value_RN: Those at the start of the rollout.
        returns_RN: Targets.
        mask_RN: bool, states that count.
        clip: Largest change of a value that lowers the loss.
        count: States of the whole minibatch over all ranks and micro-batches; None: those of the mask.

    Returns:
        The loss, and sums over states: ``clipped``, those whose loss is that of a clipped value; ``squared_error``.
    """
    old_RN = _accurate(old_value_RN.detach()).masked_fill(~mask_RN, 0)
    returns_RN = _accurate(returns_RN.detach()).masked_fill(~mask_RN, 0)
    value_RN = _accurate(value_RN).masked_fill(~mask_RN, 0)
    plain_RN = (value_RN - returns_RN).square()
    clipped_RN = (old_RN + (value_RN - old_RN).clamp(-clip, clip) - returns_RN).square()
    larger_RN = torch.maximum(plain_RN, clipped_RN).masked_fill(~mask_RN, 0)
    with torch.no_grad():
        clipped = ((clipped_RN > plain_RN) & mask_RN).sum().to(value_RN.dtype)
        statistics = {"clipped": clipped, "squared_error": masked_sum(plain_RN, mask_RN)}
    return 0.5 * larger_RN.sum() / divisor(mask_RN.sum() if count is None else count), statistics


class FixedKL:
    """KL coefficient that stays as configured.

    Args:
        coefficient: Weight of the KL.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, samples: int) -> None:
        """Take note of a rollout's KL, which changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the configuration has the coefficient."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the configured coefficient, whatever an earlier run had."""


class AdaptiveKL(FixedKL):
    """KL coefficient that follows a target: ``beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) samples / horizon)``.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2.

    Args:
        coefficient: Weight at the start, above 0.
        target: KL to reach, in nats, measured as by `kl_sums`.
        horizon: Samples after which a KL far from the target has changed the weight by about 20 percent.
    """

    def __init__(self, coefficient: float, target: float, horizon: float) -> None:
        if min(coefficient, target, horizon) <= 0:
            raise ValueError(f"AdaptiveKL: coefficient={coefficient}, target={target} and horizon={horizon} must all be above 0.")
        super().__init__(coefficient)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """Change the coefficient after a rollout.

        Args:
            kl: Its mean KL, in nats.
            samples: Its samples.

        Raises:
            ValueError: If a rollout has five horizons or more, so that the coefficient could become negative.
        """
        if samples >= 5 * self.horizon:
            raise ValueError(
                f"AdaptiveKL: horizon={self.horizon} must be above a fifth of the {samples} samples of a rollout: raise it."
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """The coefficient, as plain data."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the coefficient; the state of a `FixedKL` leaves it as configured."""
        self.coefficient = float(state.get("coefficient", self.coefficient))
