"""The ledger of samples: every position is at one place at any time, and what is lost or repeated is what the semantics say."""

import json
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from strategies.antdt.sharding.ledger import DatasetSpec, DataShardingService, LedgerError, Range, StaleGeneration, from_dlrover

WORKERS = 3


class Machine(RuleBasedStateMachine):
    """Any sequence of requests, beside a model that keeps the state of every single position."""

    @initialize(
        n=st.integers(1, 40), epochs=st.integers(1, 3), tail=st.sampled_from([1.0, 2.0, 3.5]),
        semantics=st.sampled_from(["exactly_once", "at_least_once", "at_least_once_batch", "at_most_once"]),
    )  # fmt: skip
    def start(self, n: int, epochs: int, tail: float, semantics: str) -> None:
        self.ledger = DataShardingService(DatasetSpec(n, epochs=epochs), semantics, tail)  # type: ignore[arg-type]
        self.gens = dict.fromkeys(range(WORKERS), self.ledger.begin(range(WORKERS)))
        self.held: dict[int, tuple[int, int, list[int], int]] = {}  # sid: worker, epoch, positions, how many committed
        self.done: dict[int, set[int]] = {0: set()}  # positions trained, or given up
        self.asks = dict.fromkeys(range(WORKERS), 0)

    @rule(worker=st.integers(0, WORKERS - 1), own=st.integers(1, 8), most=st.integers(0, 15))
    def fetch(self, worker: int, own: int, most: int) -> None:
        epoch = self.asks[worker]
        got = self.ledger.fetch(worker, self.gens[worker], epoch, (own, 16), most)
        assert sum(hi - lo for _, lo, hi in got.ranges) <= most
        if got.state == "end":
            in_hands = sum(len(positions) - committed for _, e, positions, committed in self.held.values() if e == epoch)
            if epoch < self.ledger.dataset.epochs:
                assert in_hands == 0 or self.ledger.semantics == "exactly_once"
            self.asks[worker] = min(epoch + 1, max(self.done) + 1)
        for sid, lo, hi in got.ranges:
            assert sid not in self.held
            self.held[sid] = (worker, epoch, list(range(lo, hi)), 0)
            self.done.setdefault(epoch, set())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(sorted(self.held)))
        worker, epoch, positions, committed = self.held[sid]
        count = data.draw(st.integers(0, len(positions)))
        for _ in range(data.draw(st.integers(1, 2))):  # a retry changes nothing
            self.ledger.commit(worker, self.gens[worker], [(sid, positions[0] + count)])
        self.done[epoch] |= set(positions[:count])
        self.held[sid] = (worker, epoch, positions, max(count, committed))
        if count == len(positions):
            del self.held[sid]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(sorted(self.held)))
        worker, epoch, positions, committed = self.held[sid]
        count = data.draw(st.integers(committed, len(positions)))
        for _ in range(data.draw(st.integers(1, 2))):
            self.ledger.release(worker, self.gens[worker], sid, positions[0] + count)
        self.held[sid] = (worker, epoch, positions[:count], committed)
        if count == committed:
            del self.held[sid]

    @rule(worker=st.integers(0, WORKERS - 1), graceful=st.booleans())
    def come_again(self, worker: int, graceful: bool) -> None:
        if graceful:
            self.ledger.leave(worker, self.gens[worker])
            self.drop(worker, "exactly_once")
        self.drop(worker, self.ledger.semantics)
        former = self.gens[worker]
        self.gens[worker] = self.ledger.join(worker)
        with pytest.raises(StaleGeneration):
            self.ledger.fetch(worker, former, 0, (1, 1), 1)

    @rule()
    def group_restarts_from_a_checkpoint(self) -> None:
        snapshot = json.loads(json.dumps(self.ledger.snapshot()))
        for worker in range(WORKERS):
            self.drop(worker, self.ledger.semantics)
        self.gens = dict.fromkeys(range(WORKERS), self.ledger.begin(range(WORKERS)))
        self.ledger.restore(snapshot)
        assert {**self.ledger.snapshot()} == snapshot
        number = snapshot["epoch"]
        self.held.clear()
        self.done = {epoch: done for epoch, done in self.done.items() if epoch < number}
        for epoch, todo in [[number, snapshot["todo"]], *snapshot["later"]]:
            rest = {position for lo, hi in todo for position in range(lo, hi)}
            self.done[epoch] = set(range(self.ledger.dataset.n)) - rest
        self.asks = dict.fromkeys(range(WORKERS), number)

    @rule()
    def server_is_restarted(self) -> None:
        state = json.loads(json.dumps(self.ledger.state_dict()))
        other = DataShardingService(self.ledger.dataset, self.ledger.semantics, self.ledger.tail_factor)
        other.load_state_dict(state)
        assert other.state_dict() == self.ledger.state_dict()
        self.ledger = other

    def drop(self, worker: int, semantics: str) -> None:
        for sid, (owner, epoch, positions, _) in list(self.held.items()):
            if owner == worker:
                if semantics == "at_most_once":
                    self.done[epoch] |= set(positions)
                elif semantics == "at_least_once":
                    self.done[epoch] -= set(positions)
                del self.held[sid]

    @invariant()
    def every_position_is_at_one_place(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        counts = self.ledger.counts()
        for epoch, state in counts.items():
            assert state["done"] == len(self.done.get(epoch, ()))
        snapshot = self.ledger.snapshot()
        for epoch, todo in [[snapshot["epoch"], snapshot["todo"]], *snapshot["later"]]:
            rest = [position for lo, hi in todo for position in range(lo, hi)]
            assert rest == sorted(set(range(self.ledger.dataset.n)) - self.done[epoch])


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase


def group(n: int, semantics: str = "exactly_once", epochs: int = 1, workers: int = 2) -> tuple[DataShardingService, int]:
    ledger = DataShardingService(DatasetSpec(n, epochs=epochs), semantics)  # type: ignore[arg-type]
    return ledger, ledger.begin(range(workers))


@pytest.mark.parametrize(
    "semantics, lost, repeated, again",
    [
        ("exactly_once", 0, 0, [(6, 20)]),
        ("at_least_once_batch", 0, 0, [(6, 20)]),
        ("at_least_once", 0, 6, [(0, 20)]),
        ("at_most_once", 14, 0, []),
    ],
)
def test_what_becomes_of_a_lost_range(semantics: str, lost: int, repeated: int, again: list[tuple[int, int]]) -> None:
    ledger, gen = group(40, semantics)
    assert ledger.fetch(0, gen, 0, (20, 40), 40).ranges == (Range(0, 0, 20),)
    ledger.commit(0, gen, [(0, 6)])
    ledger.fail(0)
    assert {key: ledger.counts()[0][key] for key in ("lost", "repeated")} == {"lost": lost, "repeated": repeated}
    got = []
    for _ in range(40):
        for _, lo, hi in ledger.fetch(1, gen, 0, (1, 1), 1).ranges:
            got.append((lo, hi))
    trained = Counter(position for lo, hi in got for position in range(lo, hi))
    expected = [position for lo, hi in [*again, (20, 40)] for position in range(lo, hi)]
    assert trained == Counter(expected)
    ledger.check()


def test_shares_shrink_towards_the_end_and_are_whole_batches() -> None:
    ledger, gen = group(1000)
    sizes = []
    while (got := ledger.fetch(0, gen, 0, (16, 64), 10**6)).state == "ranges":
        sizes.append(sum(hi - lo for _, lo, hi in got.ranges))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 1000 // 128 * 16 and all(size % 16 == 0 for size in sizes[:-1]) and sizes[-1] <= 16


def test_a_fetch_is_filled_from_several_pieces() -> None:
    ledger, gen = group(100)
    ((sid, _, hi),) = ledger.fetch(0, gen, 0, (50, 50), 50).ranges
    assert hi == 50
    ledger.fetch(1, gen, 0, (50, 50), 10)
    ledger.release(0, gen, sid, 45)
    assert [(lo, hi) for _, lo, hi in ledger.fetch(1, gen, 0, (8, 8), 8).ranges] == [(45, 50), (60, 63)]


def test_next_epoch_opens_while_others_hold_the_last_ranges_of_this() -> None:
    ledger, gen = group(8, epochs=2)
    held = [ledger.fetch(worker, gen, 0, (4, 8), 4).ranges[0] for worker in (0, 1)]
    assert ledger.fetch(0, gen, 0, (4, 8), 4).state == "end"
    (ahead,) = ledger.fetch(0, gen, 1, (4, 8), 4).ranges
    assert ledger.epoch == 0 and ledger.counts()[1]["doing"] == 4
    ledger.commit(0, gen, [(held[0].sid, 4), (ahead.sid, 2)])
    ledger.commit(1, gen, [(held[1].sid, 8)])
    assert ledger.epoch == 1 and ledger.snapshot()["todo"] == [[2, 8]]


def test_next_epoch_waits_for_what_nobody_has() -> None:
    ledger, gen = group(8, epochs=2)
    ledger.fetch(0, gen, 0, (4, 8), 4)
    assert ledger.fetch(1, gen, 1, (4, 8), 4).state == "wait"
    with pytest.raises(LedgerError, match="cannot follow"):
        ledger.fetch(1, gen, 2, (4, 8), 4)


def test_only_workers_out_of_step_wait_for_ranges_in_hands() -> None:
    for semantics, state in (("exactly_once", "end"), ("at_least_once", "wait"), ("at_most_once", "wait")):
        ledger, gen = group(4, semantics)
        ledger.fetch(0, gen, 0, (4, 4), 4)
        assert ledger.fetch(1, gen, 0, (4, 4), 4).state == state
        ledger.commit(0, gen, [(0, 4)])
        assert ledger.fetch(1, gen, 0, (4, 4), 4).state == "end"


def test_end_of_all_epochs_and_epochs_without_end() -> None:
    ledger, gen = group(4, epochs=1)
    ledger.commit(0, gen, [(ledger.fetch(0, gen, 0, (4, 4), 4).ranges[0].sid, 4)])
    assert ledger.fetch(0, gen, 1, (4, 4), 4).state == "end" and ledger.remaining == 0
    endless = DataShardingService(DatasetSpec(4))
    gen = endless.begin([0])
    for epoch in range(5):
        (given,) = endless.fetch(0, gen, epoch, (4, 4), 4).ranges
        endless.commit(0, gen, [(given.sid, 4)])
    assert endless.epoch == 4 and len(endless.counts()) == 2  # what is over is forgotten


def test_remaining_counts_epochs_to_come() -> None:
    ledger, gen = group(10, epochs=3)
    assert ledger.remaining == 30
    ledger.commit(0, gen, [(ledger.fetch(0, gen, 0, (4, 8), 4).ranges[0].sid, 3)])
    assert ledger.remaining == 27


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ledger, gen: ledger.commit(0, gen, [(0, 11)]), "outside of range 0"),
        (lambda ledger, gen: ledger.commit(1, gen, [(0, 2)]), "worker 0's, not worker 1's"),
        (lambda ledger, gen: ledger.commit(0, gen, [(7, 2)]), "never handed out"),
        (lambda ledger, gen: ledger.release(0, gen, 0, 1), "committed up to 2"),
        (lambda ledger, gen: ledger.fetch(0, gen, 0, (9, 8), 1), "share"),
        (lambda ledger, gen: ledger.restore({"epoch": 0, "todo": [[0, 5], [4, 6]]}), "overlap"),
        (lambda ledger, gen: ledger.restore({"epoch": 0, "todo": [[0, 50]]}), "leave"),
        (lambda ledger, gen: ledger.restore({"epoch": 0, "todo": [], "n": 5}), "n 5 instead of 20"),
        (lambda ledger, gen: ledger.restore({"version": 2}), "version 2"),
    ],
)
def test_impossible_requests_change_nothing(call, message: str) -> None:  # type: ignore[no-untyped-def]
    ledger, gen = group(20)
    ledger.fetch(0, gen, 0, (10, 20), 10)
    ledger.commit(0, gen, [(0, 2)])
    before = ledger.state_dict()
    with pytest.raises(LedgerError, match=message):
        call(ledger, gen)
    assert ledger.state_dict() == before
    ledger.check()


