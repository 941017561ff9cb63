"""Algorithms of RLHF as components: rewards and advantages of a rollout, losses of a part of a minibatch.

Shape suffixes: R samples, N answer tokens.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from zoo.base.hyperparameters import Configurable
from zoo.rlhf import ppo
from zoo.rlhf.conventions import ConventionName, Whitening, find_convention
from zoo.rlhf.experience import Experience, Rows
from zoo.rlhf.group_advantage import group_relative, leave_one_out, reward_to_go

__all__ = ["GRPO", "PPO", "RLOO", "Algorithm", "DrGRPO", "Importance", "KLPenalty", "ReinforcePP", "Targets"]


@dataclass(frozen=True)
class KLPenalty:
    """Penalty on the KL from the reference.

    Attributes:
        coefficient: Its weight, at the start if it adapts; 0: none, and no reference is needed. None: the convention's.
        kind: Estimator, see `zoo.rlhf.ppo.kl_estimate`.
        place: Subtracted from each token's reward, or added to the loss.
        clamp: Bound of the estimate's absolute value; None: none.
        target: KL that the coefficient adapts to, in nats; None: it stays.
        horizon: Samples in which it adapts, see `KLCoefficient`.
        measure: KL of a sequence that is compared with the target: sum, or mean, over its tokens of k1.

    Raises:
        ValueError: If a number is out of range, or k1 is the loss, whose gradient has the expectation 0.
    """

    coefficient: float | None = None
    kind: ppo.KLKind = "k1"
    place: Literal["reward", "loss"] = "reward"
    clamp: float | None = None
    target: float | None = None
    horizon: float = 10_000.0
    measure: ppo.KLMeasure = "sequence"

    def __post_init__(self) -> None:
        if self.coefficient is not None and not 0 <= self.coefficient < math.inf:
            raise ValueError(f"kl.coefficient={self.coefficient} must be 0 (no penalty) or positive.")
        if self.place == "loss" and self.kind == "k1":
            raise ValueError("kl.kind=k1 has no gradient in a loss on average: choose k2, k3, k1+ or k3+, or kl.place=reward.")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"kl.clamp={self.clamp} must be positive, or null for no bound.")


@dataclass(frozen=True)
class Importance:
    """Weights of samples that older weights generated, see `zoo.rlhf.ppo.importance_weights`.

    Attributes:
        cap: Largest weight.
        mode: Weights above it become the cap, or 0.
    """

    cap: float = 2.0
    mode: ppo.ImportanceMode = "truncate"

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise ValueError(f"importance.cap={self.cap} must be at least 1, the weight of samples of the same weights.")


@dataclass
class Targets(Rows):
    """Targets of a rollout or a part of it.

    Attributes:
        advantage: (R, N), 0 where no token counts; whitened if the scope is the rollout.
        returns: (R, N) targets of the critic, if there is one.
        reward: (R, N) reward of each token, with the KL if it is a reward.
        kl: (R, N) estimate k1 of the KL from the reference, 0 without one.
    """

    advantage: Tensor
    returns: Tensor | None
    reward: Tensor
    kl: Tensor


class Algorithm(Configurable, ABC):
    """Base of the algorithms: the policy's clipped loss, the KL, and scores as rewards of tokens.

    Losses are sums divided by counts of the whole minibatch, so that those of its parts, on whatever ranks and in whatever
    micro-batches, add up to the same loss and gradient.

    Args:
        clip: Distance from 1 beyond which a ratio of probabilities gains nothing.
        dual_clip: Largest ratio that counts where the advantage is negative, above 1; None: none.
        kl: Penalty on the KL from the reference.
        importance: Weights of samples that older weights generated.
        whiten: Scope in which advantages are whitened; None: as published.
        score_clip: Bound of the score; 0: none. None: the convention's.
        missing_eos_penalty: Amount subtracted from the score of an answer without an end; None: none.
        entropy_weight: Weight of the entropy that is added to the objective.
        convention: Published implementation whose masks and defaults apply, see `zoo.rlhf.conventions`.

    Raises:
        ValueError: If a number is out of range.
    """

    #: Whether a critic is trained.
    needs_critic: bool = False
    #: Whether advantages compare the answers to a prompt, so that there must be several, in one chunk of a rollout.
    needs_groups: bool = False
    #: Scope of whitening as published; None: the convention's.
    whitening: ClassVar[Whitening | None] = "none"

    def __init__(
        self,
        clip: float = 0.2,
        dual_clip: float | None = None,
        kl: KLPenalty = KLPenalty(),
        importance: Importance = Importance(),
        whiten: Whitening | None = None,
        score_clip: float | None = None,
        missing_eos_penalty: float | None = None,
        entropy_weight: float = 0.0,
        convention: ConventionName = "zoo",
    ) -> None:
        if not 0 < clip < math.inf:
            raise ValueError(f"clip={clip} must be positive; 0.2 keeps ratios between 0.8 and 1.2.")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"dual_clip={dual_clip} must be above 1, or null.")
        if score_clip is not None and not score_clip >= 0:
            raise ValueError(f"score_clip={score_clip} must be 0 (no bound) or positive.")
        if missing_eos_penalty is not None and not missing_eos_penalty >= 0:
            raise ValueError(f"missing_eos_penalty={missing_eos_penalty} must not be negative: it is subtracted.")
        if not entropy_weight >= 0:
            raise ValueError(f"entropy_weight={entropy_weight} must not be negative: it rewards entropy.")
        self.rules = find_convention(convention)
        self.clip = clip
        self.dual_clip = dual_clip
        self.kl = kl
        self.kl_coefficient = self.rules.beta if kl.coefficient is None else kl.coefficient
        self.importance = importance
        self.whiten: Whitening = whiten or self.whitening or self.rules.whiten
        self.score_clip = self.rules.score_clip if score_clip is None else score_clip or None
        self.missing_eos_penalty = missing_eos_penalty
        self.entropy_weight = entropy_weight
        self.kl_controller()  # checks its numbers

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the reference are needed."""
        return self.kl_coefficient > 0

    @property
    def needs_whole_rollout(self) -> bool:
        """Whether `targets` must be given a whole rollout, because advantages are whitened over it."""
        return self.whiten == "rollout"

    def kl_controller(self) -> ppo.KLCoefficient:
        """The coefficient of the KL, fixed or adaptive."""
        return ppo.KLCoefficient(self.kl_coefficient, self.kl.target, self.kl.horizon)

    def action_mask(self, experience: Experience) -> Tensor:
        """Tokens of the policy's loss, bool (R, N); their number in a minibatch is the ``count`` of `policy_loss`."""
        return self.rules.action_mask(experience.mask, experience.ended)

    def value_mask(self, experience: Experience) -> Tensor:
        """States of the critic's loss, bool (R, N); their number in a minibatch is the ``count`` of `value_loss`."""
        return self.rules.value_mask(experience.mask, experience.ended)

    @torch.no_grad()
    def targets(self, experience: Experience, samples_per_prompt: int, kl_coefficient: float) -> Targets:
        """Rewards and advantages of a whole rollout, or, unless `needs_whole_rollout`, of a chunk of whole groups.

        Raises:
            ValueError: If the experience lacks values or log-probabilities that are needed, or groups are incomplete.
        """
        mask_RN = experience.mask
        kl_RN = penalty_RN = torch.zeros_like(experience.logp)
        if self.needs_reference or experience.reference_logp is not None:
            kl_RN = self._kl(experience.logp, experience, mask_RN, KLPenalty())
            penalty_RN = self._kl(experience.logp, experience, mask_RN, self.kl)
        beta = kl_coefficient if self.kl.place == "reward" else 0.0
        score_R = self._score(experience, samples_per_prompt)
        reward_RN = ppo.token_rewards(score_R, penalty_RN, self.rules.reward_mask(mask_RN), beta, self.rules.kl_per_length)
        advantage_RN, returns_RN = self._advantages(experience, reward_RN, samples_per_prompt)
        action_RN = self.action_mask(experience)
        if self.whiten == "rollout":
            advantage_RN = ppo.whiten(advantage_RN, action_RN)
        return Targets(advantage_RN.masked_fill(~action_RN, 0), returns_RN, reward_RN, kl_RN)

    def minibatch_advantage(self, targets: Targets, mask_RN: Tensor) -> Tensor:
        """Advantages (R, N) of a whole minibatch, over all ranks, with the `action_mask`; whitened if that is the scope."""
        return ppo.whiten(targets.advantage, mask_RN) if self.whiten == "minibatch" else targets.advantage

    def policy_loss(
        self,
        logp_RN: Tensor,
        entropy_RN: Tensor | None,
        experience: Experience,
        advantage_RN: Tensor,
        count: Tensor | float,
        sequences: Tensor | float,
        kl_coefficient: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the policy on a part of a minibatch.

        Args:
            logp_RN: Log-probabilities of the answers' tokens under the policy, with gradient.
            entropy_RN: Entropy at each token, with gradient; None: not computed, which needs the weight 0.
            experience: The samples.
            advantage_RN: Their advantages, see `minibatch_advantage`.
            count: Tokens of `action_mask` in the whole minibatch.
            sequences: Samples of the whole minibatch.
            kl_coefficient: Current weight of the KL, used if that is in the loss.

        Returns:
            The loss, and sums over tokens without gradient, to add up over the minibatch's parts: ``tokens``, those of
            `zoo.rlhf.ppo.policy_loss`, ``entropy`` if it has a weight, ``weight`` if the samples are of older weights.
        """
        mask_RN = self.action_mask(experience)
        sums, weight_RN = {"tokens": mask_RN.sum()}, None
        if experience.behaviour_logp is not None:
            cap, mode = self.importance.cap, self.importance.mode
            weight_RN = ppo.importance_weights(experience.logp, experience.behaviour_logp, mask_RN, cap, mode)
            sums["weight"] = ppo.masked_sum(weight_RN, mask_RN)
        loss_RN, of_ratios = ppo.policy_loss(
            logp_RN, experience.logp, advantage_RN, mask_RN, self.clip, self.dual_clip, weight_RN
        )
        if self.needs_reference and self.kl.place == "loss":
            loss_RN = loss_RN + kl_coefficient * self._kl(logp_RN, experience, mask_RN, self.kl)
        if self.entropy_weight:
            if entropy_RN is None:
                raise ValueError(f"entropy_weight={self.entropy_weight} needs entropy_RN, the entropy at each token.")
            loss_RN = loss_RN - self.entropy_weight * entropy_RN.masked_fill(~mask_RN, 0)
            sums["entropy"] = ppo.masked_sum(entropy_RN.detach(), mask_RN)
        return self._mean(loss_RN, mask_RN, count, sequences), {**sums, **of_ratios}

    def value_loss(
        self, value_RN: Tensor, experience: Experience, returns_RN: Tensor, count: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the critic on a part of a minibatch, and the sums of `zoo.rlhf.ppo.value_loss`.

        Args:
            value_RN: Values of the states before each token, with gradient.
            experience: The samples, with the values at the start of the rollout.
            returns_RN: Targets.
            count: States of `value_mask` in the whole minibatch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no critic: ask needs_critic before value_loss.")

    def _kl(self, logp_RN: Tensor, experience: Experience, mask_RN: Tensor, kl: KLPenalty) -> Tensor:
        """Estimates (R, N), 0 outside the mask."""
        reference_RN = _given(experience.reference_logp, "reference_logp", f"kl.coefficient={self.kl_coefficient}")
        return ppo.kl_estimate(logp_RN.masked_fill(~mask_RN, 0), reference_RN.masked_fill(~mask_RN, 0), kl.kind, kl.clamp)

    def _score(self, experience: Experience, samples_per_prompt: int) -> Tensor:
        """Scores (R,) as they become rewards."""
        return ppo.shaped_score(experience.score, self.score_clip, experience.ended, self.missing_eos_penalty)

    @abstractmethod
    def _advantages(self, experience: Experience, reward_RN: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor | None]:
        """Advantages before whitening and, with a critic, returns, both (R, N)."""

    def _mean(self, loss_RN: Tensor, mask_RN: Tensor, count: Tensor | float, sequences: Tensor | float) -> Tensor:
        """A part of the minibatch's mean of losses, which are 0 outside the mask."""
        return ppo.token_mean(loss_RN, count)


class PPO(Algorithm):
    """Proximal policy optimisation with a critic, arXiv 1707.06347, as of InstructGPT, arXiv 2203.02155.

    Args:
        gamma: Discount.
        lam: Decay of the differences in the advantage, see `generalized_advantages`.
        value_clip: Largest change of a value that lowers the critic's loss.
        **kwargs: see `Algorithm`; advantages are whitened as in the convention.
    """

    needs_critic = True
    whitening = None

    def __init__(self, gamma: float = 1.0, lam: float = 0.95, value_clip: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (0 <= gamma <= 1 and 0 <= lam <= 1):
            raise ValueError(f"gamma={gamma} and lam={lam} must lie in [0, 1].")
        if not value_clip > 0:
            raise ValueError(f"value_clip={value_clip} must be positive; .inf means no clipping.")
        self.gamma = gamma
        self.lam = lam
        self.value_clip = value_clip

    @override
    def value_loss(
        self, value_RN: Tensor, experience: Experience, returns_RN: Tensor, count: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        old_RN = _given(experience.value, "value", "the critic's loss")
        loss_RN, sums = ppo.value_loss(value_RN, old_RN, returns_RN, self.value_mask(experience), self.value_clip)
        return ppo.token_mean(loss_RN, count), sums

    def _advantages(self, experience: Experience, reward_RN: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor | None]:
        value_RN, mask_RN = _given(experience.value, "value", "PPO"), self.rules.reward_mask(experience.mask)
        return ppo.generalized_advantages(reward_RN, value_RN, mask_RN, self.gamma, self.lam)


class GRPO(Algorithm):
    """Group relative policy optimisation, arXiv 2402.03300: scores normalised in their group, the mean over each answer first.

    Args:
        kl: Penalty; as published, k3 in the loss with the weight 0.04.
        **kwargs: see `Algorithm`.
    """

    needs_groups = True
    _scale: ClassVar[bool] = True

    def __init__(self, kl: KLPenalty = KLPenalty(0.04, "k3", "loss"), **kwargs: Any) -> None:
        super().__init__(kl=kl, **kwargs)

    def _advantages(self, experience: Experience, reward_RN: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor | None]:
        advantage_R = group_relative(reward_RN.sum(1), experience.index, samples_per_prompt, self._scale)
        return advantage_R[:, None].expand_as(reward_RN), None

    def _mean(self, loss_RN: Tensor, mask_RN: Tensor, count: Tensor | float, sequences: Tensor | float) -> Tensor:
        return ppo.token_mean(loss_RN / mask_RN.sum(1, keepdim=True).clamp(min=1), sequences)


class DrGRPO(GRPO):
    """GRPO without its two biases, arXiv 2503.20783: no deviation, and a constant in place of the answer's length.

    Args:
        max_length: Tokens by which the sum over an answer is divided; None: the answers' columns, which must then be the same
            in all parts of a minibatch, whatever the longest answer in each.
        kl: Penalty; as published, none.
        **kwargs: see `Algorithm`.
    """

    _scale = False

    def __init__(self, max_length: int | None = None, kl: KLPenalty = KLPenalty(0.0, "k3", "loss"), **kwargs: Any) -> None:
        super().__init__(kl=kl, **kwargs)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be positive, or null for the length of the padded answers.")
        self.max_length = max_length

    def _mean(self, loss_RN: Tensor, mask_RN: Tensor, count: Tensor | float, sequences: Tensor | float) -> Tensor:
        return ppo.token_mean(loss_RN / (self.max_length or loss_RN.shape[1]), sequences)


class RLOO(Algorithm):
    """REINFORCE leave-one-out, arXiv 2402.14740: an answer's reward, with its KL, less the mean of the others.

    The paper takes one step on each sample; the clipped ratio of tokens allows several.
    """

    needs_groups = True

    def _advantages(self, experience: Experience, reward_RN: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor | None]:
        advantage_R = leave_one_out(reward_RN.sum(1), experience.index, samples_per_prompt)
        return advantage_R[:, None].expand_as(reward_RN), None


class ReinforcePP(Algorithm):
    """REINFORCE++, arXiv 2501.03262: the rewards that follow a token, whitened over the rollout.

    Args:
        baseline: Subtract the mean of the group from the score first (REINFORCE++-baseline), which needs several answers to
            each prompt.
        gamma: Discount.
        **kwargs: see `Algorithm`.
    """

    whitening = "rollout"

    def __init__(self, baseline: bool = False, gamma: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma={gamma} must lie in [0, 1].")
        self.needs_groups = baseline
        self.gamma = gamma

    def _score(self, experience: Experience, samples_per_prompt: int) -> Tensor:
        score_R = super()._score(experience, samples_per_prompt)
        return group_relative(score_R, experience.index, samples_per_prompt, scale=False) if self.needs_groups else score_R

    def _advantages(self, experience: Experience, reward_RN: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor | None]:
        return reward_to_go(reward_RN, self.rules.reward_mask(experience.mask), self.gamma), None


def _given(tensor: Tensor | None, field: str, reason: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"The experience has no {field}, which {reason} needs: compute it before the targets and losses.")
    return tensor
