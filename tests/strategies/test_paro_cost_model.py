"""The cost model of partitions: the paper's cases, monotony, and choices that change with the cluster."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.paro.cost_model import Cluster, Job, LinkSpeed, predict, rank_partitions
from strategies.paro.partition import CODES, Partition

GIGABIT = 1e9 / 8
PAPER = Cluster(32, 8, LinkSpeed(2000 * GIGABIT), LinkSpeed(80 * GIGABIT), memory=80e9)  # its appendix A.3
CASES = {
    "7B": (Job(7e9, micro_batches=10), {
        "NNI": (38.50, 0.360), "NII": (26.25, 0.801), "III": (14.00, 1.733), "IIG": (6.125, 1.733), "NIG": (18.375, 1.978),
        "ING": (18.375, 2.467), "NNG": (30.625, 2.712), "IGG": (4.8125, 14.674), "NGG": (17.0625, 14.919), "GGG": (3.50, 40.688),
    }),
    "65B": (Job(65e9, micro_batches=10), {
        "NNI": (357.5, 3.348), "NII": (243.75, 7.442), "III": (130.0, 16.087), "IIG": (56.875, 16.087), "NIG": (170.6, 18.363),
        "ING": (170.6, 22.913), "NNG": (284.4, 25.188), "IGG": (44.69, 136.256), "NGG": (158.4, 138.531), "GGG": (32.50, 377.812),
    }),
    "65B, a sixteenth trained": (Job(65e9, 65e9 / 16, micro_batches=10), {
        "NNI": (144.2, 0.209), "NII": (137.1, 0.465), "III": (23.36, 9.537), "IIG": (18.79, 9.537), "NIG": (132.5, 1.148),
        "ING": (25.90, 9.963), "NNG": (139.7, 1.574), "IGG": (18.03, 17.047), "NGG": (131.8, 8.658), "GGG": (5.84, 259.746),
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_papers_cases_have_their_memory_and_their_time(case: str) -> None:
    job, expected = CASES[case]
    for code, (gigabytes, seconds) in expected.items():
        cost = predict(Partition.of(code), PAPER, job, "flat")
        assert cost.memory / 1e9 == pytest.approx(gigabytes, rel=5e-4)
        assert cost.communication_seconds == pytest.approx(seconds, abs=6e-4)


def test_hierarchical_collectives_cut_the_papers_times() -> None:
    job = Job(7e9, micro_batches=10)
    seconds = {code: predict(Partition.of(code), PAPER, job, "two_phase").communication_seconds for code in ("GGG", "NNG", "NNN")}
    assert seconds["GGG"] == pytest.approx(5.4, abs=0.05)
    assert seconds["NNG"] == pytest.approx(0.36, abs=0.005)
    assert seconds["NNN"] == pytest.approx(0.36, abs=0.005)


def test_what_the_paper_recommends_comes_out() -> None:
    fitting = {code for code in CODES if predict(Partition.of(code), PAPER, Job(65e9)).fits}
    assert fitting == {"GGG", "IGG", "IIG", "GIG"}
    assert rank_partitions(PAPER, Job(65e9, micro_batches=10), "flat")[0].partition == "IIG"
    tight = dataclasses.replace(PAPER, memory=40e9)
    assert rank_partitions(tight, Job(65e9, micro_batches=10), "flat")[0].partition == "GGG"
    roomy = dataclasses.replace(PAPER, memory=1e12)
    assert rank_partitions(roomy, Job(65e9, micro_batches=10), "flat")[0].partition == "NNI"


def test_equally_fast_partitions_are_ordered_by_memory() -> None:
    codes = [cost.partition for cost in rank_partitions(PAPER, Job(7e9, micro_batches=10), "flat")]
    assert codes.index("IIG") == codes.index("III") - 1


@given(
    st.sampled_from(CODES), st.sampled_from([(4, 2), (8, 2), (32, 8), (6, 3)]), st.floats(0.1, 100), st.integers(1, 10),
    st.sampled_from(["overlapped", "two_phase", "flat"]), st.floats(1.1, 10),
)  # fmt: skip
def test_more_bandwidth_never_costs_time(
    code: str, grid: tuple[int, int], gigabits: float, micro_batches: int, method: str, factor: float
) -> None:
    job = Job(1e9, micro_batches=micro_batches, units=10, root=1e7, compute_seconds=1, overlap=0.5)
    slow = Cluster(*grid, LinkSpeed(1000 * GIGABIT, 1e-6), LinkSpeed(gigabits * GIGABIT, 1e-5))
    fast = dataclasses.replace(slow, inter=LinkSpeed(factor * gigabits * GIGABIT, 1e-5))
    assert (
        predict(Partition.of(code), fast, job, method).step_seconds  # type: ignore[arg-type]
        <= predict(Partition.of(code), slow, job, method).step_seconds  # type: ignore[arg-type]
    )


def test_one_group_and_groups_of_one_need_one_kind_of_link() -> None:
    slow, fast = LinkSpeed(1.0), LinkSpeed(1e12)
    for code in CODES:
        one_group = predict(Partition.of(code), Cluster(4, 4, fast, slow), Job(1e6))
        assert one_group.communication_seconds < 1
        lonely = predict(Partition.of(code), Cluster(4, 1, slow, fast), Job(1e6))
        assert lonely.communication_seconds < 1
        assert predict(Partition.of(code), Cluster(1, 1, slow, slow), Job(1e6)).communication_seconds == 0


def test_overlapped_collectives_are_never_slower_than_two_phases() -> None:
    for n, m in ((4, 2), (8, 2), (8, 4), (32, 8)):
        cluster = Cluster(n, m, LinkSpeed(100 * GIGABIT, 1e-6), LinkSpeed(10 * GIGABIT, 1e-5))
        for num_bytes, calls in itertools.product((1e3, 1e9), (1, 20)):
            assert cluster.world_seconds(num_bytes, calls, "overlapped") <= cluster.world_seconds(num_bytes, calls, "two_phase")


def test_a_shared_card_makes_the_flat_ring_as_bad_as_the_paper_says() -> None:
    for n, m, ratio in ((4, 2, 1.5), (8, 4, 1.75), (8, 2, 7 / 6), (32, 8, 31 / 24), (128, 8, 127 / 120)):
        cluster = Cluster.with_one_card_a_group(n, m, LinkSpeed(1e18), LinkSpeed(1e9))
        assert cluster.world_seconds(1e9, method="flat") / cluster.world_seconds(1e9, method="two_phase") == pytest.approx(ratio)


def test_hidden_communication_costs_nothing() -> None:
    job = Job(1e9, compute_seconds=1000)
    for code in CODES:
        assert predict(Partition.of(code), PAPER, job).step_seconds == 1000
        exposed = predict(Partition.of(code), PAPER, dataclasses.replace(job, overlap=0.0))
        assert exposed.step_seconds == pytest.approx(1000 + exposed.communication_seconds)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinkSpeed(0), "bandwidth=0 must be positive"),
        (lambda: LinkSpeed(1, -1), "latency=-1 not negative"),
        (lambda: Cluster(6, 4, LinkSpeed(1), LinkSpeed(1)), "group_size=4 must divide world_size=6"),
        (lambda: Job(0), "must be positive"),
        (lambda: Job(10, 20), "trainable=20 must lie between 0 and parameters=10"),
        (lambda: Job(10, overlap=2), "overlap=2 must lie in"),
    ],
)
def test_numbers_that_cannot_be_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
