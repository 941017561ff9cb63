"""Training masks: equal counts, uniform positions, the law of the ratio, sharing within a process only."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zoo.base.random import SampleRandom
from zoo.emigm.mask_schedule import gamma
from zoo.emigm.masking import Masking


def batch_random(number, size=8, seed=0):
    return SampleRandom(seed, torch.arange(number * size, number * size + size))


def draws(masking, num_tokens, count, size=1):
    return [masking.draw(batch_random(i, size), num_tokens) for i in range(count)]


@settings(max_examples=50)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 9),
    num_tokens=st.sampled_from([2, 3, 16, 64]),
    law=st.sampled_from(["bernoulli", "fixed_count", "mar_truncnorm"]),
    schedule=st.sampled_from(["linear", "cosine", "poly-0.5", "exp", "log"]),
    t_min=st.sampled_from([0.0, 0.2, 0.6]),
)
def test_images_of_a_batch_hide_equally_many_tokens(seed, size, num_tokens, law, schedule, t_min):
    draw = Masking(law=law, schedule=schedule, t_min=t_min).draw(batch_random(0, size, seed), num_tokens)
    assert draw.mask.sum(1).tolist() == [draw.num_masked] * size
    assert draw.num_masked >= (2 if law == "bernoulli" else 1)
    assert torch.equal(draw.order.sort(dim=1).values, torch.arange(num_tokens).expand(size, -1))
    assert draw.mask.gather(1, draw.order[:, : draw.num_masked]).all()
    assert not draw.mask.gather(1, draw.order[:, draw.num_masked :]).any()


def test_images_of_a_batch_hide_different_positions():
    draw = Masking().draw(batch_random(0, 64), 64, time=0.2)
    assert len(draw.mask.unique(dim=0)) == 64


def test_each_position_is_hidden_equally_often():
    mask = torch.cat([Masking(t_min=0.0, schedule="linear").draw(batch_random(i, 256), 8).mask for i in range(40)])
    hidden = mask.sum(0).numpy()
    assert stats.chisquare(hidden).pvalue > 1e-3


@pytest.mark.parametrize(("t_min", "ratio"), [(0.2, 0.855), (0.0, 0.802)])
def test_mean_mask_ratio(t_min, ratio):
    """exp with times clamped at 0.2 and from 1e-3 on; N large enough that the rule of two matters little."""
    ratios = torch.tensor([draw.num_masked / 256 for draw in draws(Masking(t_min=t_min), 256, 800)])
    error = ratios.std() / math.sqrt(len(ratios))
    assert ratios.mean().item() == pytest.approx(ratio, abs=4 * error.item())


def test_mean_mask_ratio_by_integration():
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert gamma("exp", Masking(t_min=0.2).times(u)).mean().item() == pytest.approx(0.855, abs=5e-4)
    assert gamma("exp", Masking(t_min=0.0).times(u)).mean().item() == pytest.approx(0.802, abs=5e-4)
    assert gamma("exp", Masking(t_min=0.2, truncation="resample").times(u)).mean().item() == pytest.approx(0.910, abs=1e-3)


def test_early_times_are_raised_not_drawn_anew():
    """Under clamp the time 0.2008 has probability 0.2; under resample none has."""
    times = torch.cat([draw.time for draw in draws(Masking(), 64, 1000)])
    raised = (times - 0.2008).abs() < 1e-9
    assert stats.binomtest(int(raised.sum()), 1000, 0.2).pvalue > 1e-3
    assert times.min().item() == pytest.approx(0.2008, abs=1e-9)
    times = torch.cat([draw.time for draw in draws(Masking(truncation="resample"), 64, 300)])
    assert len(times.unique()) == 300
    assert stats.kstest(times.numpy(), stats.uniform(0.2008, 0.7992).cdf).pvalue > 1e-3


@given(u=st.floats(0, 1, exclude_max=True), t_min=st.floats(0, 0.99), truncation=st.sampled_from(["clamp", "resample"]))
def test_times_lie_between_the_least_and_1(u, t_min, truncation):
    time = Masking(t_min=t_min, truncation=truncation).times(torch.tensor([u], dtype=torch.float64)).item()
    assert 0.999 * t_min + 1e-3 - 1e-12 <= time <= 1


def at(time, **options):
    """Masking that draws this time always."""
    masking = Masking(**options)
    masking.times = lambda uniform: torch.full_like(uniform, time)
    return masking


def test_count_at_a_drawn_time_is_binomial():
    """At least two: the law is that of Binomial(N, gamma) on 2 ... N."""
    masking, num_tokens, time = at(0.4, schedule="linear", t_min=0.0), 6, 0.4
    counts = torch.tensor([masking.draw(batch_random(i, 1), num_tokens).num_masked for i in range(1000)])
    law = torch.tensor(stats.binom(num_tokens, time).pmf(range(2, num_tokens + 1)))
    observed = counts.bincount(minlength=num_tokens + 1)[2:]
    assert stats.chisquare(observed.numpy(), (law / law.sum() * 1000).numpy()).pvalue > 1e-3


@given(time=st.floats(1e-3, 1), num_tokens=st.integers(1, 300), schedule=st.sampled_from(["linear", "cosine", "exp"]))
def test_count_at_a_given_time_is_the_expected_one(time, num_tokens, schedule):
    """Whatever the batch and the law, so that validation losses do not depend on batches."""
    share = num_tokens * gamma(schedule, torch.tensor(time, dtype=torch.float64)).item()
    for law, size in (("bernoulli", 2), ("fixed_count", 3)):
        draw = Masking(law=law, schedule=schedule).draw(batch_random(size, size), num_tokens, time)
        assert draw.num_masked == max(min(2, num_tokens), round(share))


@given(time=st.floats(1e-3, 1), num_tokens=st.integers(1, 300), schedule=st.sampled_from(["linear", "cosine", "exp"]))
def test_maskgit_hides_the_schedule_s_share_rounded_up(time, num_tokens, schedule):
    draw = at(time, law="fixed_count", schedule=schedule).draw(batch_random(0, 2), num_tokens)
    share = num_tokens * gamma(schedule, torch.tensor(time, dtype=torch.float64)).item()
    assert share <= draw.num_masked < share + 1


def test_mar_hides_a_truncated_normal_share():
    """ceil(N m), m normal (1, 0.25) on [0.7, 1]."""
    num_tokens, low = 20, (0.7 - 1) / 0.25
    law = stats.truncnorm(low, 0, loc=1, scale=0.25)
    counts = torch.tensor([draw.num_masked for draw in draws(Masking(law="mar_truncnorm"), num_tokens, 1000)])
    assert counts.min() >= 14
    edges = [m / num_tokens for m in range(14, num_tokens + 1)]
    expected = [1000 * (law.cdf(b) - law.cdf(a)) for a, b in itertools.pairwise(edges)]
    observed = counts.bincount(minlength=num_tokens + 1)[15:]
    assert stats.chisquare(observed.numpy(), expected).pvalue > 1e-3


def test_own_times_hide_each_position_on_its_own():
    """time=sample: each sample has a time and Bernoulli masks; batch sharing is gone."""
    masking = Masking(schedule="linear", t_min=0.0, time="sample")
    draw = masking.draw(batch_random(0, 4000), 16)
    assert draw.order is None
    assert draw.num_masked is None
    assert len(draw.time) == 4000
    assert stats.kstest(draw.time.numpy(), stats.uniform(1e-3, 0.999).cdf).pvalue > 1e-3
    counts = draw.mask.sum(1).bincount(minlength=17).double()
    t = torch.linspace(1e-3, 1, 20_001, dtype=torch.float64)[:, None].numpy()
    law = stats.binom.pmf(range(17), 16, t).mean(0)
    assert stats.chisquare(counts.numpy(), law / law.sum() * 4000).pvalue > 1e-3


def test_own_masks_do_not_depend_on_the_batch():
    masking = Masking(t_min=0.0, time="sample")
    whole = masking.draw(SampleRandom(0, torch.arange(10)), 16)
    part = masking.draw(SampleRandom(0, torch.tensor([7, 3])), 16)
    assert torch.equal(whole.mask[[7, 3]], part.mask)


def test_processes_draw_times_of_their_own_and_again_the_same():
    masking = Masking()
    first, second = (SampleRandom(0, torch.arange(rank, 16, 2)) for rank in (0, 1))
    times = [masking.draw(random, 16).time.item() for random in (first, second, first)]
    assert times[0] == times[2]
    lengths = {
        (masking.draw(SampleRandom(0, torch.arange(r, 16, 2), epoch), 64).num_masked) for r in (0, 1) for epoch in range(9)
    }
    assert len(lengths) > 9


@pytest.mark.parametrize("time", ["batch", "sample"])
def test_stratified_times_cover_the_interval_evenly(time):
    """Discrepancy of consecutive draws far below that of independent ones."""
    masking = Masking(t_min=0.0, stratified=True, time=time)
    if time == "sample":
        times = masking.draw(batch_random(0, 200), 64).time
    else:
        times = torch.cat([draw.time for draw in draws(masking, 64, 200)])
    gap = stats.kstest(times.numpy(), stats.uniform(1e-3, 0.999).cdf).statistic
    assert gap < 0.02  # 0.06 is usual for 200 independent draws


@pytest.mark.parametrize("size", [55, 144])
def test_stratified_times_of_consecutive_batches_differ_for_any_batch_size(size):
    masking = Masking(t_min=0.0, stratified=True)
    times = torch.cat([masking.draw(batch_random(i, size), 64).time for i in range(20)])
    assert times.max() - times.min() > 0.7


def test_very_early_times_end(monkeypatch):
    calls, uniform = itertools.count(), SampleRandom.uniform

    def counted(*args, **options):
        assert next(calls) < 100, "too many attempts"
        return uniform(*args, **options)

    monkeypatch.setattr(SampleRandom, "uniform", counted)
    assert Masking().draw(batch_random(0, 2), 16, time=1e-7).num_masked == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sqrt"}, "no mask schedule 'sqrt'"),
        ({"law": "poisson"}, "law='poisson' must be one of bernoulli, fixed_count, mar_truncnorm"),
        ({"truncation": "cut"}, "truncation='cut' must be one of clamp, resample"),
        ({"time": "token"}, "time='token' must be one of batch, sample"),
        ({"t_min": 1.0}, r"t_min=1\.0 must lie in \[0, 1\)"),
        ({"t_min": -0.1}, r"t_min=-0\.1"),
        ({"time": "sample", "law": "fixed_count"}, "time='sample' masks each position on its own"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Masking(**options)
