"""The steps of an epoch: as many as they must be, each sample once, and changes of plan in the same step everywhere."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.antdt.control.actions import AdjustBatch, Versioned
from strategies.antdt.rank.exchange import Reading
from strategies.antdt.rank.planner import Allocation, StepPlan, StepPlanner
from strategies.antdt.rank.shard_source import ShardSource
from strategies.antdt.sharding.ledger import DatasetSpec, DataShardingService


class Ranks:
    """Ranks in one process, taking turns at random, before a real ledger."""

    def __init__(self, num_samples: int, batch: tuple[int, ...], shard_steps: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.ledger = DataShardingService(DatasetSpec(n=num_samples))
        self.world = len(batch)
        self.gen = self.ledger.begin(range(self.world))
        self.said: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
        self.received = [0] * self.world  # newest decision that each rank has
        self.decisions: list[Versioned] = []
        self.given = [0] * self.world
        allocation = Allocation(batch, (None,) * self.world)
        self.sources = [ShardSource(self._call_of(rank), sum(batch), shard_steps) for rank in range(self.world)]
        self.planners = [
            StepPlanner(self.sources[r], self._announce_of(r), self._decisions_of(r), r, num_samples, allocation)
            for r in range(self.world)
        ]

    def _call_of(self, rank: int) -> Callable[..., dict[str, Any]]:
        def call(op: str, **fields: Any) -> dict[str, Any]:
            if op == "release":
                self.ledger.release(rank, self.gen, fields["sid"], fields["from"])
                return {}
            answer = self.ledger.fetch(rank, self.gen, fields["epoch"], tuple(fields["share"]), fields["max"])
            return {answer.state: [list(each) for each in answer.ranges] if answer.ranges else True}

        return call

    def _announce_of(self, rank: int) -> Callable[[int, int, int], Callable[[], Reading]]:
        def announce(epoch: int, step: int, count: int) -> Callable[[], Reading]:
            said = self.said.setdefault((epoch, step), {})
            said[rank] = (count, self.received[rank])

            def answer() -> Reading:
                assert len(said) == self.world, f"rank {rank} would wait for ever in step {step}: {said}"
                counts, versions = zip(*(said[r] for r in range(self.world)), strict=True)
                return Reading(counts, min(versions), 0, (0.0,) * self.world, -1)

            return answer

        return announce

    def _decisions_of(self, rank: int) -> Callable[[int], list[Versioned]]:
        def decisions(version: int) -> list[Versioned]:
            new = [each for each in self.decisions if self.given[rank] < each.version <= version]
            self.given[rank] = max(self.given[rank], version)
            return new

        return decisions

    def decide(self, batch: tuple[int, ...]) -> None:
        version = len(self.decisions) + 1
        self.decisions.append(Versioned(version, AdjustBatch(batch, (None,) * self.world)))

    def step(self) -> list[StepPlan] | None:
        """All ranks plan a step, in a random order, hearing of decisions at random moments."""
        plans: dict[int, StepPlan | None] = {}
        for rank in self.chance.sample(range(self.world), self.world):
            if self.chance.random() < 0.5:
                self.received[rank] = len(self.decisions)
            plans[rank] = self.planners[rank].plan()
            for source in self.sources:
                if self.chance.random() < 0.3:
                    source.refill()
        if any(plan is None for plan in plans.values()):
            assert all(plan is None for plan in plans.values())
            return None
        done = [plan for _, plan in sorted(plans.items()) if plan is not None]
        for rank, plan in enumerate(done):
            self.sources[rank].trained(plan.pieces)
            self.ledger.commit(rank, self.gen, self.sources[rank].commits())
        self.ledger.check()
        return done

    def epoch(self, number: int, changes: Callable[[int], tuple[int, ...] | None] = lambda step: None) -> list[list[StepPlan]]:
        for planner in self.planners:
            planner.begin(number)
        steps = []
        while True:
            batch = changes(len(steps))
            if batch is not None:
                self.decide(batch)
            plans = self.step()
            if plans is None:
                return steps
            steps.append(plans)


def positions(steps: list[list[StepPlan]]) -> list[int]:
    return sorted(p for plans in steps for plan in plans for piece in plan.pieces for p in range(piece.lo, piece.hi))


def shared_out(chance: random.Random, total: int, world: int, least: int = 0) -> tuple[int, ...]:
    cuts = sorted(chance.randint(0, total - least * world) for _ in range(world - 1))
    return tuple(b - a + least for a, b in zip([0, *cuts], [*cuts, total - least * world], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 300), world=st.integers(1, 5), extra=st.integers(0, 30), shard_steps=st.integers(1, 8),
    often=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_an_epoch_has_exactly_as_many_steps_as_it_must(
    num_samples: int, world: int, extra: int, shard_steps: int, often: float, seed: int
) -> None:
    """Static batches, changes now and then, and changes in every step, batches of 0 among them."""
    chance = random.Random(seed)
    batch = shared_out(chance, world + extra, world)
    ranks = Ranks(num_samples, batch, shard_steps, seed)
    for epoch in range(2):
        steps = ranks.epoch(epoch, lambda step: shared_out(chance, world + extra, world) if chance.random() < often else None)
        assert len(steps) == -(-num_samples // (world + extra))
        assert positions(steps) == list(range(num_samples))
        assert all(sum(plan.count for plan in plans) > 0 for plans in steps)
        assert ranks.ledger.counts()[epoch] | {"lost": 0, "repeated": 0} == ranks.ledger.counts()[epoch]
        assert ranks.ledger.counts()[epoch]["done"] == num_samples


@pytest.mark.parametrize("slow", [0, 3])
def test_all_but_one_rank_hand_everything_over_and_back(slow: int) -> None:
    """The worst that a controller could do: all of the batch to one rank, then all of it away."""
    ranks = Ranks(1000, (16, 16, 16, 16), 20, seed=slow)
    alone = tuple(61 if rank == slow else 1 for rank in range(4))
    others = tuple(1 if rank == slow else 21 for rank in range(4))
    steps = ranks.epoch(0, lambda step: alone if step % 4 == 0 else others if step % 4 == 2 else None)
    assert len(steps) == 16
    assert positions(steps) == list(range(1000))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), world=st.integers(2, 5))
def test_decisions_come_into_force_in_the_same_step_everywhere(seed: int, world: int) -> None:
    """Though each rank hears of them when it does; and versions never go back."""
    chance = random.Random(seed)
    ranks = Ranks(400, shared_out(chance, 4 * world, world, 1), 5, seed)
    steps = ranks.epoch(0, lambda step: shared_out(chance, 4 * world, world, 1) if chance.random() < 0.3 else None)
    before = 0
    for plans in steps:
        assert len({plan.allocation for plan in plans}) == 1
        assert len({plan.decisions for plan in plans}) == 1
        assert plans[0].answer().version >= before
        assert all(plan.count <= plan.allocation.batch[rank] for rank, plan in enumerate(plans))
        before = plans[0].answer().version
    decided = [decision for plans in steps for decision in plans[0].decisions]
    assert [each.version for each in decided] == list(range(1, len(decided) + 1))


def test_with_one_step_a_shard_global_batches_are_those_of_one_process() -> None:
    ranks = Ranks(103, (3, 4, 1), 1, seed=0)
    steps = ranks.epoch(0, lambda step: (1, 1, 6) if step == 5 else None)
    for number, plans in enumerate(steps):
        assert positions([plans]) == list(range(8 * number, min(8 * number + 8, 103)))


def test_fewer_samples_than_ranks() -> None:
    ranks = Ranks(2, (1, 1, 1, 1), 20, seed=0)
    (plans,) = ranks.epoch(0)
    assert sorted(plan.count for plan in plans) == [0, 0, 1, 1]


def test_goes_on_within_an_epoch() -> None:
    ranks = Ranks(100, (5, 3), 4, seed=1)
    ranks.ledger.restore({"epoch": 3, "todo": [[10, 20], [60, 100]]})
    for planner in ranks.planners:
        planner.begin(3, consumed=50)
    steps = []
    while (plans := ranks.step()) is not None:
        steps.append(plans)
    assert [plans[0].step for plans in steps] == list(range(13 - 7, 13))
    assert positions(steps) == [*range(10, 20), *range(60, 100)]


def test_a_plan_for_other_ranks_is_refused() -> None:
    ranks = Ranks(100, (5, 3), 4, seed=1)
    ranks.received = [1, 1]
    ranks.decide((4, 3))
    with pytest.raises(RuntimeError, match="shares out 7 samples among 2 ranks"):
        ranks.epoch(0)
