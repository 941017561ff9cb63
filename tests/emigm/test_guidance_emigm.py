"""Guidance: the window, the ramps, and the number of transformer evaluations of the published settings."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.emigm.guidance import Guidance, nfe_of, num_iter_of

times = st.floats(0, 1)


@pytest.mark.parametrize(
    ("num_iter", "window", "guided", "nfe", "factor"),
    [
        (16, (0.1, 0.3), 3, 19, 1.2),  # 256: XS, S, B, L
        (16, (0.2, 0.4), 3, 19, 1.2),  # 256: H
        (128, (0.18, 0.6), 53, 181, 1.4),  # 256: XS, S, L
        (128, (0.05, 0.4), 45, 173, 1.35),  # 256: B
        (128, (0.3, 0.7), 51, 179, 1.4),  # 256: H
        (16, (0.15, 0.35), 3, 19, 1.2),  # 512: XS to L
        (64, (0.25, 0.5), 16, 80, 1.25),  # 512: XS to L
    ],
)
def test_evaluations_of_the_published_settings(num_iter, window, guided, nfe, factor):
    guidance = Guidance(4.0, *window)
    assert nfe_of(num_iter, guidance) == nfe == num_iter + guided
    assert nfe / num_iter == pytest.approx(factor, abs=0.026)  # as printed


def test_small_end_of_the_grid_decides_what_lies_in_the_window():
    """512 pixels, K = 64, (0.25, 0.5]: with a grid that ends at 0, tau = 0.5 would be in and 0.25 out: 16 as well, but others."""
    guidance = Guidance(4.0, 0.25, 0.5)
    ends = {eps: [1 + (eps - 1) * (k + 1) / 64 for k in range(64)] for eps in (1e-5, 0.0)}
    guided = {eps: [k for k, end in enumerate(grid) if guidance.guides(end)] for eps, grid in ends.items()}
    assert guided[1e-5] == list(range(32, 48))
    assert guided[0.0] == list(range(31, 47))


@given(num_iter=st.integers(1, 300), low=times, high=times)
def test_scale_1_or_an_empty_window_cost_nothing(num_iter, low, high):
    low, high = sorted((low, high))
    assert nfe_of(num_iter, Guidance(1.0, low, high)) == num_iter
    assert nfe_of(num_iter, Guidance(4.0, low, low)) == num_iter


@given(num_iter=st.integers(1, 300), scale=st.floats(0, 9).filter(lambda scale: scale != 1))
def test_the_whole_interval_costs_twice(num_iter, scale):
    assert nfe_of(num_iter, Guidance(scale, 0.0, 1.0)) == 2 * num_iter


@given(num_iter=st.integers(1, 200), cut=times)
def test_windows_side_by_side_share_no_step(num_iter, cut):
    parts = [nfe_of(num_iter, Guidance(2.0, *window)) - num_iter for window in ((0.0, cut), (cut, 1.0))]
    assert sum(parts) == num_iter


@given(nfe=st.integers(2, 150), low=times, high=times)
def test_most_steps_that_an_allowance_pays_for(nfe, low, high):
    guidance = Guidance(4.0, *sorted((low, high)))
    num_iter = num_iter_of(nfe, guidance)
    assert nfe_of(num_iter, guidance) <= nfe
    assert all(nfe_of(more, guidance) > nfe for more in range(num_iter + 1, nfe + 1))


def test_no_step_is_affordable():
    with pytest.raises(ValueError, match=r"nfe=1 is too small .*; it takes 2"):
        num_iter_of(1, Guidance(4.0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("ramp", "growth"),
    [
        ("constant", lambda f: 1),
        ("linear", lambda f: f),
        ("power", lambda f: f**2),
        ("cubic", lambda f: f**3),
        ("exp", lambda f: 1 - math.exp(-5 * f)),
        ("cosine", lambda f: math.cos(math.pi / 2 * (1 - f))),
    ],
)
@given(scale=st.floats(0, 10), revealed=times)
def test_ramps(ramp, growth, scale, revealed):
    expected = 1 + (scale - 1) * growth(revealed)
    assert Guidance(scale, ramp=ramp).scale_at(revealed) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_min": 0.4, "t_max": 0.3}, r"\(0\.4, 0\.3\] must satisfy"),
        ({"t_min": -0.1}, "must satisfy"),
        ({"t_max": 1.1}, "must satisfy"),
        ({"scale": math.nan}, "scale=nan must be a finite"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"ramp": "sine"}, "ramp='sine' must be one of constant, linear"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)
