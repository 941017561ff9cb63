"""Exact solvers against brute force, their closed forms and limits (identities of section 6, item 3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.antdt.control.cluster_view import step_seconds
from strategies.antdt.control.solvers import balance, balance_micro

COST = st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0, 3.0, 7.0])
FIXED = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.25])


def slowest(fixed: Sequence[float], cost: Sequence[float], batch: Sequence[int], cap: Sequence[int | None]) -> float:
    """Like `step_seconds`, but that no samples take no micro-batch where micro-batches are solved for."""
    return max(step_seconds(fixed, cost, batch, cap))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[float], int, list[int], list[int | None]]:
    count, total = draw(st.integers(1, 3)), draw(st.integers(1, 18))
    low = [draw(st.integers(0, 2)) for _ in range(count)]
    high = [draw(st.one_of(st.none(), st.integers(least, 18))) for least in low]
    return [draw(FIXED) for _ in low], [draw(COST) for _ in low], total, low, high


@given(problems())
@settings(max_examples=60, deadline=None)
def test_balance_is_the_best_of_all_batches(problem: tuple[list[float], list[float], int, list[int], list[int | None]]) -> None:
    fixed, cost, total, low, high = problem
    spans = [range(least, (total if most is None else min(most, total)) + 1) for least, most in zip(low, high, strict=True)]
    possible = [batch for batch in itertools.product(*spans) if sum(batch) == total]
    if not possible:
        with pytest.raises(ValueError, match="do not fit"):
            balance(fixed, cost, total, low, high)
        return
    none = [None] * len(cost)
    found = balance(fixed, cost, total, low, high)
    assert tuple(found) in possible
    assert slowest(fixed, cost, found, none) == pytest.approx(min(slowest(fixed, cost, each, none) for each in possible))


@given(st.data(), st.integers(1, 3), st.integers(3, 18))
@settings(max_examples=60, deadline=None)
def test_balance_micro_is_the_best_of_all_batches(data: st.DataObject, count: int, total: int) -> None:
    fixed, cost = ([data.draw(kind) for _ in range(count)] for kind in (FIXED, COST))
    cap = [data.draw(st.one_of(st.none(), st.integers(1, 6))) for _ in range(count)]
    found, micros = balance_micro(fixed, cost, cap, total, [1] * count)
    possible = [batch for batch in itertools.product(range(1, total + 1), repeat=count) if sum(batch) == total]
    assert tuple(found) in possible
    assert micros == [1 if most is None else -(-n // most) for n, most in zip(found, cap, strict=True)]
    assert slowest(fixed, cost, found, cap) == pytest.approx(min(slowest(fixed, cost, each, cap) for each in possible))


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=6))
def test_without_fixed_costs_batches_are_in_proportion_to_speed(cost: list[int]) -> None:
    total = 12 * sum(12 // c for c in cost)
    found = balance([0.0] * len(cost), [float(c) for c in cost], total, [1] * len(cost), [None] * len(cost))
    assert found == [12 * (12 // c) for c in cost]


def test_speed_up_over_equal_batches_is_the_closed_form() -> None:
    cost = [1.0, 1.0, 1.0, 4.0]
    batch = balance([0.0] * 4, cost, 52, [1] * 4, [None] * 4)
    assert batch == [16, 16, 16, 4]
    assert 13 * 4.0 / 16 == 3.25 == 4.0 * sum(1 / c for c in cost) / 4


@given(st.lists(st.tuples(FIXED, COST), min_size=2, max_size=5), st.integers(5, 40), st.sampled_from([1.01, 1.5, 4.0]), st.data())
@settings(deadline=None)
def test_whoever_gets_slower_never_gets_more(
    nodes: list[tuple[float, float]], total: int, factor: float, data: st.DataObject
) -> None:
    fixed, cost = [a for a, _ in nodes], [c for _, c in nodes]
    node = data.draw(st.integers(0, len(nodes) - 1))
    slower = [c * factor if i == node else c for i, c in enumerate(cost)]
    before, after = (balance(fixed, each, total, [1] * len(cost), [None] * len(cost)) for each in (cost, slower))
    assert sum(after) == total and after[node] <= before[node]


@given(st.lists(COST, min_size=1, max_size=5), st.integers(5, 60))
@settings(deadline=None)
def test_without_caps_and_fixed_costs_both_problems_are_the_same(cost: list[float], total: int) -> None:
    none, least = [None] * len(cost), [1] * len(cost)
    batch, micros = balance_micro([0.0] * len(cost), cost, none, total, least)
    assert batch == balance([0.0] * len(cost), cost, total, least, none) and set(micros) == {1}


def test_known_answer_of_two_classes() -> None:
    fixed, cost, cap = [0.010] * 4 + [0.015] * 4, [0.0025] * 4 + [0.0075] * 4, [128] * 4 + [96] * 4
    batch, micros = balance_micro(fixed, cost, cap, 768, [1] * 8)
    assert batch == [144] * 4 + [48] * 4 and micros == [2] * 4 + [1] * 4
    assert slowest(fixed, cost, batch, cap) == pytest.approx(0.380)
    assert slowest(fixed, cost, [96] * 8, cap) == pytest.approx(0.735)


def test_ten_thousand_workers_are_solved_in_whole_samples() -> None:
    cost = [0.01 * (1 + i % 7) for i in range(10_000)]
    batch = balance([0.0] * 10_000, cost, 1_000_000, [1] * 10_000, [None] * 10_000)
    times = [c * n for c, n in zip(cost, batch, strict=True)]
    assert sum(batch) == 1_000_000
    # Nobody could take one sample more and still be earlier than the slowest: no better batches exist.
    assert min(t + c for t, c in zip(times, cost, strict=True)) >= max(times)


@pytest.mark.parametrize(
    ("fixed", "cost", "total", "low", "message"),
    [
        ([0.0], [1.0, 2.0], 4, [1, 1], "equally many"),
        ([-1.0, 0.0], [1.0, 2.0], 4, [1, 1], "must not be negative"),
        ([0.0, 0.0], [1.0, 0.0], 4, [1, 1], "costs positive"),
        ([0.0, 0.0], [1.0, 1.0], 1, [1, 1], "do not fit"),
    ],
)
def test_impossible_problems_are_refused(fixed: list[float], cost: list[float], total: int, low: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balance(fixed, cost, total, low, [None, None])
    with pytest.raises(ValueError, match=message):
        balance_micro(fixed, cost, [None, None], total, low)


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        balance_micro([0.0], [1.0], [0], 4, [1])
