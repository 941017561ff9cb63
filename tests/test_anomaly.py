"""The detector follows its published recurrences, looks at high values only, and recovers from what it has seen."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.base.anomaly import EWMADetector

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60)


@given(VALUES, st.floats(0.01, 1.0), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_recurrences(values, alpha, warmup):
    detector = EWMADetector(alpha, warmup, threshold=3.0)
    mean, second, scores = 0.0, 0.0, []
    for n, value in enumerate(values, start=1):
        detector.update(value)
        old = mean
        mean = (1 - alpha) * old + alpha * value
        second = (1 - alpha) * (second + alpha * (value - old) * (value - mean))
        known = n >= max(2, warmup) and detector.second_moment > 0
        scores.append((value - detector.mean) / math.sqrt(detector.second_moment) if known else 0.0)
        assert detector.mean == pytest.approx(mean, abs=1e-9)
        assert detector.second_moment == pytest.approx(second, rel=1e-9, abs=1e-9)
        assert detector.score(value) == scores[-1]
        spread = statistics.stdev(scores[-warmup:]) if len(scores[-warmup:]) > 1 else 0.0
        assert detector.score_limit == pytest.approx(3.0 * max(1.0, spread))


@pytest.mark.parametrize("level", [1e-6, 2.5, -40.0])
def test_a_constant_stream_has_no_outlier_and_its_score_has_a_closed_form(level):
    alpha = 0.05
    detector = EWMADetector(alpha, warmup=10)
    for n in range(1, 8001):
        assert not detector.is_outlier(level)
        detector.update(level)
        if 10 <= n <= 200:
            expected = (1 - alpha) ** ((n - 1) / 2) / math.sqrt(1 - (1 - alpha) ** n)
            assert detector.score(level) == pytest.approx(math.copysign(expected, level), rel=1e-6)


def test_starting_with_the_first_value_has_no_variance_on_a_constant_stream():
    detector = EWMADetector(warmup=2, init="first")
    for _ in range(5):
        detector.update(7.0)
    assert (detector.mean, detector.second_moment) == (7.0, 0.0)
    assert not detector.is_outlier(1e9) and not detector.is_outlier(-1e9)


def noisy(warmup: int = 10) -> EWMADetector:
    detector = EWMADetector(0.1, warmup, threshold=4.0, init="first")
    for step in range(10):
        detector.update(3.0 + 0.1 * math.sin(7.0 * step))
    return detector


def test_only_high_values_after_the_warm_up_are_outliers():
    assert noisy().is_outlier(6.0) and noisy().is_outlier(math.inf)
    assert not noisy().is_outlier(-100.0) and not noisy().is_outlier(math.nan)
    assert not noisy(warmup=11).is_outlier(6.0) and noisy(warmup=11).value_limit == math.inf


def test_the_limit_is_where_outliers_begin():
    limit = noisy().value_limit
    assert noisy().is_outlier(limit * (1 + 1e-9)) and not noisy().is_outlier(limit * (1 - 1e-9))


def test_values_cut_at_the_limit_make_a_new_level_usual():
    detector, steps = noisy(), 0
    while detector.is_outlier(30.0):
        detector.update(min(30.0, detector.value_limit))
        steps += 1
    assert 3 < steps < 60


def test_state_continues_and_is_plain():
    detector, again = noisy(), EWMADetector(0.1, 10, threshold=4.0, init="first")
    again.load_state_dict(detector.state_dict())
    for value in (3.05, 9.0, 2.9, 3.3):
        assert again.is_outlier(value) == detector.is_outlier(value)
        detector.update(value)
        again.update(value)
    assert again.state_dict() == detector.state_dict()
    assert {type(value) for value in detector.state_dict().values()} == {float, int, list}


def test_what_is_not_finite_is_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="is not finite; leave it out"):
            noisy().update(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 0.0}, "alpha=0.0"), ({"alpha": 1.5}, "alpha=1.5"), ({"warmup": 0}, "warmup=0"),
     ({"threshold": 0.0}, "threshold=0.0"), ({"init": "last"}, "init='last' must be one of zero, first")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EWMADetector(**options)
