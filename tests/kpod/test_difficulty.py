"""Difficulties of steps, equation 8, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.kpod.difficulty import Difficulties, step_difficulties

STEPS = torch.tensor([[-1, 0, 0, 1, 1, 1, -1], [-1, -1, 0, 1, 2, -1, -1]])


def losses(seed: int = 0) -> torch.Tensor:
    return 4 * torch.rand(STEPS.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_weights_give_the_mean_loss_of_each_step() -> None:
    nll = losses()
    by_hand = [torch.stack([nll[0, 1:3].mean(), nll[0, 3:6].mean()]), nll[1, 2:5]]
    for weights in (None, torch.full(STEPS.shape, 0.3)):
        for found, expected in zip(step_difficulties(nll, STEPS, weights), by_hand, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@given(st.integers(0, 10**6))
def test_weights_are_a_softmax_of_raw_weights_inside_the_step(seed: int) -> None:
    nll = losses(seed)
    weights = torch.rand(STEPS.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found = step_difficulties(nll, STEPS, weights)
    for row in range(2):
        for step, difficulty in enumerate(found[row]):
            inside = STEPS[row] == step
            share = weights[row, inside].softmax(0)
            torch.testing.assert_close(difficulty, share @ nll[row, inside], rtol=1e-12, atol=0)
            assert nll[row, inside].min() - 1e-12 <= difficulty <= nll[row, inside].max() + 1e-12
            assert share.max() <= math.e * share.min()
            assert difficulty <= math.e * nll[row, inside].mean()
    for moved, plain in zip(step_difficulties(nll, STEPS, weights + 700), found, strict=True):
        torch.testing.assert_close(moved, plain, rtol=1e-9, atol=0)  # a softmax does not overflow, and knows no constant


def test_places_outside_of_the_rationale_change_nothing_and_a_row_may_have_none() -> None:
    nll = losses()
    spoiled = nll.masked_fill(STEPS < 0, torch.nan)
    for found, expected in zip(step_difficulties(spoiled, STEPS, spoiled), step_difficulties(nll, STEPS, nll), strict=True):
        assert torch.equal(found, expected)
    assert [len(row) for row in step_difficulties(nll, torch.full_like(STEPS, -1))] == [0, 0]


def test_rows_are_packed_behind_each_other() -> None:
    packed = Difficulties.of_rows(step_difficulties(losses(), STEPS))
    assert packed.offsets.tolist() == [0, 2, 5] and packed.values.dtype == torch.float64
    assert torch.equal(packed.values[2:5], step_difficulties(losses(), STEPS)[1])
    assert Difficulties.of_rows([]).offsets.tolist() == [0]


def test_gaps_and_losses_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="step 1 of row 1 has no token"):
        step_difficulties(losses(), STEPS.where(STEPS != 1, -1).where(STEPS != 2, 2))
    with pytest.raises(ValueError, match=r"step 0 of row 0 .* not finite"):
        step_difficulties(losses().masked_fill(STEPS == 0, torch.inf), STEPS)