def test_dlrover_checkpoint_is_taken_over_with_its_doing_first() -> None:
    checkpoint = {"dataset_name": "clicks", "todo": [[60, 100]], "doing": [[20, 40], [40, 60]], "epoch": 2}
    ledger = DataShardingService(DatasetSpec(100, epochs=4))
    gen = ledger.begin([0])
    ledger.restore(from_dlrover(json.dumps(checkpoint)))
    assert (ledger.epoch, ledger.counts()[1]["done"], ledger.remaining) == (1, 20, 280)
    got = ledger.fetch(0, gen, 1, (80, 80), 80).ranges
    assert [(lo, hi) for _, lo, hi in got] == [(20, 40), (40, 60), (60, 100)]
    with pytest.raises(LedgerError, match="indices"):
        from_dlrover({"todo": [[0, 2, [1, 0]]], "doing": [], "epoch": 1})
    with pytest.raises(LedgerError, match="lacks doing"):
        from_dlrover({"todo": [], "epoch": 1})


def test_impossible_ledgers_are_refused() -> None:
    with pytest.raises(ValueError, match="semantics is 'twice'"):
        DataShardingService(DatasetSpec(1), "twice")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tail_factor"):
        DataShardingService(DatasetSpec(1), tail_factor=0.5)
    with pytest.raises(ValueError, match="n is 0"):
        DatasetSpec(0)
