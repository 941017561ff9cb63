"""The loader: what a step's batches hold, whoever loads them, and positions."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from datamodules.base.loader import EpochOrder, WholeBatches
from strategies.antdt.rank.exchange import Exchange
from strategies.antdt.rank.loader import Order, SamplerOrder, StepLoader
from strategies.antdt.rank.planner import Allocation, StepPlanner
from strategies.antdt.rank.shard_source import ShardSource
from strategies.antdt.sharding.ledger import DatasetSpec, DataShardingService
from strategies.antdt.sharding.order import SampleOrder

N, B = 23, 4


class Numbers(Dataset):
    """Index, epoch, and a draw of each global generator."""

    epoch = -1

    def __len__(self) -> int:
        return N

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[int, int, float]:
        draws = float(torch.rand(())) + random.random() + float(np.random.random())  # noqa: NPY002  (as users do)
        return index, self.epoch, draws


class Whole(Numbers):
    """Makes whole batches."""

    def batch(self, indices: list[int]) -> Tensor:
        return torch.tensor(indices)


class Ranges(IterableDataset):
    """Samples that can be had by ranges only."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(range(N))

    def __getrange__(self, lo: int, hi: int) -> Iterator[int]:
        return iter(range(lo, hi))


def loader_of(
    dataset: Any, order: Order | None = None, cap: int | None = None, ledger: DataShardingService | None = None,
    shard_steps: int = 1, epoch: Any = lambda: 0, rewind: Any = lambda epoch: None, **options: Any,
) -> StepLoader:  # fmt: skip
    """A loader of the only rank."""
    ledger = ledger or DataShardingService(DatasetSpec(n=N))
    gen = ledger.begin([0])

    def call(op: str, **fields: Any) -> dict[str, Any]:
        answer = ledger.fetch(0, gen, fields["epoch"], tuple(fields["share"]), fields["max"])
        return {answer.state: [list(each) for each in answer.ranges] or True}

    exchange = Exchange(None)
    planner = StepPlanner(
        ShardSource(call, B, shard_steps), lambda e, s, count: exchange.start(e, s, count, 0, 0, 0.0, -1), lambda version: [],
        0, N, Allocation((B,), (cap,)),
    )  # fmt: skip
    return StepLoader(
        DataLoader(dataset, batch_size=B, **options), planner, order or SampleOrder(N, shuffle="none"), epoch=epoch, rewind=rewind
    )


def test_an_epoch_is_the_order_in_batches_of_the_data_set() -> None:
    order = SampleOrder(N, seed=5)
    loader = loader_of(Numbers(), order)
    batches = [batch[0].tolist() for batch in loader]
    assert len(batches) == len(loader) == 6
    assert [index for batch in batches for index in batch] == order.indices(0, 0, N).tolist()
    assert [len(batch) for batch in batches] == [4] * 5 + [3]


def test_the_whole_step_is_at_hand_when_its_first_micro_batch_is_given() -> None:
    loader = loader_of(Numbers(), cap=3)
    for batch in loader:
        step = loader.current
        assert step is not None
        assert batch is step.micros[0]
        assert [micro[0].tolist() for micro in step.micros] == [positions.tolist() for positions in step.positions]
        assert sum(step.counts) == step.plan.count == step.reading.total
        assert max(step.counts) <= 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_draws_are_a_function_of_seed_epoch_and_position(num_workers: int) -> None:
    def draws(**options: Any) -> dict[int, float]:
        loader = loader_of(Numbers(), SampleOrder(N, seed=1), **options)
        micros = [micro for _ in loader for micro in loader.current.micros]  # type: ignore[union-attr]
        return {int(i): float(d) for micro in micros for i, d in zip(micro[0], micro[2], strict=True)}

    torch.manual_seed(1)
    here = draws()
    torch.manual_seed(2)
    assert draws(cap=3, shard_steps=3, num_workers=num_workers) == here
    assert len(set(here.values())) == N


def test_loading_leaves_the_generators_alone() -> None:
    torch.manual_seed(1)
    before = torch.rand(3)
    torch.manual_seed(1)
    list(loader_of(Numbers()))
    assert torch.equal(torch.rand(3), before)


def test_data_sets_that_make_whole_batches_and_ranges() -> None:
    wrapped = WholeBatches(Whole())
    whole = loader_of(wrapped, collate_fn=WholeBatches.collate)
    assert torch.equal(torch.cat(list(whole)), torch.arange(N))
    assert torch.equal(torch.cat(list(loader_of(Ranges()))), torch.arange(N))


def test_order_of_a_sampler_and_epochs_follow_one_another() -> None:
    sampler = EpochOrder(range(N), train=True, seed=3)
    epoch, rewound = [0], []
    loader = loader_of(Numbers(), SamplerOrder(sampler), epoch=lambda: epoch[0], rewind=rewound.append)
    for number in range(3):
        epoch[0] = number
        seen, told = [], set()
        for batch in loader:
            seen += batch[0].tolist()
            told |= set(batch[1].tolist())
            loader.trained()
        assert seen == sampler.order(number).tolist()
        assert told == {number}
        assert loader.state_dict() == {"epoch": number, "samples": N, "length": N}
    assert rewound == [0]  # the first pass; later ones follow


def test_an_epoch_that_was_left_early_is_not_gone_on_with() -> None:
    epoch, rewound = [0], []
    ledger = DataShardingService(DatasetSpec(n=N))

    def rewind(number: int) -> None:
        rewound.append(number)
        ledger.restore({"epoch": number, "todo": [[0, N]]})

    loader = loader_of(Numbers(), epoch=lambda: epoch[0], ledger=ledger, rewind=rewind)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
        loader.trained()
    epoch[0] = 1
    assert [index for batch in loader for index in batch[0].tolist()] == list(range(N))
    assert rewound == [0, 1]


def test_goes_on_from_a_position_of_its_own_epoch_only() -> None:
    ledger = DataShardingService(DatasetSpec(n=N))
    ledger.restore({"epoch": 2, "todo": [[8, N]]})
    loader = loader_of(Numbers(), epoch=lambda: 2, ledger=ledger)
    loader.load_state_dict({"epoch": 2, "samples": 8, "length": N})
    assert loader.state_dict() == {"epoch": 2, "samples": 8, "length": N}
    assert loader.resume() == {"epoch": 2, "samples": 8, "length": N}
    assert [index for batch in loader for index in batch[0].tolist()] == list(range(8, N))

    rewound: list[int] = []
    loader = loader_of(Numbers(), epoch=lambda: 0, rewind=rewound.append)
    loader.load_state_dict({"epoch": 2, "samples": 8, "length": N})
    assert sum(len(batch[0]) for batch in loader) == N
    assert rewound == [0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_sampler_iter_state": None}, "another kind of loader"),
        ({"epoch": 0, "samples": 8, "length": 99}, "over 99 samples"),
        ({"epoch": 0, "samples": 8, "length": N, "retries": {"places": []}}, "put back"),
    ],
)
def test_positions_that_do_not_fit_are_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(Numbers()).load_state_dict(state)
