"""Losses of two towers and their negatives: limits, identities, uniform draws."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from zoo.base.random import SampleRandom
from zoo.llmrec.losses import draw_negatives, in_batch_loss, score, softmax_loss


def draws(count: int, size: int, rows: int = 4000) -> torch.Tensor:
    random = SampleRandom(0, torch.arange(rows))
    return draw_negatives(random, torch.full((rows,), 3), torch.full((rows,), size), count)


def test_negatives_are_different_items_of_the_domain_and_all_equally_likely() -> None:
    drawn = draws(4, 9)
    assert int(drawn.min()) == 3 and int(drawn.max()) == 11
    assert bool((drawn.sort().values.diff(dim=1) > 0).all())
    share = torch.bincount(drawn.flatten() - 3) / len(drawn)
    assert bool(((share - 4 / 9).abs() < 4 * math.sqrt(4 / 9 * 5 / 9 / len(drawn))).all())
    pairs = torch.stack([((drawn == 3 + a).any(1) & (drawn == 3 + b).any(1)).double().mean() for a in range(9) for b in range(a)])
    assert bool(((pairs - 4 * 3 / (9 * 8)).abs() < 0.03).all())


def test_a_small_domain_gives_all_that_it_has_and_draws_depend_on_the_sample_alone() -> None:
    assert draws(5, 3, rows=7).sort().values.tolist() == [[-1, -1, 3, 4, 5]] * 7
    alone = draw_negatives(SampleRandom(0, torch.tensor([6])), torch.tensor([3]), torch.tensor([9]), 4)
    assert torch.equal(alone[0], draws(4, 9)[6])


def test_scale_of_both_towers_and_cosine() -> None:
    user, item = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(score(2 * user, 2 * item), 4 * score(user, item))
    torch.testing.assert_close(score(2 * user, 3 * item, "cosine"), score(user, item, "cosine"))
    torch.testing.assert_close(score(user, item[0], temperature=0.5), 2 * user @ item[0].T)
    with torch.autocast("cpu", torch.bfloat16):
        assert score(user.bfloat16(), item[0].bfloat16()).dtype == torch.float32


def test_no_negatives_cost_nothing_and_repeats_of_the_target_do_not_count() -> None:
    target = torch.tensor([2, 3])
    alone = softmax_loss(torch.randn(2, 1), target[:, None], target)
    assert float(alone) == 0.0
    twice = torch.stack([target, target], 1)
    assert float(softmax_loss(torch.ones(2, 2), twice, target)) == 0.0
    other = torch.stack([target, target + 5], 1)  # equal scores of another item: log 2
    assert float(softmax_loss(torch.ones(2, 2), other, target)) == pytest.approx(math.log(2))
    missing = torch.tensor([[2, 7, -1], [3, 9, -1]])
    scores = torch.randn(2, 3)
    assert float(softmax_loss(scores, missing, target)) == pytest.approx(
        float(softmax_loss(scores[:, :2], missing[:, :2], target))
    )


def test_in_batch_is_plain_within_one_domain_and_zero_where_each_has_its_own() -> None:
    scores, target = torch.randn(4, 4), torch.arange(4)
    one, own = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    torch.testing.assert_close(in_batch_loss(scores, target, one, target, one), cross_entropy(scores, target))
    assert float(in_batch_loss(scores, target, own, target, own)) == 0.0
    log_q = torch.randn(4)
    torch.testing.assert_close(in_batch_loss(scores, target, one, target, one, log_q), cross_entropy(scores - log_q, target))
    again = torch.tensor([1, 0, 1])  # the same item twice in a batch stands for itself once
    found = in_batch_loss(scores[:3, :2], again, one[:3], torch.tensor([0, 1]), one[:2])
    torch.testing.assert_close(found, cross_entropy(scores[:3, :2], again))
