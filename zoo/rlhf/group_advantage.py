"""Advantages without a critic, relative to the other answers to a prompt.

Shape suffixes: R samples, N answer tokens, G prompts, K answers to each.

| algorithm | advantage | mean of the losses | source |
|---|---|---|---|
| GRPO | (score - mean of the group) / its deviation | over tokens of an answer, then over answers | arXiv 2402.03300 |
| Dr. GRPO | score - mean of the group | sum over tokens / a constant length, then over answers | arXiv 2503.20783 |
| RLOO | score - mean of the others of the group | over tokens | arXiv 2402.14740 |
| REINFORCE++ | rewards that follow, [less the mean of the group,] whitened over the rollout | over tokens | arXiv 2501.03262 |

GRPO's mean over an answer weighs a token of a long wrong answer less than one of a short one, and its deviation weighs prompts
of little disagreement more; Dr. GRPO removes both.
"""

import torch
from torch import Tensor

from zoo.rlhf.ppo import generalized_advantages

__all__ = ["group_relative", "leave_one_out", "reward_to_go"]

_TINY_DEVIATION = 1e-6


def group_relative(score_R: Tensor, index_R: Tensor, samples_per_prompt: int, scale: bool = True) -> Tensor:
    """Score less the mean of its group, divided by the group's deviation (GRPO) or not (Dr. GRPO); (R,) without gradient.

    Args:
        score_R: Rewards of whole answers.
        index_R: Number of each sample in its rollout, in any order; divided by ``samples_per_prompt``, that of its group.
        samples_per_prompt: K, at least 2.
        scale: Divide by the unbiased deviation, plus 1e-6 against groups of equal scores (their advantage is 0).

    Raises:
        ValueError: If a group is incomplete, or a group is one sample.
    """
    if samples_per_prompt < 2:
        raise ValueError(f"samples_per_prompt={samples_per_prompt} must be at least 2 for advantages relative to a group.")
    order_R = index_R.argsort()
    group_R = index_R[order_R] // samples_per_prompt
    whole = len(group_R) % samples_per_prompt == 0
    if not whole or bool((group_R[::samples_per_prompt] != group_R[samples_per_prompt - 1 :: samples_per_prompt]).any()):
        raise ValueError(
            f"The {len(group_R)} samples are not whole groups of samples_per_prompt={samples_per_prompt}: give all answers to a"
            " prompt together."
        )
    score_GK = score_R.detach().double()[order_R].view(-1, samples_per_prompt)  # float64: equal scores become 0 exactly
    advantage_GK = score_GK - score_GK.mean(1, keepdim=True)
    if scale:
        advantage_GK = advantage_GK / (score_GK.std(1, keepdim=True) + _TINY_DEVIATION)
    advantage_R = torch.empty_like(advantage_GK.flatten())
    advantage_R[order_R] = advantage_GK.flatten()
    return advantage_R.to(torch.promote_types(score_R.dtype, torch.float32))


def leave_one_out(score_R: Tensor, index_R: Tensor, samples_per_prompt: int) -> Tensor:
    """Score less the mean of the others of its group, ``K / (K - 1) (score - mean)`` (RLOO); as `group_relative`."""
    advantage_R = group_relative(score_R, index_R, samples_per_prompt, scale=False)
    return advantage_R * (samples_per_prompt / (samples_per_prompt - 1))


def reward_to_go(reward_RN: Tensor, mask_RN: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of each token's reward and those that follow, (R, N) without gradient, 0 outside the mask."""
    return generalized_advantages(reward_RN, torch.zeros_like(reward_RN), mask_RN, gamma, 1.0)[0]
