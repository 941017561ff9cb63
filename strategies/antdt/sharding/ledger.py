"""Stateful dynamic data sharding: which positions of each epoch are to do, being done, and done.

The data set is cut when a worker asks, into ranges of positions ``[lo, hi)`` that fit what the worker can do; a range is three
integers, and any part of it can be given back. Which sample a position holds is `SampleOrder`'s affair.

A state machine without input or output, clock or random numbers, so that a journal can replay it and a simulator drive it.
Transitions and semantics: [derived], after the TODO, DOING, DONE shards of AntDT (arXiv 2404.09679) and of dlrover.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

__all__ = [
    "DataShardingService",
    "DatasetSpec",
    "Fetched",
    "LedgerError",
    "Range",
    "Semantics",
    "StaleGeneration",
    "from_dlrover",
]

Semantics = Literal["exactly_once", "at_least_once", "at_least_once_batch", "at_most_once"]
SEMANTICS = ("exactly_once", "at_least_once", "at_least_once_batch", "at_most_once")
SNAPSHOT_VERSION = 1


class LedgerError(ValueError):
    """A request that no correct worker makes; the message says which rule it breaks."""


class StaleGeneration(RuntimeError):
    """The worker belongs to a group that has been replaced, or was declared dead: it must join again, or exit."""


class Range(NamedTuple):
    """Positions ``[lo, hi)``, handed out under the number ``sid``, which is never used twice."""

    sid: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Fetched:
    """Answer to a worker that wants work.

    Attributes:
        ranges: what it got, in the order in which to train it; empty unless ``state`` is ``ranges``.
        state: ``ranges``; ``wait``: ask again, others may still give back; ``end``: nothing is left of this epoch.
    """

    ranges: tuple[Range, ...]
    state: Literal["ranges", "wait", "end"]


@dataclass(frozen=True)
class DatasetSpec:
    """Meaning of the positions: ledgers that differ in it are about different data.

    Attributes:
        n: samples.
        name: of the data set.
        seed: of the order of samples.
        shuffle: ``none``, ``shard`` or ``global``, see `SampleOrder`.
        shard: block of the order ``shard``.
        epochs: passes over the data; None: without end. Not part of the identity: a run may be prolonged.
    """

    n: int
    name: str = ""
    seed: int = 0
    shuffle: str = "global"
    shard: int = 1
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or (self.epochs is not None and self.epochs < 1):
            raise ValueError(f"DatasetSpec: n is {self.n} and epochs {self.epochs}; both must be at least 1.")

    @property
    def identity(self) -> dict[str, Any]:
        """All but the number of epochs."""
        described = asdict(self)
        del described["epochs"]
        return described


@dataclass(slots=True)
class _Grant:
    """Positions in the hands of a worker: those before ``committed`` are trained."""

    worker: int
    epoch: int
    lo: int
    hi: int
    committed: int


class _Epoch:
    """Positions of one epoch that nobody has, and how many are in hands and done."""

    def __init__(self, todo: Iterable[Sequence[int]], done: int, lost: int = 0, repeated: int = 0) -> None:
        self.todo = deque((int(lo), int(hi)) for lo, hi in todo)
        self.todo_size = sum(hi - lo for lo, hi in self.todo)
        self.doing_size = 0
        self.done, self.lost, self.repeated = done, lost, repeated

    @property
    def complete(self) -> bool:
        return self.todo_size == 0 and self.doing_size == 0

    def put_back(self, lo: int, hi: int) -> None:
        """To the front, joined to its neighbour there, so that what was given back is trained soon and in one piece."""
        if lo == hi:
            return
        self.todo_size += hi - lo
        if self.todo and self.todo[0][0] == hi:
            hi = self.todo.popleft()[1]
        self.todo.appendleft((lo, hi))

    def take(self, size: int) -> Iterator[tuple[int, int]]:
        while size > 0 and self.todo:
            lo, hi = self.todo.popleft()
            if hi - lo > size:
                self.todo.appendleft((lo + size, hi))
                hi = lo + size
            self.todo_size -= hi - lo
            size -= hi - lo
            yield lo, hi

    def counts(self) -> dict[str, int]:
        return {
            "todo": self.todo_size,
            "doing": self.doing_size,
            "done": self.done,
            "lost": self.lost,
            "repeated": self.repeated,
        }


class DataShardingService:
    """The ledger of all positions of all epochs.

    For each epoch, positions done, in hands and not done, and to do are disjoint and together ``[0, n)``, at any time.

    What becomes of a lost worker's range ``[lo, hi)`` of which it had committed ``[lo, committed)``:

    =====================  ===============================================================================================
    exactly_once           ``[committed, hi)`` is to do again. When the whole group restarts from a checkpoint of the
                           model, `restore` puts the ledger back to the snapshot stored in it, and work after it is undone
                           in both. When survivors go on from where they are, `settle` first commits what was trained.
    at_least_once          all of ``[lo, hi)`` is to do again
    at_least_once_batch    ``[committed, hi)`` is to do again
    at_most_once           ``[committed, hi)`` counts as done and is never trained
    =====================  ===============================================================================================

    Args:
        dataset: what the positions stand for.
        semantics: see above. But for ``exactly_once``, whose workers run in lockstep, a worker that finds nothing to do waits
            while others have work that might come back.
        tail_factor: a worker gets at most its share of the remaining work over this factor, in whole batches, but at least
            one batch: the smaller the rest, the smaller the ranges, so that no slow worker holds a long one at the end.

    Raises:
        ValueError: unknown semantics, or a tail factor below 1.

    Example:
        >>> ledger = DataShardingService(DatasetSpec(n=8, epochs=1))
        >>> gen = ledger.begin([0, 1])
        >>> ledger.fetch(0, gen, epoch=0, share=(2, 4), max=2).ranges
        (Range(sid=0, lo=0, hi=2),)
        >>> ledger.commit(0, gen, [(0, 2)])
        >>> ledger.snapshot()["todo"]
        [[2, 8]]
    """

    def __init__(self, dataset: DatasetSpec, semantics: Semantics = "exactly_once", tail_factor: float = 2.0) -> None:
        if semantics not in SEMANTICS:
            raise ValueError(f"semantics is {semantics!r}; it must be one of {', '.join(SEMANTICS)}.")
        if not tail_factor >= 1:
            raise ValueError(f"tail_factor is {tail_factor}; it must be at least 1.")
        self.dataset, self.semantics, self.tail_factor = dataset, semantics, tail_factor
        self.generation = 0
        self.members: dict[int, int] = {}
        """Generation in which each worker that is alive has joined."""
        self._next_sid = 0
        self._grants: dict[int, _Grant] = {}
        self._committed: dict[int, int] = {}
        self._newest = 0
        self._epochs: dict[int, _Epoch] = {0: self._fresh()}

    def _fresh(self) -> _Epoch:
        return _Epoch([(0, self.dataset.n)], done=0)

    # ---- who takes part -----------------------------------------------------------------------------------------------

    def begin(self, workers: Iterable[int]) -> int:
        """Open the next generation for a whole group; all former members are lost, with what they held.

        Returns:
            Its number; requests with an older one are refused.
        """
        for sid in sorted(self._grants, reverse=True):
            self._lose(sid)
        self.generation += 1
        self.members = dict.fromkeys(sorted(workers), self.generation)
        self._committed = {}
        return self.generation

    def join(self, worker: int) -> int:
        """Admit one worker, others go on; what it held in an earlier life is lost."""
        self.fail(worker)
        self.generation += 1
        self.members[worker] = self.generation
        self._committed[worker] = 0
        return self.generation

    def leave(self, worker: int, gen: int) -> None:
        """A worker ends in good order: what it has not committed is to do again.

        Raises:
            StaleGeneration: the worker is no member in this generation.
        """
        self._check(worker, gen)
        for sid in self._held_by(worker):
            self.release(worker, gen, sid, self._grants[sid].committed)
        del self.members[worker]

    def fail(self, worker: int) -> None:
        """A worker is lost; its ranges are treated by the semantics. Without effect for one that is no member."""
        for sid in self._held_by(worker):
            self._lose(sid)
        self.members.pop(worker, None)

    def _lose(self, sid: int) -> None:
        grant = self._grants.pop(sid)
        epoch = self._epochs[grant.epoch]
        epoch.doing_size -= grant.hi - grant.committed
        if self.semantics == "at_most_once":
            epoch.done += grant.hi - grant.committed
            epoch.lost += grant.hi - grant.committed
        elif self.semantics == "at_least_once":
            epoch.done -= grant.committed - grant.lo
            epoch.repeated += grant.committed - grant.lo
            epoch.put_back(grant.lo, grant.hi)
        else:
            epoch.put_back(grant.committed, grant.hi)

    def _held_by(self, worker: int) -> list[int]:
        """Newest first, so that ranges put back to the front stand in their order again."""
        return sorted((sid for sid, grant in self._grants.items() if grant.worker == worker), reverse=True)

    def _check(self, worker: int, gen: int) -> None:
        if self.members.get(worker) != gen:
            state = f"is {self.members[worker]}" if worker in self.members else "has ended, or the worker was declared lost"
            raise StaleGeneration(
                f"worker {worker} asks as a member of generation {gen}, but its generation {state};"
                " a process of a former group must exit, a live one join again."
            )

    # ---- work ---------------------------------------------------------------------------------------------------------

    def fetch(self, worker: int, gen: int, epoch: int, share: tuple[int, int], max: int) -> Fetched:
        """Hand out work.

        Args:
            worker: who asks.
            gen: its generation.
            epoch: of which it wants work. The first request for the epoch after the newest opens that, once nothing is left to
                do of those before; ranges still in hands do not hold it back, for in lockstep the others are steps away.
            share: ``(B_i, B)``, the worker's samples of each global batch.
            max: most samples it takes now.

        Returns:
            Ranges of at most ``min(max, max(1, floor(rest / (B * tail_factor))) * B_i)`` samples in all.

        Raises:
            StaleGeneration: the worker is no member in this generation.
            LedgerError: an impossible share, maximum or epoch.
        """
        self._check(worker, gen)
        own, whole = share
        if not 0 <= own <= whole or whole < 1 or max < 0:
            raise LedgerError(f"fetch: share {list(share)} and max {max} must be 0 <= B_i <= B, B >= 1, max >= 0.")
        if not 0 <= epoch <= self._newest + 1:
            raise LedgerError(f"fetch: epoch {epoch} cannot follow epoch {self._newest}; epochs are taken one after another.")
        if self.dataset.epochs is not None and epoch >= self.dataset.epochs:
            return Fetched((), "end")
        if epoch > self._newest:
            if any(state.todo_size for state in self._epochs.values()):
                return Fetched((), "wait")
            self._open(epoch)
        state = self._epochs.get(epoch)
        if state is None:
            return Fetched((), "end")
        if not state.todo:
            waits = self.semantics != "exactly_once" and state.doing_size > 0
            return Fetched((), "wait" if waits else "end")
        batches = int(state.todo_size / (whole * self.tail_factor))
        size = min(max, (batches if batches > 1 else 1) * (own if own > 1 else 1))
        return Fetched(tuple(self._grant(worker, epoch, lo, hi) for lo, hi in state.take(size)), "ranges")

    def _open(self, epoch: int) -> None:
        for number in [number for number, state in self._epochs.items() if state.complete and number < self._newest]:
            del self._epochs[number]  # the newest but one stays to be counted
        self._epochs[epoch] = self._fresh()
        self._newest = epoch

    def _grant(self, worker: int, epoch: int, lo: int, hi: int) -> Range:
        sid, self._next_sid = self._next_sid, self._next_sid + 1
        self._grants[sid] = _Grant(worker, epoch, lo, hi, lo)
        self._epochs[epoch].doing_size += hi - lo
        return Range(sid, lo, hi)

    def commit(self, worker: int, gen: int, items: Iterable[Sequence[int]]) -> None:
        """Count positions as trained, after the optimizer step that used them.

        Args:
            worker: who has trained them.
            gen: its generation.
            items: pairs ``(sid, upto)``: positions of range ``sid`` before ``upto`` are trained. Going back, or naming a range
                that is done, changes nothing, so that a request may be repeated.

        Raises:
            StaleGeneration: the worker is no member in this generation.
            LedgerError: a range that was never handed out, is another worker's, or ends before ``upto``.
        """
        self._check(worker, gen)
        found = [(sid, upto, self._own_grant("commit", worker, sid)) for sid, upto in items]
        for sid, upto, grant in found:
            if grant is not None and not grant.lo <= upto <= grant.hi:
                raise LedgerError(f"commit: position {upto} lies outside of range {sid}, which is [{grant.lo}, {grant.hi}).")
        for sid, upto, grant in found:
            if grant is None or upto <= grant.committed:
                continue
            self._advance(sid, upto)

    def settle(self, trained: Mapping[int, int]) -> None:
        """Commit what workers have trained and had no time to commit, on behalf of those too that are gone.

        A worker trains its ranges one after the other, in the order in which it was given them, so that a number says which
        positions it has trained.

        Args:
            trained: for each worker, samples that it has trained since it joined, or since the last `restore`.

        Raises:
            LedgerError: a worker was not given that many; nothing is changed then.
        """
        for worker, count in trained.items():
            given = self._committed.get(worker, 0) + sum(
                grant.hi - grant.committed for grant in self._grants.values() if grant.worker == worker
            )
            if count > given:
                raise LedgerError(f"settle: worker {worker} was given {given} samples, it cannot have trained {count}.")
        for worker, count in trained.items():
            for sid in reversed(self._held_by(worker)):
                left = count - self._committed.get(worker, 0)
                if left <= 0:
                    break
                grant = self._grants[sid]
                self._advance(sid, min(grant.hi, grant.committed + left))

    def _advance(self, sid: int, upto: int) -> None:
        grant = self._grants[sid]
        epoch, count = self._epochs[grant.epoch], upto - grant.committed
        epoch.doing_size -= count
        epoch.done += count
        self._committed[grant.worker] = self._committed.get(grant.worker, 0) + count
        grant.committed = upto
        if upto == grant.hi:
            del self._grants[sid]

    def release(self, worker: int, gen: int, sid: int, start: int) -> None:
        """Give positions from ``start`` to the end of a range back.

        Raises:
            StaleGeneration: the worker is no member in this generation.
            LedgerError: a range that was never handed out or is another worker's, or positions already committed.
        """
        self._check(worker, gen)
        grant = self._own_grant("release", worker, sid)
        if grant is None or start >= grant.hi:
            return
        if start < grant.committed:
            raise LedgerError(
                f"release: positions of range {sid} are committed up to {grant.committed}, so not free from {start}."
            )
        epoch = self._epochs[grant.epoch]
        epoch.doing_size -= grant.hi - start
        epoch.put_back(start, grant.hi)
        grant.hi = start
        if grant.committed == start:
            del self._grants[sid]

    def _own_grant(self, operation: str, worker: int, sid: int) -> _Grant | None:
        """The worker's range; None if it is done."""
        if not 0 <= sid < self._next_sid:
            raise LedgerError(f"{operation}: range {sid} was never handed out.")
        grant = self._grants.get(sid)
        if grant is not None and grant.worker != worker:
            raise LedgerError(f"{operation}: range {sid} is worker {grant.worker}'s, not worker {worker}'s.")
        return grant

    # ---- what is known ------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The oldest epoch that is not complete; the newest if all are."""
        return min((number for number, state in self._epochs.items() if not state.complete), default=self._newest)

    @property
    def remaining(self) -> int:
        """Samples not done, of this and all later epochs; without end of epochs, of those opened."""
        opened = sum(state.todo_size + state.doing_size for state in self._epochs.values())
        later = 0 if self.dataset.epochs is None else max(self.dataset.epochs - 1 - self._newest, 0)
        return opened + later * self.dataset.n

    def counts(self) -> dict[int, dict[str, int]]:
        """For the epochs that are open and the one before: samples ``todo``, ``doing`` (in hands, not committed), ``done``
        (``lost`` among them: never trained), and ``repeated``: committed, and then to do again.
        """  # fmt: skip
        return {number: state.counts() for number, state in sorted(self._epochs.items())}

    def check(self) -> None:
        """Prove that every position of each epoch is at one place.

        Raises:
            AssertionError: it is not so; a defect of this class.
        """
        for number, state in self._epochs.items():
            held = [(grant.committed, grant.hi) for grant in self._grants.values() if grant.epoch == number]
            spans = sorted([*state.todo, *held])
            for (_, end), (start, _) in pairwise(spans):
                assert end <= start, f"epoch {number}: positions [{start}, {end}) are at two places"
            assert all(0 <= lo < hi <= self.dataset.n for lo, hi in spans), f"epoch {number}: {spans} leave the data set"
            todo, doing = (sum(hi - lo for lo, hi in part) for part in (state.todo, held))
            assert (todo, doing) == (state.todo_size, state.doing_size), f"epoch {number}: running counts are wrong"
            total = todo + doing + state.done
            assert total == self.dataset.n, f"epoch {number}: {total} positions instead of {self.dataset.n}"
        assert all(grant.epoch in self._epochs and grant.worker in self.members for grant in self._grants.values())

    # ---- what is kept -------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """State for a checkpoint of the model: everything not committed is to do.

        Returns:
            ``{version, dataset, n, seed, shuffle, shard, epoch, consumed, todo: [[lo, hi], ...], later, lost, repeated}``,
            of plain types. The same committed positions give the same snapshot, whoever holds the others. ``epoch`` is the
            oldest that is not complete; ``later`` lists ``[epoch, todo]`` of newer ones of which something is committed.
        """
        number = self.epoch
        state = self._epochs[number]
        todo = self._uncommitted(number)
        later = [[new, self._uncommitted(new)] for new, other in sorted(self._epochs.items()) if new > number and other.done]
        described = self.dataset.identity
        return {
            "version": SNAPSHOT_VERSION,
            "dataset": described.pop("name"),
            **described,
            "epoch": number,
            "consumed": state.done,
            "todo": todo,
            "later": later,
            "lost": state.lost,
            "repeated": state.repeated,
        }

    def _uncommitted(self, number: int) -> list[list[int]]:
        held = [(grant.committed, grant.hi) for grant in self._grants.values() if grant.epoch == number]
        merged: list[list[int]] = []
        for lo, hi in sorted([*self._epochs[number].todo, *held]):
            if merged and merged[-1][1] == lo:
                merged[-1][1] = hi
            else:
                merged.append([lo, hi])
        return merged

    def restore(self, snapshot: Mapping[str, Any] | None) -> None:
        """Put the ledger back to a snapshot; whatever was in hands is forgotten. Members and generation stay.

        Args:
            snapshot: of `snapshot` or `from_dlrover`; None: the beginning of epoch 0.

        Raises:
            LedgerError: it is of another data set, of an unknown version, or its ranges overlap or leave the data set.
        """
        epochs, newest = {0: self._fresh()}, 0
        if snapshot is not None:
            self._check_snapshot(snapshot)
            newest = int(snapshot["epoch"])
            parts = [[newest, snapshot["todo"]], *snapshot.get("later", [])]
            epochs = {int(number): self._remembered(int(number), todo) for number, todo in parts}
            for name in ("lost", "repeated"):
                setattr(epochs[newest], name, int(snapshot.get(name, 0)))
            newest = max(epochs)
        self._epochs, self._newest, self._grants, self._committed = epochs, newest, {}, {}

    def _check_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        missing = {"epoch", "todo"} - snapshot.keys()
        if missing or snapshot.get("version", SNAPSHOT_VERSION) != SNAPSHOT_VERSION:
            raise LedgerError(
                f"restore: this is no snapshot of version {SNAPSHOT_VERSION}"
                f" (version {snapshot.get('version')}, missing: {', '.join(sorted(missing)) or 'nothing'})."
            )
        own = self.dataset.identity
        own["dataset"] = own.pop("name")
        other = {key: (snapshot[key], value) for key, value in own.items() if key in snapshot and snapshot[key] != value}
        if other:
            differences = ", ".join(f"{key} {theirs!r} instead of {ours!r}" for key, (theirs, ours) in other.items())
            raise LedgerError(f"restore: the snapshot is of another data set: {differences}.")

    def _remembered(self, number: int, todo: Sequence[Sequence[int]]) -> _Epoch:
        spans = sorted((int(lo), int(hi)) for lo, hi in todo)
        overlaps = any(end > start for (_, end), (start, _) in pairwise(spans))
        if number < 0 or overlaps or not all(0 <= lo < hi <= self.dataset.n for lo, hi in spans):
            raise LedgerError(f"restore: ranges to do of epoch {number} overlap or leave [0, {self.dataset.n}).")
        return _Epoch(todo, done=self.dataset.n - sum(hi - lo for lo, hi in spans))

    def state_dict(self) -> dict[str, Any]:
        """All of the state, in plain types, ranges in hands and members too; the journal's compact form."""
        return {
            "generation": self.generation,
            "members": sorted(self.members.items()),
            "next_sid": self._next_sid,
            "newest": self._newest,
            "epochs": [[number, list(state.todo), state.counts()] for number, state in sorted(self._epochs.items())],
            "grants": [[sid, g.worker, g.epoch, g.lo, g.hi, g.committed] for sid, g in sorted(self._grants.items())],
            "committed": sorted(self._committed.items()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `state_dict` has written."""
        self.generation, self._next_sid, self._newest = state["generation"], state["next_sid"], state["newest"]
        self.members = {int(worker): int(gen) for worker, gen in state["members"]}
        self._epochs = {
            int(number): _Epoch(todo, counts["done"], counts["lost"], counts["repeated"])
            for number, todo, counts in state["epochs"]
        }
        self._grants = {int(sid): _Grant(*numbers) for sid, *numbers in state["grants"]}
        self._committed = {int(worker): int(count) for worker, count in state["committed"]}
        for grant in self._grants.values():
            self._epochs[grant.epoch].doing_size += grant.hi - grant.committed


def from_dlrover(checkpoint: str | Mapping[str, Any]) -> dict[str, Any]:
    """Turn dlrover's checkpoint of data shards into a snapshot for `DataShardingService.restore`.

    Args:
        checkpoint: ``{dataset_name, todo: [[start, end], ...], doing: [[start, end], ...], epoch}``, or its JSON. dlrover
            counts the epochs that it has begun, so that its first is 1. What was being done comes first.

    Raises:
        LedgerError: fields are missing, or shards list single samples, whose order dlrover has drawn without a seed.
    """
    content: Mapping[str, Any] = json.loads(checkpoint) if isinstance(checkpoint, str) else checkpoint
    missing = {"todo", "doing", "epoch"} - content.keys()
    if missing:
        raise LedgerError(f"from_dlrover: the checkpoint lacks {', '.join(sorted(missing))}.")
    shards = [list(shard) for shard in [*content["doing"], *content["todo"]]]
    if any(len(shard) != 2 for shard in shards):
        raise LedgerError(
            "from_dlrover: shards list the indices of their samples (dlrover's shuffled text); only ranges can be taken over."
        )
    return {"version": SNAPSHOT_VERSION, "epoch": max(int(content["epoch"]) - 1, 0), "todo": shards}
