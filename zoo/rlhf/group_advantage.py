"""Advantages without a critic, relative to the other answers to a prompt, and the means of losses that go with them.

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

from zoo.rlhf.ppo import divisor, generalized_advantages

__all__ = [
    "constant_length_mean",
    "group_moments",
    "group_relative",
    "leave_one_out",
    "reward_to_go",
    "sequence_mean",
    "token_mean",
]

_TINY_DEVIATION = 1e-6


def group_moments(score_R: Tensor, index_R: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the scores of each sample's group, both (R,) in float64.

    Equal scores have a deviation of exactly 0 if they are float32 or shorter.

    Args:
        score_R: Rewards of whole answers.
        index_R: Number of each sample in its rollout, in any order; divided by ``samples_per_prompt``, that of its group.
        samples_per_prompt: K, at least 2.

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
    score_GK = score_R.detach().double()[order_R].view(-1, samples_per_prompt)
    moments = []
    for moment_G in (score_GK.mean(1), score_GK.std(1)):
        moments.append(torch.empty_like(score_R, dtype=torch.float64))
        moments[-1][order_R] = moment_G.repeat_interleave(samples_per_prompt)
    return moments[0], moments[1]


def group_relative(score_R: Tensor, index_R: Tensor, samples_per_prompt: int, scale: bool = True) -> Tensor:
    """Score less the mean of its group, divided by the group's deviation (GRPO) or not (Dr. GRPO); (R,) without gradient.

    Args:
        score_R: Rewards of whole answers.
        index_R: see `group_moments`.
        samples_per_prompt: Answers to each prompt.
        scale: Divide by the deviation, plus 1e-6 against groups of equal scores (their advantage is 0).
    """
    mean_R, deviation_R = group_moments(score_R, index_R, samples_per_prompt)
    advantage_R = score_R.detach() - mean_R
    if scale:
        advantage_R = advantage_R / (deviation_R + _TINY_DEVIATION)
    return advantage_R.to(torch.promote_types(score_R.dtype, torch.float32))


def leave_one_out(score_R: Tensor, index_R: Tensor, samples_per_prompt: int) -> Tensor:
    """Score less the mean of the others of its group, ``K / (K - 1) (score - mean)`` (RLOO); (R,) without gradient."""
    advantage_R = group_relative(score_R, index_R, samples_per_prompt, scale=False)
    return advantage_R * (samples_per_prompt / (samples_per_prompt - 1))


def reward_to_go(reward_RN: Tensor, mask_RN: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of each token's reward and those that follow, (R, N) without gradient, 0 outside the mask."""
    return generalized_advantages(reward_RN, torch.zeros_like(reward_RN), mask_RN, gamma, 1.0)[0]


def token_mean(loss_RN: Tensor, count: Tensor | float) -> Tensor:
    """Sum divided by the tokens of the whole minibatch (PPO, RLOO, REINFORCE++).

    Args:
        loss_RN: Losses, 0 where a token does not count.
        count: Tokens that count in the whole minibatch, over all ranks and micro-batches.
    """
    return loss_RN.sum() / divisor(count)


def sequence_mean(loss_RN: Tensor, mask_RN: Tensor, sequences: Tensor | float) -> Tensor:
    """Mean over the tokens of each answer, summed and divided by the answers of the whole minibatch (GRPO).

    Args:
        loss_RN: Losses, 0 outside the mask.
        mask_RN: bool, tokens that count.
        sequences: Answers of the whole minibatch, over all ranks and micro-batches.
    """
    return (loss_RN.sum(1) / mask_RN.sum(1).clamp(min=1)).sum() / divisor(sequences)


def constant_length_mean(loss_RN: Tensor, sequences: Tensor | float, max_length: int) -> Tensor:
    """Sum divided by the answers of the whole minibatch and a constant length (Dr. GRPO).

    Args:
        loss_RN: Losses, 0 where a token does not count.
        sequences: Answers of the whole minibatch, over all ranks and micro-batches.
        max_length: Largest number of tokens that an answer can have.
    """
    return loss_RN.sum() / (divisor(sequences) * max_length)
