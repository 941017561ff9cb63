"""Learning rates of the report: warm-up, one halving, annealing to its exact end; a resumed run follows its arguments."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.ling.schedule import WSD, Annealing, annealed


def optimizer_of(*lrs):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs], lr=1.0)


def rates(kind, steps, lr, **options):
    """Rate at each step 0 ... steps."""
    optimizer = optimizer_of(lr)
    scheduler, seen = kind(optimizer, **options), []
    for _ in range(steps + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_published_pre_training():
    seen = rates(WSD, 10_100, 2.4e-4, total_steps=10_000)
    assert seen[0] == 0 and seen[1] == pytest.approx(1.2e-7) and seen[1000] == pytest.approx(1.2e-4)
    assert seen[2000] == 2.4e-4
    assert set(seen[2000:6000]) == {2.4e-4} and set(seen[6000:]) == {1.2e-4}
    assert sum(after == before / 2 for before, after in pairwise(seen) if before == 2.4e-4) == 1


@pytest.mark.parametrize("form", ["minus_sqrt", "inverse_sqrt"])
def test_published_annealing_ends_exactly(form):
    seen = rates(Annealing, 60, 1.2e-4, total_steps=50, form=form)
    assert seen[0] == 1.2e-4
    assert seen[50:] == [1.2e-8] * 11
    assert seen[:51] == sorted(set(seen[:51]), reverse=True)


def test_forms_are_their_formulas():
    lr, end, u = 1.2e-4, 1.2e-8, 0.36
    assert annealed(lr, end, u) == pytest.approx(end + (lr - end) * 0.4, rel=1e-12)
    assert annealed(lr, end, u, "inverse_sqrt") == pytest.approx(lr / math.sqrt(1 + (1e8 - 1) * 0.36), rel=1e-12)
    # 1/rate^2 of the inverse root is a straight line.
    lines = [annealed(lr, end, share, "inverse_sqrt") ** -2 for share in (0.2, 0.5, 0.8)]
    assert lines[1] - lines[0] == pytest.approx(lines[2] - lines[1])


@settings(max_examples=50)
@given(
    start=st.floats(1e-6, 1),
    ratio=st.floats(1e-6, 1),
    share=st.floats(0, 1),
    form=st.sampled_from(["minus_sqrt", "inverse_sqrt"]),
)
def test_annealing_stays_between_its_ends(start, ratio, share, form):
    lr = annealed(start, start * ratio, share, form)
    assert start * ratio * (1 - 1e-12) <= lr <= start * (1 + 1e-12)
    assert annealed(start, start * ratio, 1.0, form) == start * ratio


@pytest.mark.parametrize("form", ["minus_sqrt", "inverse_sqrt"])
def test_annealing_in_the_same_run_begins_where_the_stable_stage_ends(form):
    options = {"warmup_steps": 10, "form": form}
    whole = rates(WSD, 160, 2.4e-4, total_steps=150, annealing_steps=50, **options)
    assert whole[:100] == rates(WSD, 99, 2.4e-4, total_steps=100, warmup_steps=10)
    assert whole[60] == 1.2e-4 and whole[100:] == rates(Annealing, 60, 1.2e-4, total_steps=50, form=form)
    assert whole[150:] == [1.2e-8] * 11


def test_no_halving_and_no_warm_up():
    assert set(rates(WSD, 30, 0.3, total_steps=20, warmup_steps=0, halve_at=1.0)) == {0.3}


def test_groups_keep_the_ratio_of_their_rates():
    optimizer = optimizer_of(0.4, 0.1)
    scheduler = WSD(optimizer, total_steps=10, warmup_steps=4)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.3, 0.075])


def test_resumed_schedule_continues_at_its_step_with_the_new_arguments(tmp_path):
    optimizer = optimizer_of(0.4)
    scheduler = WSD(optimizer, total_steps=20, warmup_steps=2)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    path = tmp_path / "state.pt"
    torch.save({"schedule": scheduler.state_dict(), "optimizer": optimizer.state_dict()}, path)
    state = torch.load(path, weights_only=True)
    for total, expected in ((20, [0.4, 0.2, 0.2]), (30, [0.4] * 7 + [0.2])):
        again = optimizer_of(0.4)
        resumed = WSD(again, total_steps=total, warmup_steps=2)
        again.load_state_dict(state["optimizer"])
        resumed.load_state_dict(state["schedule"])
        seen = []
        for _ in expected:
            again.step()
            resumed.step()
            seen.append(again.param_groups[0]["lr"])
        assert seen == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (WSD, {"total_steps": 1000}, "total_steps=1000 .* step 600, before the end of warmup_steps=2000"),
        (WSD, {"total_steps": 5000, "annealing_steps": 4000}, "less annealing_steps=4000"),
        (WSD, {"total_steps": 0, "warmup_steps": 0}, "total_steps=0"),
        (WSD, {"total_steps": 10, "warmup_steps": -1}, "warmup_steps=-1"),
        (WSD, {"total_steps": 10, "halve_at": 60}, "halve_at=60 is a share"),
        (WSD, {"total_steps": 10, "warmup_steps": 1, "annealing_steps": 2, "lr_end": 0.07}, r"lr_end=0\.07 .* at most 0\.05"),
        (Annealing, {"total_steps": 0}, "total_steps=0"),
        (Annealing, {"total_steps": 5, "lr_end": 0.0}, r"lr_end=0\.0 must be above 0"),
        (Annealing, {"total_steps": 5, "lr_end": 0.2}, r"lr_end=0\.2 .* at most 0\.1"),
        (Annealing, {"total_steps": 5, "form": "cosine"}, "form='cosine' must be one of minus_sqrt, inverse_sqrt"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        rates(kind, 1, 0.1, **options)
