"""A role whose states PaRO divides over its ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from strategies.paro.collectives import Collectives
from strategies.paro.engine import PaROEngine
from strategies.paro.grid import RankGrid
from strategies.paro.optimizer_state import optimizer_state
from strategies.paro.partition import Partition
from strategies.placement.plan import RolePlan
from zoo.role_placement import Role

__all__ = ["PaRORole"]


class PaRORole:
    """Parameters, gradients and optimizer state of a role, each whole, shared in a group, or by all of its ranks.

    Making one is a collective call of the ranks.

    Args:
        role: The role; the weights are the same on its ranks.
        plan: Code and size of groups.
        optimizer: That of the role; its parameters become shards.
        ranks: Global ranks of the role.
        device: Of this rank.
        timeout: Longest wait for another rank; None: torch's.
    """

    def __init__(
        self,
        role: Role,
        plan: RolePlan,
        optimizer: Optimizer,
        ranks: Sequence[int],
        device: torch.device,
        timeout: timedelta | None,
    ) -> None:
        self.grid = RankGrid(plan.group_size or len(ranks), device.type, timeout, ranks)
        self.engine = PaROEngine(role.network, optimizer, Partition.of(plan.partition), Collectives(self.grid), role.blocks)
        self._optimizer = optimizer
        self._after_step: RemovableHandle = optimizer.register_step_post_hook(lambda *_: self.engine.sync_parameters())

    @torch.no_grad()
    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that makes one pass without gradients, for which weights are gathered block by block."""
        if self.engine.held:
            return function(*args)
        self.engine.begin_forward()
        try:
            return function(*args)
        finally:
            self.engine.release_all()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, all weights are whole; entering is a collective call."""
        self.engine.gather_all()
        try:
            yield
        finally:
            self.engine.release_all()

    @contextmanager
    def pass_of_training(self, last: bool) -> Iterator[None]:
        """One forward and backward pass; the last of a step leaves the gradient in the optimizer's shards."""
        self.engine.last = last
        self.engine.begin_forward()
        yield
        self.engine.finish_backward()

    def close(self, restore: bool) -> None:
        """End the division.

        Args:
            restore: Leave whole weights in the network, on the CPU, and the optimizer with its whole state on the first of the
                ranks; a collective call. Otherwise, when others may be gone, nothing is gathered.
        """
        state = optimizer_state(self.engine, keep=self.grid.rank == 0) if restore else None
        self._after_step.remove()
        self.engine.close(restore)
        if state is not None:
            if self.grid.rank == 0:
                self._optimizer.load_state_dict(state)  # for those who save a checkpoint now
            self.grid.close()
