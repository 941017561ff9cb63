"""The budget, the selection against enumeration, and curricula that keep both."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import kpod_schedule
from zoo.kpod.difficulty import Difficulties
from zoo.kpod.schedule import ProgressiveSchedule, budget_curve, objective, select

# Multiples of 1/16: sums are exact. Equal costs and costs of 0 occur.
COSTS = st.lists(st.integers(0, 64).map(lambda number: number / 16), min_size=1, max_size=8)
BETAS = st.sampled_from([0.0, 0.25, 1.0, 12.0])


@st.composite
def instances(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Costs, labels, budget and beta."""
    costs = draw(COSTS)
    labels = draw(st.lists(st.integers(0, 2), min_size=len(costs), max_size=len(costs)))
    budget = draw(st.integers(0, math.ceil(16 * sum(costs)))) / 16
    return torch.tensor(costs, dtype=torch.float64), torch.tensor(labels), budget, draw(BETAS)


def value(cost: torch.Tensor, label: torch.Tensor, chosen: Any, beta: float) -> float:
    """f, the objective without the budget."""
    chosen = torch.as_tensor(chosen, dtype=torch.int64)
    return sum(objective(cost[chosen], label[chosen], 0.0, beta))


def subsets(n: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(n + 1) for chosen in itertools.combinations(range(n), size)]


def by_definition(cost: torch.Tensor, label: torch.Tensor, budget: float, beta: float, augment: bool) -> list[int]:
    """Greedy+ straight from its definition: one question at a time, each compared with all others."""

    def gain(chosen: list[int], i: int) -> float:
        m = sum(int(label[j] == label[i]) for j in chosen)
        return float(cost[i]) + beta / (math.sqrt(m + 1) + math.sqrt(m))

    def density(chosen: list[int], i: int) -> float:
        more = gain(chosen, i) - float(cost[i])
        return math.inf if beta and not cost[i] else more / float(cost[i]) if cost[i] else 0.0

    prefixes: list[list[int]] = [[]]
    rest = list(range(len(cost)))
    while rest:
        chosen = prefixes[-1]
        i = max(rest, key=lambda i: (density(chosen, i), -float(cost[i]), -i))
        rest.remove(i)
        if float(cost[[*chosen, i]].sum()) <= budget:
            prefixes.append([*chosen, i])
    best = prefixes[-1]
    for prefix in prefixes if augment else []:
        for i in set(range(len(cost))) - set(prefix):
            if float(cost[[*prefix, i]].sum()) <= budget and value(cost, label, [*prefix, i], beta) > value(
                cost, label, best, beta
            ):
                best = [*prefix, i]
    return sorted(best)


@given(instances())
def test_gain_of_a_question_is_monotone_and_submodular(instance: tuple[torch.Tensor, torch.Tensor, float, float]) -> None:
    cost, label, budget, beta = (x[:5] if isinstance(x, torch.Tensor) else x for x in instance)
    none = torch.zeros(0, dtype=torch.int64)
    assert sum(objective(cost[none], label[none], budget, beta)) == -budget
    values = {frozenset(chosen): value(cost, label, chosen, beta) for chosen in subsets(len(cost))}
    for chosen, i in itertools.product(values, range(len(cost))):
        if i in chosen:
            continue
        gain = values[chosen | {i}] - values[chosen]
        m = sum(int(label[j] == label[i]) for j in chosen)
        assert gain == pytest.approx(float(cost[i]) + beta * (math.sqrt(m + 1) - math.sqrt(m)), abs=1e-12)
        for j in chosen:
            assert gain <= values[chosen - {j} | {i}] - values[chosen - {j}] + 1e-12


@settings(deadline=None)
@given(instances())
def test_selection_fits_and_is_at_least_half_of_the_best(instance: tuple[torch.Tensor, torch.Tensor, float, float]) -> None:
    cost, label, budget, beta = instance
    chosen = select(*instance)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and float(cost[chosen].sum()) <= budget
    best = max(value(cost, label, other, beta) for other in subsets(len(cost)) if float(cost[list(other)].sum()) <= budget)
    assert value(cost, label, chosen, beta) >= best / 2 - 1e-12


@settings(deadline=None)
@given(instances())
def test_sorted_order_and_bisection_are_greedy_plus(instance: tuple[torch.Tensor, torch.Tensor, float, float]) -> None:
    cost, label, _, beta = instance
    assert select(*instance, augment=False).tolist() == by_definition(*instance, augment=False)
    found, expected = (value(cost, label, chosen, beta) for chosen in (select(*instance), by_definition(*instance, augment=True)))
    assert found == pytest.approx(expected, abs=1e-12)


