"""Positions that each rank trains in each step, planned ahead, alike on all ranks (sections 2.1, 2.4).

An epoch of N samples takes exactly ``ceil(N / B)`` steps, whatever the batches B_i of the ranks are and however they change,
because of two rules [derived]. With L steps left, a rank holds at most ``B_i L`` positions that it has not trained: those it has
more after a change of B_i it gives back. And a rank takes B_i samples a step unless nothing is left to fetch. So, as the B_i
sum to B: L steps always suffice for what is left, and after s steps at least ``N - s B`` samples are left, which take no less
than L of them.

A change takes two steps: once all ranks have received it, all give back in the same step what the new batches do not allow;
with the next one, when all have done so, the new batches begin. Otherwise a rank could find nothing to fetch that another is
about to give back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from strategies.antdt.control.actions import AdjustBatch, Versioned
from strategies.antdt.rank.exchange import Reading
from strategies.antdt.rank.shard_buffer import Piece

__all__ = ["Allocation", "PositionSource", "StepPlan", "StepPlanner"]


@dataclass(frozen=True)
class Allocation:
    """Batches in force.

    Attributes:
        batch: B_i of each rank; they sum to the global batch.
        cap: most samples of a micro-batch of each rank; None for no limit.
        version: of the decision that made it, 0 at the beginning.
    """

    batch: tuple[int, ...]
    cap: tuple[int | None, ...]
    version: int = 0

    @classmethod
    def even(cls, global_batch: int, world_size: int, cap: Sequence[int | None] | None = None) -> "Allocation":
        """Equal batches, the first ranks with one sample more where they do not divide."""
        few, more = divmod(global_batch, world_size)
        return cls(
            tuple(few + (rank < more) for rank in range(world_size)), tuple(cap) if cap is not None else (None,) * world_size
        )


@dataclass(frozen=True)
class StepPlan:
    """Work of a rank in a step.

    Attributes:
        epoch: number of the epoch.
        step: number of the step in the epoch.
        pieces: its positions.
        allocation: batches of all ranks.
        decisions: those that come into force with this step.
        answer: gives what all ranks do in the step; see `Exchange.start`.
    """

    epoch: int
    step: int
    pieces: tuple[Piece, ...]
    allocation: Allocation
    decisions: tuple[Versioned, ...]
    answer: Callable[[], Reading]

    @property
    def count(self) -> int:
        """n_i, samples of this rank."""
        return sum(piece.hi - piece.lo for piece in self.pieces)


class PositionSource(Protocol):
    """Source of positions; see `ShardSource`."""

    def begin(self, epoch: int) -> None:
        """Forget what is held; from now on, positions are of this epoch."""

    def take(self, count: int, room: int) -> list[Piece]:
        """``count`` positions, fewer if there are no more, and never hold more than ``room`` with them."""

    def resize(self, room: int) -> None:
        """Give back what is held above ``room``."""

    def reopen(self) -> None:
        """Others have given back: there may be more, though there was none."""


class StepPlanner:
    """Plans step after step of one rank.

    Args:
        source: of positions.
        announce: ``(epoch, step, count) -> answer`` tells the other ranks; see `Exchange.start`.
        decisions: ``(version) -> decisions`` that this rank has received, up to a version, and has not been given yet.
        rank: this one.
        num_samples: N, samples of an epoch.
        allocation: batches at the beginning.
    """

    def __init__(
        self,
        source: PositionSource,
        announce: Callable[[int, int, int], Callable[[], Reading]],
        decisions: Callable[[int], Sequence[Versioned]],
        rank: int,
        num_samples: int,
        allocation: Allocation,
    ) -> None:
        self.source, self.announce, self.decisions = source, announce, decisions
        self.rank, self.num_samples, self.allocation = rank, num_samples, allocation
        self.global_batch = sum(allocation.batch)
        self.epoch = self.step = 0
        self._last: StepPlan | None = None
        self._coming: tuple[Versioned, ...] = ()

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.num_samples // self.global_batch)

    def begin(self, epoch: int, consumed: int = 0) -> None:
        """Go on with an epoch of which ``consumed`` samples are trained."""
        self.source.begin(epoch)
        self.epoch = epoch
        self.step = self.num_steps - -(-(self.num_samples - consumed) // self.global_batch)

    def plan(self) -> StepPlan | None:
        """The next step; None when all of the epoch are planned. Waits until all ranks have planned the one before.

        Raises:
            RuntimeError: a decision for another number of ranks or another global batch.
        """
        left = self.num_steps - self.step
        if left <= 0:
            return None
        begins, self._coming = self._coming, ()
        for decision in begins:
            if isinstance(decision.action, AdjustBatch):
                self.allocation = Allocation(decision.action.batch, decision.action.cap, decision.version)
                self.source.reopen()
        if self._last is not None:
            self._coming = tuple(self.decisions(self._last.answer().version))
        own = self.allocation.batch[self.rank]
        pieces = self.source.take(own, own * left)
        changes = [decision.action for decision in self._coming if isinstance(decision.action, AdjustBatch)]
        if changes:
            self._check(changes[-1])
            self.source.resize(changes[-1].batch[self.rank] * (left - 1))
        count = sum(piece.hi - piece.lo for piece in pieces)
        answer = self.announce(self.epoch, self.step, count)
        self._last = StepPlan(self.epoch, self.step, tuple(pieces), self.allocation, begins, answer)
        self.step += 1
        return self._last

    def _check(self, action: AdjustBatch) -> None:
        if len(action.batch) != len(self.allocation.batch) or sum(action.batch) != self.global_batch:
            raise RuntimeError(
                f"AntDT: a decision shares out {sum(action.batch)} samples among {len(action.batch)} ranks; there are"
                f" {len(self.allocation.batch)}, and the global batch is {self.global_batch}."
            )
