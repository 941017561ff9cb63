"""Losses of reward models against identities and plain loops, in float64."""

import math

import pytest
import torch
from torch import Tensor

from zoo.rlhf.reward_loss import RewardLossKind, calibration_sums, last_values, pairwise_accuracy, reward_loss

KINDS: tuple[RewardLossKind, ...] = ("last", "per_token")


def ranked(answers: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Values, ids and masks of three prompts: 2 common tokens, then answers of 1 to 4 tokens."""
    generator = torch.Generator().manual_seed(answers)
    ids = torch.randint(1, 9, (3, answers, 6), generator=generator)
    ids[:, :, :2] = ids[:, :1, :2]
    length = torch.randint(3, 7, (3, answers, 1), generator=generator)
    mask = (torch.arange(6) < length).long()
    return torch.randn(3, answers, 6, generator=generator, dtype=torch.float64), ids * mask, mask


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def per_token(value: list[Tensor], ids: list[Tensor], pad: int = 0) -> float:
    """DeepSpeed-Chat's loss of a pair, by its formula."""
    ends = [next((t for t, token in enumerate(row.tolist()) if token == pad), len(row)) for row in ids]
    differing = [t for t in range(len(ids[0])) if ids[0][t] != ids[1][t]]
    begin, end = (differing[0], max(ends)) if differing else (len(ids[0]) - 1, len(ids[0]))
    losses = [-log_sigmoid(float(value[0][t] - value[1][t])) for t in range(begin, end)]
    return sum(losses) / len(losses)


def test_per_token_equals_a_plain_loop_of_the_published_formula() -> None:
    value, ids, mask = ranked()
    ids[2], mask[2] = ids[2, 0], mask[2, 0]  # equal rows
    value[2] = value[2, 0]
    found = reward_loss(value, ids, mask, "per_token")
    expected = torch.tensor([per_token(list(value[b]), list(ids[b])) for b in range(3)], dtype=torch.float64)
    torch.testing.assert_close(found.loss_B, expected)
    assert float(found.loss_B[2]) == pytest.approx(math.log(2))
    prefix = ids[:1].clone()
    prefix[0, 1, 4:], mask[0, 0], mask[0, 1] = 0, 1, (torch.arange(6) < 4).long()  # a row that the other continues
    prefix[0, 0] = torch.tensor([3, 4, 5, 6, 7, 8])
    prefix[0, 1, :4] = prefix[0, 0, :4]
    expected_one = per_token(list(value[0]), list(prefix[0]))
    assert float(reward_loss(value[:1], prefix, mask[:1], "per_token").loss) == pytest.approx(expected_one)


def test_ranked_answers_are_averaged_over_their_pairs() -> None:
    value, ids, mask = ranked(4)
    score = torch.stack([last_values(value[:, k], mask[:, k]) for k in range(4)], 1)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for kind in KINDS:
        each = torch.stack([reward_loss(*(x[:, [i, j]] for x in (value, ids, mask)), kind).loss_B for i, j in pairs], 1)
        found = reward_loss(value, ids, mask, kind)
        torch.testing.assert_close(found.loss_B, each.mean(1))
        torch.testing.assert_close(found.difference_BP, torch.stack([score[:, i] - score[:, j] for i, j in pairs], 1))
    assert torch.equal(found.score_BK, score)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_shift_changes_nothing_and_equal_scores_cost_ln_2(kind: RewardLossKind) -> None:
    value, ids, mask = ranked()
    torch.testing.assert_close(reward_loss(value + 3, ids, mask, kind).loss, reward_loss(value, ids, mask, kind).loss)
    assert float(reward_loss(torch.zeros_like(value), ids, mask, kind).loss) == pytest.approx(math.log(2))
    assert float(reward_loss(0 * value, ids, mask, kind, margin=1.0).loss) == pytest.approx(-log_sigmoid(-1.0))


def test_gradient_is_minus_the_sigmoid_of_the_negative_difference() -> None:
    value, ids, mask = ranked()
    value.requires_grad_()
    found = reward_loss(value, ids, mask)
    gradient = torch.autograd.grad(found.loss, value)[0] * 3
    better, worse = (last_values(gradient[:, k], mask[:, k]) for k in (0, 1))
    torch.testing.assert_close(better, -torch.sigmoid(-found.difference_BP[:, 0]))
    torch.testing.assert_close(worse, -better)
    assert int((gradient != 0).sum()) == 6


def test_padding_before_or_behind_does_not_matter() -> None:
    value = torch.tensor([[1.0, 2, 3, 4], [5.0, 6, 7, 8]])
    assert last_values(value, torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])).tolist() == [2, 8]


def test_accuracy_counts_ties_a_half() -> None:
    assert float(pairwise_accuracy(torch.tensor([2.0, -1.0, 0.0, 1.0]))) == 2.5 / 4


def test_calibrated_differences_have_no_error_and_sums_add_up() -> None:
    # Pairs decided with confidence 3/4, of which 3 of 4 are right; then all wrong.
    d = math.log(3)
    right = torch.tensor([d, d, d, -d], dtype=torch.float64)
    assert float(calibration_sums(right).abs().sum()) == pytest.approx(0, abs=1e-12)
    assert float(calibration_sums(-right.abs()).abs().sum() / 4) == pytest.approx(0.75)
    many = torch.linspace(-40, 40, 81)
    torch.testing.assert_close(calibration_sums(many), calibration_sums(many[:30]) + calibration_sums(many[30:]))


def test_bad_input_is_refused() -> None:
    value, ids, mask = ranked()
    with pytest.raises(ValueError, match="1 answers of a prompt at least 2"):
        reward_loss(value[:, :1], ids[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match="kind='mean' must be last or per_token"):
        reward_loss(value, ids, mask, "mean")  # type: ignore[arg-type]