def test_one_large_question_beats_the_greedy_set() -> None:
    cost, label = torch.tensor([0.001, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    assert select(cost, label, 1.0, 0.0, augment=False).tolist() == [0]
    assert select(cost, label, 1.0, 0.0).tolist() == [1]


@settings(deadline=None)
@given(instances(), st.randoms())
def test_limits_of_budget_and_beta(instance: tuple[torch.Tensor, torch.Tensor, float, float], random: Any) -> None:
    cost, label, budget, beta = instance
    assert select(cost, label, float(cost.sum()), beta).tolist() == list(range(len(cost)))
    assert select(cost + 1, label, 0.0, beta).tolist() == select(cost, label, -1.0, beta).tolist() == []
    shuffled = label[random.sample(range(len(label)), len(label))]
    assert select(cost, label, budget, 0.0).tolist() == select(cost, shuffled, budget, 0.0).tolist()
    one = torch.zeros_like(label)
    smallest = cost.sort(stable=True).indices[: int((cost.sort().values.cumsum(0) <= budget).sum())]
    assert select(cost, one, budget, beta, augment=False).tolist() == smallest.sort().values.tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 40))
def test_clusters_are_chosen_evenly_for_a_large_beta(labels: list[int], count: int) -> None:
    label = torch.tensor(labels)
    chosen = select(torch.ones(len(labels), dtype=torch.float64), label, float(count), 1e9)
    taken, there = label[chosen].bincount(minlength=4), label.bincount(minlength=4)
    assert len(chosen) == min(count, len(labels))
    open_clusters = taken < there  # a cluster that is used up may stay behind
    assert taken.max() - taken[open_clusters].min() <= 1 if open_clusters.any() else torch.equal(taken, there)


def test_ties_go_to_the_smaller_cost_and_then_to_the_smaller_index() -> None:
    cost = torch.tensor([2.0, 1.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    assert select(cost, torch.tensor([0, 1, 2, 3, 4]), 2.0, 0.0).tolist() == [1, 2]
    assert select(cost, torch.tensor([0, 0, 1, 1, 0]), 2.0, 1.0).tolist() == [1, 2]
    # An addition to the empty prefix: the first of the dearest ones.
    assert select(torch.tensor([0.5, 2.0, 2.0], dtype=torch.float64), torch.tensor([0, 0, 0]), 2.25, 0.0).tolist() == [1]
    assert select(torch.tensor([0.5, 2.0, 2.0], dtype=torch.float64), torch.tensor([0, 2, 1]), 2.25, 0.0).tolist() == [1]


@given(st.floats(0.1, 1e6), st.integers(1, 30), st.floats(0, 3), st.floats(0, 0.99))
def test_budget_grows_from_its_share_to_everything(total: float, stages: int, p: float, c0: float) -> None:
    budget = budget_curve(total, stages, p, c0)
    assert len(budget) == stages + 1 and float(budget[-1]) == total and float(budget[0]) == pytest.approx(c0 * total)
    steps = budget.diff()
    assert (steps > 0).all() and (steps.diff() >= -1e-9 * total).all()
    rate = (total - c0 * total) * (p + 1) / stages ** (p + 1)  # the paper's u
    by_slope = rate * torch.arange(stages + 1, dtype=torch.float64) ** (p + 1) / (p + 1) + c0 * total
    torch.testing.assert_close(budget, by_slope, rtol=1e-12, atol=1e-9 * total)
    if p == 0:
        torch.testing.assert_close(steps, torch.full_like(steps, float(steps[0])), rtol=1e-9, atol=1e-9 * total)


def questions(seed: int, count: int = 40) -> tuple[list[list[float]], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [7, *torch.randint(1, 8, (count - 1,), generator=generator).tolist()]
    rows = [torch.rand(length, generator=generator, dtype=torch.float64).mul(2).tolist() for length in lengths]
    return rows, torch.randint(4, (count,), generator=generator).tolist()


PLANNERS = st.builds(
    ProgressiveSchedule,
    stages=st.integers(1, 9),
    p=st.floats(0, 2),
    c0=st.floats(0, 1),
    beta=st.sampled_from([0.0, 12.0]),
    delta_s=st.sampled_from([1, 2, 3, "auto"]),
    init=st.sampled_from(["greedy", "proportional"]),
)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), PLANNERS)
def test_curriculum_keeps_to_its_budget(seed: int, planner: ProgressiveSchedule) -> None:
    rows, labels = questions(seed)
    schedule, stages = planner.plan(rows, labels), planner.stages
    given_, most = schedule.given.long(), planner.delta_s if planner.delta_s != "auto" else math.ceil(7 / stages)
    assert given_.shape == (stages + 1, len(rows)) and (given_ >= 0).all()
    assert (given_[0] <= torch.tensor([len(row) for row in rows])).all()
    change = -given_.diff(dim=0)
    assert (change >= 0).all() and (change <= most).all()
    assert ((change == most) | (given_[1:] == 0) | (change == 0)).all()
    reached = torch.tensor([sum(sum(row[c:]) for row, c in zip(rows, stage, strict=True)) for stage in given_.tolist()])
    torch.testing.assert_close(schedule.reached, reached.double(), rtol=1e-5, atol=1e-5)
    assert (schedule.reached <= schedule.budget + 1e-9).all()
    torch.testing.assert_close(schedule.budget, budget_curve(float(schedule.total), stages, planner.p, planner.c0))
    torch.testing.assert_close(schedule.budget_term, schedule.reached[1:] - schedule.budget[1:])
    spread = [sum(math.sqrt(n) for n in torch.tensor(labels)[row > 0].bincount().tolist()) for row in change]
    torch.testing.assert_close(schedule.diversity_term, planner.beta * torch.tensor(spread, dtype=torch.float64))
    assert schedule.steps_left == int(given_[-1].sum())


def test_enough_steps_a_stage_reach_everything() -> None:
    rows, labels = questions(0)
    for delta_s in (7, 100):
        schedule = ProgressiveSchedule(1, delta_s=delta_s).plan(rows, labels)
        assert schedule.steps_left == 0 and torch.equal(schedule.reached[-1], schedule.total)
    everything = ProgressiveSchedule(3, c0=1.0).plan(rows, labels)
    assert not everything.given.any()


def test_starts() -> None:
    rows, labels = [[1.0, 1.0, 1.0, 1.0], [8.0, 1.0, 1.0], [1.0, 9.0]], [0, 0, 0]
    starts = {init: ProgressiveSchedule(4, c0=0.25, beta=0.0, init=init).plan(rows, labels).given[0].tolist()
              for init in ("greedy", "proportional", "last_step")}  # fmt: skip
    # B = 24, C0 = 6: steps of 1 first, a pass for each, then nothing fits.
    assert starts == {"greedy": [0, 1, 2], "proportional": [3, 1, 2], "last_step": [3, 2, 1]}
    none = ProgressiveSchedule(4, c0=0.0).plan(rows, labels)
    assert none.given[0].tolist() == [4, 3, 2] and none.reached[0] == 0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.randoms())
