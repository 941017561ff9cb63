"""When the replicas of A-EDiT meet: agreed through the processes' store, so that nobody waits for the answer."""

import time
from collections.abc import Callable

from torch.distributed import Store

__all__ = ["RoundClock"]

_DUE = 1 << 40  # added to a round's counter of steps once it is over


class RoundClock:
    """Ends a round of local steps by the clock of one replica, or when the budget of steps is used up.

    All replicas count their steps in one counter of the store; adding to it returns the sum, so one round trip a step counts,
    tells the total, and tells whether the round is over. A replica that learns that it is finishes no further step; the others
    learn it after the step that they are in, which is all that anyone ever waits.

    Args:
        store: shared by all processes; give a prefix that no other run uses.
        seconds: length of a round.
        min_steps: least number of steps of all replicas together in a round.
        budget: number of steps of all replicas together after which training ends; None: no end.
        num_replicas: n; the round that uses up the budget ends that many steps before, for each replica takes one more.
        decides: whether this replica's clock is the one that counts.
        clock: seconds that only grow.

    Raises:
        ValueError: seconds or steps out of range.
    """

    def __init__(
        self,
        store: Store,
        seconds: float,
        min_steps: int,
        budget: int | None,
        num_replicas: int,
        decides: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if seconds < 0 or min_steps < 1:
            raise ValueError(f"RoundClock: seconds={seconds} must not be negative and min_steps={min_steps} be at least 1.")
        self.store, self.seconds, self.min_steps, self.budget = store, seconds, min_steps, budget
        self.num_replicas, self.decides, self.clock = num_replicas, decides, clock
        self.round = -1
        self.taken = 0
        self._began = clock()

    def start_round(self, taken: int) -> None:
        """Begin the next round; every replica calls it after each synchronisation.

        Args:
            taken: steps of all replicas together so far.
        """
        self.round += 1
        self.taken = taken
        self._began = self.clock()
        if self.decides and self.round > 1:
            self.store.delete_key(str(self.round - 2))

    def step(self, count: int = 1) -> bool:
        """Count steps of this replica, and tell whether the round is over."""
        total = self.store.add(str(self.round), count)
        if total >= _DUE:
            return True
        late = self.decides and total >= self.min_steps and self.clock() - self._began >= self.seconds
        if late or self.is_spent(self.taken + total + self.num_replicas):
            self.store.add(str(self.round), _DUE)
            return True
        return False

    def is_spent(self, taken: int) -> bool:
        """Whether so many steps of all replicas use up the budget."""
        return self.budget is not None and taken >= self.budget
