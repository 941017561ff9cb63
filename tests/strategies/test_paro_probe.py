"""The probe finds bandwidth and latency from times alone."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from distributed import RankPool

from strategies.paro.cost_model import Cluster, LinkSpeed
from strategies.paro.grid import RankGrid
from strategies.paro.probe import link_of, measure_cluster


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_times_of_a_ring_give_its_link_back(num_processes: int) -> None:
    link = LinkSpeed(1e8, 2e-4)
    cluster = Cluster(num_processes, num_processes, link, link)
    times = [(size, cluster.intra_seconds(size)) for size in (1e4, 1e7)]
    found = link_of(*times, num_processes)
    assert found.bandwidth == pytest.approx(link.bandwidth)
    assert found.latency == pytest.approx(link.latency)


def test_times_that_say_nothing_give_a_fast_link_and_no_error() -> None:
    found = link_of((1e4, 0.002), (1e7, 0.001), 2)
    assert found.bandwidth > 1e9
    assert found.latency > 0


def probe(group_size: int) -> Cluster:
    return measure_cluster(RankGrid(group_size), sizes=(1 << 10, 1 << 16), repetitions=2, memory=1e9)


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_all_ranks_find_the_same_cluster(pool: RankPool, group_size: int) -> None:
    clusters = pool.run(probe, group_size, world_size=4)
    assert clusters == [clusters[0]] * 4
    assert (clusters[0].world_size, clusters[0].group_size, clusters[0].memory) == (4, group_size, 1e9)
    assert (clusters[0].flat is not None) == (group_size == 2)


def ticking() -> Cluster:
    """The slow rank's clock counts double."""
    ticks = iter(range(10**6))
    step = 1 + dist.get_rank()
    return measure_cluster(RankGrid(2), sizes=(1 << 10, 1 << 16), repetitions=3, clock=lambda: step * float(next(ticks)))


def test_the_slowest_rank_counts(pool: RankPool) -> None:
    clusters = pool.run(ticking, world_size=4)
    assert clusters == [clusters[0]] * 4
    assert clusters[0].inter.latency == pytest.approx(4, rel=0.02)  # one step of a ring took 4 of its ticks


def test_sizes_must_ascend() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        link_of((2.0, 1.0), (1.0, 1.0), 2)
