"""The order of samples is a bijection, whatever the sizes, and ranges of it may be cut anywhere."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.antdt.sharding.order import SampleOrder, Shuffle

MODES = st.sampled_from(["none", "shard", "global"])


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 300), seed=st.integers(0, 2**31), shuffle=MODES, shard=st.integers(1, 70),
    table_limit=st.sampled_from([1, 3, 2**27]), epoch=st.integers(0, 5), data=st.data(),
)  # fmt: skip
def test_positions_and_samples_correspond_one_to_one(
    num_samples: int, seed: int, shuffle: Shuffle, shard: int, table_limit: int, epoch: int, data: st.DataObject
) -> None:
    order = SampleOrder(num_samples, seed, shuffle, shard, table_limit)
    whole = order.indices(epoch, 0, num_samples)
    assert whole.dtype == torch.int64 and sorted(whole.tolist()) == list(range(num_samples))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=4)))
    ends = [0, *cuts, num_samples]
    other = SampleOrder(num_samples, seed, shuffle, shard, table_limit)  # another worker, asked in another way
    parts = [other.indices(epoch, lo, hi) for lo, hi in pairwise(ends)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("table_limit", [1, 2**27])
def test_block_order_reads_one_block_after_another(num_samples: int, table_limit: int) -> None:
    size = 16
    samples = SampleOrder(num_samples, 3, "shard", size, table_limit).indices(0, 0, num_samples).tolist()
    blocks = [sample // size for sample in samples]
    switches = sum(before != after for before, after in pairwise(blocks))
    assert switches == -(-num_samples // size) - 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    for shuffle, limit in (("global", 2**27), ("global", 1), ("shard", 2**27), ("shard", 1)):
        orders = {
            tuple(SampleOrder(200, seed, shuffle, 50, limit).indices(epoch, 0, 200).tolist())
            for seed in (0, 10)
            for epoch in range(3)
        }
        assert len(orders) == 6


def test_global_order_is_that_of_the_distributed_sampler() -> None:
    """Training on one worker sees the samples as under torch's own sampler, so that both can be compared."""
    data = torch.utils.data.TensorDataset(torch.arange(50))
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=4)
    sampler.set_epoch(2)
    assert SampleOrder(50, 4, "global").indices(2, 0, 50).tolist() == list(sampler)


def test_computed_order_is_uniform_enough() -> None:
    """Each sample falls into each quarter of the epoch about equally often (chi-squared, 3 degrees of freedom)."""
    num_samples, epochs = 64, 400
    counts = torch.zeros(num_samples, 4)
    order = SampleOrder(num_samples, 0, "global", table_limit=1)
    for epoch in range(epochs):
        places = torch.empty(num_samples, dtype=torch.int64)
        places[order.indices(epoch, 0, num_samples)] = torch.arange(num_samples)
        counts[torch.arange(num_samples), places // 16] += 1
    chi_squared = ((counts - epochs / 4) ** 2 / (epochs / 4)).sum(1)
    assert chi_squared.mean() < 4.0 and chi_squared.max() < 25.0  # expected 3; 64 values above 25 in 1 of 1000 tests


def test_large_computed_order_stays_within_bounds_and_has_no_repetition() -> None:
    order = SampleOrder(2**40 + 12345, 1, "global")
    samples = order.indices(0, 2**39, 2**39 + 20_000)
    assert len(samples.unique()) == 20_000
    assert int(samples.min()) >= 0 and int(samples.max()) < 2**40 + 12345
    assert abs(samples.double().mean() / 2**39 - 1) < 0.02


@pytest.mark.parametrize("lo, hi, epoch", [(-1, 2, 0), (3, 2, 0), (0, 11, 0), (0, 1, -1)])
def test_positions_outside_are_refused(lo: int, hi: int, epoch: int) -> None:
    with pytest.raises(ValueError, match="positions"):
        SampleOrder(10).indices(epoch, lo, hi)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        SampleOrder(0)
    with pytest.raises(ValueError, match="shard is 0"):
        SampleOrder(5, shard=0)
    with pytest.raises(ValueError, match="shuffle is 'all'"):
        SampleOrder(5, shuffle="all")  # type: ignore[arg-type]
