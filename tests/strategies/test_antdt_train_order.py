"""The order of samples that a training loader asks for, or a refusal: none of its choices is lost in silence."""

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from strategies.antdt.ps.training_data import TrainingData
from strategies.antdt.rank.train_order import Shuffle, train_order

ROWS = TensorDataset(torch.arange(12))


class Buckets(BatchSampler):
    """Draws samples in the usual way, and sorts them into batches in its own."""


class Pairs:
    """Batches that someone has thought about."""

    def __iter__(self) -> Any:
        return iter([[0, 11], [1, 10]])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(("loader", "shuffle", "expected"), [
    (DataLoader(ROWS, batch_size=3), None, "none"),
    (DataLoader(ROWS, batch_size=3, shuffle=True), None, "global"),
    (DataLoader(ROWS, batch_size=3, shuffle=True), "auto", "global"),
    (DataLoader(ROWS, batch_size=3, shuffle=True), "shard", "shard"),
    (DataLoader(ROWS, batch_size=3, sampler=DistributedSampler(ROWS, 2, 0, shuffle=False)), None, "none"),
    (DataLoader(ROWS, batch_size=3, sampler=DistributedSampler(ROWS, 2, 0)), None, "global"),
    (DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 4, False)), "auto", "none"),
    (DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 4, False)), "auto", "global"),
    (DataLoader(ROWS, batch_sampler=Pairs()), "global", "global"),
])  # fmt: skip
def test_order_is_that_of_the_loader_or_what_the_user_has_chosen(
    loader: DataLoader[Any], shuffle: Shuffle | None, expected: str
) -> None:
    order, identity = train_order("Strategy", loader, seed=5, shuffle=shuffle, shard=6)
    assert identity == {"name": "TensorDataset", "n": 12, "seed": 5, "shuffle": expected, "shard": 6}
    drawn = order.indices(0, 0, 12)
    assert sorted(drawn.tolist()) == list(range(12)) and (expected != "none" or drawn.tolist() == list(range(12)))


@pytest.mark.parametrize(("options", "name"), [
    ({"sampler": WeightedRandomSampler([1.0] * 12, 12), "batch_size": 3}, "WeightedRandomSampler"),
    ({"sampler": RandomSampler(ROWS, replacement=True), "batch_size": 3}, "RandomSampler"),
    ({"batch_sampler": BatchSampler(WeightedRandomSampler([1.0] * 12, 12), 3, False)}, "WeightedRandomSampler"),
    ({"sampler": RandomSampler(ROWS, num_samples=5), "batch_size": 3}, "RandomSampler"),
    ({"sampler": SequentialSampler(range(5)), "batch_size": 3}, "SequentialSampler"),
    ({"batch_sampler": Buckets(RandomSampler(ROWS), 3, False)}, "Buckets"),
    ({"batch_sampler": Pairs()}, "Pairs"),
])  # fmt: skip
def test_samplers_that_choose_in_their_own_way_are_refused(options: Any, name: str) -> None:
    loader = DataLoader(ROWS, **options)
    with pytest.raises(ValueError, match=f"{name} chooses samples in its own way.*, or set shuffle to global"):
        train_order("Strategy", loader, seed=5, shuffle="auto")
    with pytest.raises(ValueError, match=f"{name} chooses samples in its own way.* of an epoch\\.$"):
        TrainingData(loader, seed=5, global_batch_size=4, world_size=2, on_drop="lose")
