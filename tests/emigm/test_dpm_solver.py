"""DPM-Solver++ of the head: published time grid, exactness for a point, third order for a Gaussian, number of calls."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.emigm.diffusion import cosine_betas
from zoo.emigm.dpm_solver import DPMSolver, NoiseSchedule, solver_orders


def schedule():
    return NoiseSchedule(cosine_betas(), torch.float64)


def coefficients(time, s):
    """alpha and sigma at what the network is told."""
    t = torch.tensor(time / 1000 + 1 / s.num_steps, dtype=torch.float64)
    return s.alpha(t), s.sigma(t)


def ends(s):
    return s.alpha(s.first), s.sigma(s.first), s.alpha(s.last), s.sigma(s.last)


def gaussian_error(num_steps, mean=0.7, deviation=0.5, dtype=torch.float64):
    """Largest error of the solver against the exact map of the probability flow of N(mean, deviation^2)."""
    solver, s = DPMSolver(num_steps, dtype), schedule()

    def network(x, time):
        a, b = coefficients(time, s)
        return b * (x - a * mean) / (a**2 * deviation**2 + b**2)

    x = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    a_T, b_T, a_0, b_0 = ends(s)
    spread = ((a_0 * deviation) ** 2 + b_0**2).sqrt() / ((a_T * deviation) ** 2 + b_T**2).sqrt()
    return (solver.sample(network, x) - (a_0 * mean + spread * (x - a_T * mean))).abs().max().item()


# Schedule


def test_noisiest_steps_are_dropped():
    """Half log-SNR below -5.1: 996 of 1000 remain, and the ends are the published ones, those of single precision."""
    s = NoiseSchedule(cosine_betas())
    assert s.num_steps == 996
    assert s.first == 1
    assert s.last.item() == pytest.approx(1 / 996)
    assert s.half_log_snr(s.first).item() == pytest.approx(-5.07776, abs=1e-5)
    assert s.half_log_snr(s.last).item() == pytest.approx(5.04723, abs=1e-5)


@settings(max_examples=50)
@given(t=st.floats(1 / 996, 1))
def test_time_inverts_the_log_snr(t):
    s, t = schedule(), torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(s.time(s.half_log_snr(t)), t, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(s.alpha(t) ** 2 + s.sigma(t) ** 2, torch.ones((), dtype=torch.float64))


def test_network_is_told_fractional_times():
    """(t - 1/996) 1000: 998.996 at the start, not the index 995."""
    s = schedule()
    assert s.network_time(s.first) == pytest.approx(998.996, abs=1e-3)
    assert s.network_time(s.last) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("num_steps", "outer"),
    [(8, [1, 0.88792, 0.11185, 0.001]), (14, [1, 0.97361, 0.78265, 0.2198, 0.02432, 0.001])],
)
def test_outer_times_of_the_published_numbers_of_steps(num_steps, outer):
    """As measured in single precision, in which sigma at the end is rounded."""
    starts = [stages[0].time / 1000 + 1 / 996 for stages in DPMSolver(num_steps).steps]
    assert [*starts, DPMSolver(num_steps).schedule.last.item()] == pytest.approx(outer, abs=1.5e-5)


# Orders and calls


@pytest.mark.parametrize(
    ("num_steps", "orders"),
    [(1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1]), (8, [3, 3, 2]), (9, [3, 3, 2, 1]), (14, [3, 3, 3, 3, 2])],
)
def test_orders(num_steps, orders):
    assert solver_orders(num_steps) == orders


@given(num_steps=st.integers(1, 200))
def test_orders_spend_all_calls(num_steps):
    assert sum(solver_orders(num_steps)) == num_steps
    assert len(solver_orders(num_steps)) == num_steps // 3 + 1


@settings(max_examples=20)
@given(num_steps=st.integers(1, 40))
def test_network_is_called_exactly_so_often_at_falling_times(num_steps):
    seen = []

    def network(x, time):
        seen.append(time)
        return torch.zeros_like(x)

    DPMSolver.with_steps(num_steps).sample(network, torch.ones(1, 1))
    assert len(seen) == num_steps
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == num_steps


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        DPMSolver(0)


# Accuracy


@settings(max_examples=25)
@given(num_steps=st.integers(1, 30), point=st.floats(-5, 5))
def test_a_point_is_found_exactly(num_steps, point):
    """All data at a: x_0 = alpha_0 a + sigma_0 (x_T - alpha_T a) / sigma_T for every number of steps."""
    s = schedule()

    def network(x, time):
        a, b = coefficients(time, s)
        return (x - a * point) / b

    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    a_T, b_T, a_0, b_0 = ends(s)
    found = DPMSolver(num_steps, torch.float64).sample(network, x)
    torch.testing.assert_close(found, a_0 * point + b_0 * (x - a_T * point) / b_T, rtol=1e-9, atol=1e-9)


def test_errors_on_a_gaussian_are_those_measured():
    """m = 0.7, s = 0.5."""
    measured = {8: 1.2e-1, 14: 2.2e-2, 20: 3.2e-3, 59: 1.3e-4}
    for num_steps, error in measured.items():
        assert gaussian_error(num_steps) < 1.6 * error
    assert gaussian_error(8) > 1e-2  # a solver that knew the answer would show nothing


def test_error_falls_with_the_third_power_of_the_step():
    few, many = gaussian_error(59), gaussian_error(119)  # 20 and 40 outer steps, the last of order 2
    assert 2.3 < math.log2(few / many) < 4


def test_single_precision_as_published_costs_little():
    """float32 coefficients differ by what the spec measured, 2.6e-4, and not by more."""
    s = schedule()

    def network(x, time):
        a, b = (value.to(x) for value in coefficients(time, s))
        return b * (x - a * 0.7) / (a**2 * 0.25 + b**2)

    x = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    exact, published = (DPMSolver(14, dtype).sample(network, x) for dtype in (torch.float64, torch.float32))
    gap = (exact - published).abs().max() / exact.abs().max()
    assert 1e-7 < gap < 3e-4


def test_start_is_left_as_it_is():
    x = torch.ones(2, 3)
    DPMSolver.with_steps(8).sample(lambda x, time: x * 0.1, x)
    assert torch.equal(x, torch.ones(2, 3))
