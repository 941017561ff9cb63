"""Advantages without a critic against numbers computed by hand, in float64."""

import math

import pytest
import torch

from zoo.rlhf.group_advantage import group_relative, leave_one_out, reward_to_go

SCORE = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0], dtype=torch.float64)
INDEX = torch.arange(6)
DEVIATION = math.sqrt(7)  # of 1, 2, 6, unbiased: (4 + 1 + 9) / 2


def test_known_advantages() -> None:
    by_hand = torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(group_relative(SCORE, INDEX, 3, scale=False), by_hand)
    torch.testing.assert_close(group_relative(SCORE, INDEX, 3), by_hand / (DEVIATION + 1e-6))
    others = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(SCORE, INDEX, 3), others)


@pytest.mark.parametrize("advantage", [group_relative, leave_one_out])
def test_order_of_samples_and_a_constant_of_a_group_do_not_matter(advantage) -> None:  # type: ignore[no-untyped-def]
    order = torch.tensor([4, 0, 3, 1, 5, 2])
    plain = advantage(SCORE, INDEX, 3)
    torch.testing.assert_close(advantage(SCORE[order], INDEX[order], 3), plain[order])
    shift = torch.tensor([7.0, 7, 7, -2, -2, -2], dtype=torch.float64)
    torch.testing.assert_close(advantage(SCORE + shift, INDEX, 3), plain)
    torch.testing.assert_close(plain.view(2, 3).sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_equal_scores_have_no_advantage_in_float32() -> None:
    score = torch.full((7,), 0.1)
    for found in (group_relative(score, torch.arange(7), 7), leave_one_out(score, torch.arange(7), 7)):
        assert found.dtype == torch.float32 and not found.any()


def test_rewards_that_follow_are_discounted() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0], [8.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    known = torch.tensor([[3.0, 4.0, 4.0], [8.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(reward_to_go(reward, mask, 0.5), known)


def test_incomplete_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="not whole groups of samples_per_prompt=4"):
        group_relative(SCORE, INDEX, 4)
    with pytest.raises(ValueError, match="not whole groups of samples_per_prompt=3"):
        group_relative(SCORE, INDEX + 1, 3)
    with pytest.raises(ValueError, match="samples_per_prompt=1 must be at least 2"):
        leave_one_out(SCORE, INDEX, 1)
