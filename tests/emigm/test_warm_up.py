"""The published learning rates: a straight line from 0, then constant, or half a cosine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.emigm.lr_schedule import WarmUp


def rates(steps, lr=0.1, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, seen = WarmUp(optimizer, **options), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@settings(max_examples=20)
@given(warmup=st.integers(0, 50), lr=st.floats(1e-5, 1))
def test_line_then_constant(warmup, lr):
    assert rates(100, lr, warmup_steps=warmup) == pytest.approx([lr * min(1, i / warmup) if warmup else lr for i in range(100)])


def test_published_schedule_in_epochs():
    """100 of 800 epochs: lr e / 100, then lr."""
    seen = rates(800, 8e-4, warmup_steps=100)
    assert [seen[e] for e in (0, 1, 50, 100, 799)] == pytest.approx([0, 8e-6, 4e-4, 8e-4, 8e-4])


def test_cosine_ends_at_the_least_rate_and_stays():
    seen = rates(60, 0.1, warmup_steps=10, shape="cosine", total_steps=50, min_lr=0.02)
    assert seen[10] == pytest.approx(0.1)
    assert seen[30] == pytest.approx(0.06)
    assert seen[50:] == pytest.approx([0.02] * 10)
    assert seen[10:51] == sorted(seen[10:51], reverse=True)


def test_groups_keep_their_own_weight_decay_and_share_the_rate():
    first, second = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [first], "weight_decay": 0.0}, {"params": [second]}], lr=1.0, weight_decay=0.02)
    WarmUp(optimizer, warmup_steps=4)
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.02]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 1, "shape": "line"}, "shape='line' must be one of constant, cosine"),
        ({"warmup_steps": 1, "shape": "cosine"}, "total_steps=None greater than warmup_steps=1"),
        ({"warmup_steps": 5, "shape": "cosine", "total_steps": 5}, "total_steps=5 greater"),
        ({"warmup_steps": 1, "min_lr": -1.0}, r"min_lr=-1\.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **options)