def test_order_of_the_questions_does_not_matter(seed: int, random: Any) -> None:
    rows, labels = questions(seed)
    order = random.sample(range(len(rows)), len(rows))
    planner = ProgressiveSchedule(5)
    schedule, again = planner.plan(rows, labels), planner.plan(Difficulties.of_rows(rows), torch.tensor(labels))
    moved = planner.plan([rows[i] for i in order], [labels[i] for i in order])
    for one, two in zip(schedule, again, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(moved.given, schedule.given[:, order]) and torch.equal(moved.reached, schedule.reached)


def test_a_start_above_the_budget_waits_for_it() -> None:
    rows, labels = [[0.1, 0.1, 9.8]] * 4, [0, 0, 1, 1]
    schedule = ProgressiveSchedule(10, init="last_step").plan(rows, labels)
    waits = schedule.budget[1:] < schedule.reached[:-1]
    changed = schedule.given.long().diff(dim=0).any(1)
    assert waits.any() and not changed[waits].any() and changed.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0}, "stages=0 must be at least 1"),
        ({"stages": 2, "c0": 1.5}, r"c0=1.5 in \[0, 1\]"),
        ({"stages": 2, "p": -0.5}, "p=-0.5"),
        ({"stages": 2, "beta": math.nan}, "beta=nan"),
        ({"stages": 2, "delta_s": 0}, "delta_s=0 must be at least 1 or auto"),
        ({"stages": 2, "init": "random"}, "init='random' one of greedy, proportional, last_step"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveSchedule(**options)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([[1.0], []], [0, 0], "question 1 has no step"),
        ([], [], "there are no questions"),
        ([[1.0], [-1.0]], [0, 0], "a difficulty is negative or not finite"),
        ([[1.0], [math.nan]], [0, 0], "a difficulty is negative or not finite"),
        ([[1.0], [2.0]], [0], r"\(1,\) labels of torch.int64 for 2 questions"),
        ([[1.0], [2.0]], [0.5, 1.0], "labels of torch.float32"),
    ],
)
def test_questions_that_have_no_curriculum_are_refused(rows: list[list[float]], labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveSchedule(2).plan(rows, labels)


def test_benchmark_compares_with_the_best_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problem = torch.tensor([0.25, 1.0], dtype=torch.float64), torch.tensor([0, 0]), 1.0, 0.0
    assert [kpod_schedule.over_best(problem, augment) for augment in (False, True)] == [0.25, 1.0]
    rows = json.loads(kpod_schedule.main(["--smoke"]).read_text())["rows"]
    left = {row["setting"]: row["steps_left"] for row in rows if "setting" in row}
    settings = [f"T {stages}, delta_s {delta_s}" for stages in (10, 4) for delta_s in (1, 2)]
    assert list(left) == [f"{kind}, {setting}" for kind in ("synthetic", "GSM-Symbolic") for setting in settings]
    assert all(steps > 0 for steps in left.values())
