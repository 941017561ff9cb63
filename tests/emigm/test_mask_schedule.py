"""Mask schedules: end points, weights, reveal probabilities, the likelihood bound's independence of the schedule, count law."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.emigm.mask_schedule import (
    ScheduleName,
    elbo_weight,
    expected_reveals,
    gamma,
    reveal_probabilities,
    reveal_probability,
    step_times,
)

SCHEDULES = get_args(ScheduleName)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@each_schedule
def test_nothing_is_masked_at_0_and_all_at_1(schedule):
    """But for exp, which the paper leaves at 1 - exp(-5)."""
    start, end = gamma(schedule, f64(0, 1)).tolist()
    assert start == pytest.approx(0, abs=1e-15)
    assert end == pytest.approx(-math.expm1(-5) if schedule == "exp" else 1, abs=1e-15)
    if schedule == "exp":
        assert end == pytest.approx(0.993262, abs=1e-6)


@each_schedule
def test_more_is_masked_later(schedule):
    assert (gamma(schedule, torch.linspace(0, 1, 1001, dtype=torch.float64)).diff() > 0).all()


@each_schedule
@settings(max_examples=30)
@given(t=st.floats(1e-3, 0.999))
def test_weight_is_the_derivative_of_ln_gamma(schedule, t):
    t = f64(t).requires_grad_()
    (slope,) = torch.autograd.grad(gamma(schedule, t).log().sum(), t)
    torch.testing.assert_close(elbo_weight(schedule, t.detach()), slope, rtol=1e-10, atol=1e-12)


def test_weight_at_the_end():
    assert elbo_weight("linear", f64(1)).item() == 1
    assert elbo_weight("cosine", f64(1)).item() == pytest.approx(0, abs=1e-15)
    assert elbo_weight("poly-0.5", f64(1)).item() == 0.5


@pytest.mark.parametrize(
    ("schedule", "mean"), [("linear", 0.5), ("cosine", 0.637), ("poly-0.5", 0.667), ("exp", 0.801), ("log", 0.807)]
)
def test_mean_mask_ratio(schedule, mean):
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert gamma(schedule, t).mean().item() == pytest.approx(mean, abs=5e-4)


@each_schedule
@settings(max_examples=30)
@given(num_iter=st.integers(2, 300))
def test_reveal_probabilities_telescope(schedule, num_iter):
    """A token stays masked up to the last step with probability gamma(tau_{K-1}) / gamma(1)."""
    tau = step_times(num_iter)
    p = f64(*reveal_probabilities(schedule, num_iter))
    assert ((p > 0) & (p <= 1)).all()
    assert p[-1] == 1
    kept = gamma(schedule, tau[-2]) / gamma(schedule, f64(1)[0])
    torch.testing.assert_close((1 - p[:-1]).prod(), kept, rtol=1e-10, atol=0)


def test_reveal_probability_divides_by_the_start_of_the_step():
    """Equation 6, not appendix B.2: from t = 1/2 to s = 1/4 half of the masked tokens are revealed under linear."""
    assert reveal_probability("linear", f64(0.5), f64(0.25)).item() == 0.5


@each_schedule
@settings(max_examples=30)
@given(t=st.floats(0.02, 1), s=st.floats(0.01, 0.99), r=st.floats(0.01, 0.99))
def test_two_steps_reveal_what_one_does(schedule, t, s, r):
    t, s, r = f64(t), f64(t * s), f64(t * s * r)
    stays = (1 - reveal_probability(schedule, t, s)) * (1 - reveal_probability(schedule, s, r))
    torch.testing.assert_close(stays, 1 - reveal_probability(schedule, t, r), rtol=1e-10, atol=1e-14)


@given(num_iter=st.integers(1, 400), eps=st.sampled_from([1e-5, 1e-4]))
def test_grid_goes_from_1_to_eps_in_equal_steps(num_iter, eps):
    tau = step_times(num_iter, eps)
    assert len(tau) == num_iter + 1
    assert tau[0] == 1
    assert tau[-1].item() == pytest.approx(eps, rel=1e-12)
    torch.testing.assert_close(
        -tau.diff(), torch.full((num_iter,), (1 - eps) / num_iter, dtype=torch.float64), rtol=0, atol=1e-14
    )


# The bound


def bound(schedule, costs, points=2000):
    """Integral over t = u^2 of w(t) E[cost of the masked set], each position masked on its own, by enumeration of all masks."""
    num_tokens = int(math.log2(len(costs)))
    sizes = f64(*(sum(mask) for mask in itertools.product((0, 1), repeat=num_tokens)))
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    g = gamma(schedule, u**2)[:, None]
    return (2 * u * elbo_weight(schedule, u**2) * (g**sizes * (1 - g) ** (num_tokens - sizes) * costs).sum(1)).mean()


@settings(max_examples=10)
@given(seed=st.integers(0, 100))
def test_bound_depends_on_the_end_points_of_the_schedule_only(seed):
    """With w = gamma'/gamma the integral over time is one over gamma: linear, cosine, sqrt and log agree for any cost."""
    costs = torch.rand(2**4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    costs[0] = 0  # nothing masked costs nothing
    values = [bound(schedule, costs) for schedule in ("linear", "cosine", "poly-0.5", "log")]
    torch.testing.assert_close(torch.stack(values), values[0].expand(4), rtol=1e-4, atol=0)
    short = bound("exp", costs)  # which ends at gamma = 0.9933: its integral lacks the rest
    g = 1 - math.exp(-5) * (torch.arange(2000, dtype=torch.float64)[:, None] + 0.5) / 2000
    sizes = f64(*(sum(mask) for mask in itertools.product((0, 1), repeat=4)))
    rest = ((g**sizes * (1 - g) ** (4 - sizes) * costs).sum(1) / g[:, 0]).mean() * math.exp(-5)
    torch.testing.assert_close(short + rest, values[0], rtol=1e-4, atol=0)


@settings(max_examples=10)
@given(seed=st.integers(0, 100))
def test_linear_bound_is_the_mean_over_uniform_counts(seed):
    """With gamma = t, w = 1/t it is E over l uniform in 1 ... N of N/l times the mean cost of the masks of size l."""
    num_tokens = 4
    costs = torch.rand(2**num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    costs[0] = 0
    sizes = f64(*(sum(mask) for mask in itertools.product((0, 1), repeat=num_tokens)))
    by_count = torch.stack([costs[sizes == count].mean() / count for count in range(1, num_tokens + 1)])
    torch.testing.assert_close(bound("linear", costs), by_count.sum(), rtol=1e-5, atol=0)


# Numbers of revealed tokens


@settings(max_examples=25)
@given(num_iter=st.integers(1, 40), num_tokens=st.integers(1, 40))
def test_linear_reveals_equally_many_in_each_step(num_iter, num_tokens):
    """Without the rule of at least one: N/K, up to the grid's end at 1e-5."""
    means = expected_reveals("linear", num_tokens, num_iter, at_least_one=False)
    expected = torch.full((num_iter,), num_tokens / num_iter, dtype=torch.float64)
    torch.testing.assert_close(means, expected, rtol=num_iter * 2e-5, atol=1e-9)


@each_schedule
@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_iter"), [(16, 4), (16, 40), (1, 1), (1, 9), (64, 8)])
def test_all_tokens_are_revealed(schedule, at_least_one, num_tokens, num_iter):
    means = expected_reveals(schedule, num_tokens, num_iter, at_least_one)
    assert means.sum().item() == pytest.approx(num_tokens, rel=1e-10)
    assert (means >= -1e-12).all()


@each_schedule
def test_without_the_rule_the_mean_is_the_schedule(schedule):
    """Reveals of step k: N (gamma(tau_k) - gamma(tau_{k+1})) / gamma(1), and what remains in the last."""
    tau = step_times(10)
    g = gamma(schedule, tau) / gamma(schedule, tau[:1])
    g[-1] = 0
    torch.testing.assert_close(expected_reveals(schedule, 20, 10, at_least_one=False), -20 * g.diff(), rtol=1e-9, atol=1e-12)


def test_numbers_of_the_paper_s_setting():
    """N = 256, K = 16, by exact recursion."""
    exp = [1.17, 1.29, 1.49, 1.82, 2.32, 3.07, 4.14, 5.64, 7.71, 10.5, 14.4, 19.7, 26.9, 36.8, 50.3, 68.7]
    assert expected_reveals("exp", 256, 16).tolist() == pytest.approx(exp, rel=6e-3)
    cosine = expected_reveals("cosine", 256, 16).tolist()
    assert [cosine[i] for i in (0, 1, 2, -1)] == pytest.approx([1.52, 3.71, 6.10, 25.06], rel=6e-3)
    assert expected_reveals("linear", 256, 16).tolist() == pytest.approx([16.0] * 16, abs=0.01)


def test_at_least_one_token_is_revealed_where_the_schedule_says_hardly_any():
    """exp, K = 128: the schedule alone reveals 0.07 tokens in the first step; the rule one in each of the first sixty."""
    assert expected_reveals("exp", 256, 128, at_least_one=False)[0].item() == pytest.approx(0.07, abs=5e-3)
    assert expected_reveals("exp", 256, 128)[:60].tolist() == pytest.approx([1] * 60, abs=0.35)


def test_unknown_schedules_and_no_steps_are_refused():
    for call in (gamma, elbo_weight):
        with pytest.raises(ValueError, match=r"no mask schedule 'cos'; there are linear, cosine, poly-0\.5, exp, log"):
            call("cos", f64(0.5))
    with pytest.raises(ValueError, match="num_iter=0 must be at least 1"):
        step_times(0)
