"""Balance of a step: batches and times of all ranks, and the time in which no rank computes."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from zoo.base.step_interval import crosses_multiple
from zoo.strategy_contract import BalancesRanks

__all__ = ["AntDTMonitor"]


class AntDTMonitor(Callback):
    """Logs how AntDT shares the global batch among ranks.

    =======================  ==========================================================================
    name                     meaning
    =======================  ==========================================================================
    antdt/batch_rank_<i>     B_i, samples of rank i in a step
    antdt/bpt_rank_<i>       T_i, seconds that rank i takes for its part of a step, waiting not included
    antdt/imbalance          max T_i over mean T_i; 1 is best
    antdt/bubble             part of a step in which the slowest rank does not compute either
    antdt/version            number of the decision in force
    antdt/restarts           times that the group was started again
    antdt/overhead           part of the time since the last log that planning and reporting took on rank 0
    =======================  ==========================================================================

    Args:
        every_n_steps: optimizer steps between two logs; None: the trainer's ``log_every_n_steps``.
        max_ranks: of so many ranks batches and times are logged one by one; beyond, only the lowest and highest
            (``antdt/batch_min`` and so on).

    Attributes:
        latest: what was logged last.

    Raises:
        ValueError: numbers out of range, or, when training starts, a strategy that does not balance.
    """

    def __init__(self, every_n_steps: int | None = None, max_ranks: int = 16) -> None:
        if (every_n_steps is not None and every_n_steps < 1) or max_ranks < 0:
            raise ValueError(
                f"AntDTMonitor: every_n_steps={every_n_steps} must be at least 1, or null for the trainer's, and"
                f" max_ranks={max_ranks} not negative."
            )
        self.every_n_steps, self.max_ranks = every_n_steps, max_ranks
        self.latest: dict[str, float] = {}
        self._seen_step = 0
        self._seconds = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that does not balance."""
        if stage == "fit" and not isinstance(trainer.strategy, BalancesRanks):
            raise ValueError(
                f"AntDTMonitor: {type(trainer.strategy).__name__} gives all ranks equal batches; take AntDTStrategy, or remove"
                " AntDTMonitor."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._seen_step, self._seconds = trainer.global_step, 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Log, if it is time."""
        before, now = self._seen_step, trainer.global_step
        if now == before:
            return
        self._seen_step = now
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not crosses_multiple(before, now, every):
            return
        assert isinstance(trainer.strategy, BalancesRanks)
        state = trainer.strategy.antdt_state()
        self.latest = {**self._of_ranks("batch", state["batch"]), "antdt/version": float(state["version"])}
        self.latest["antdt/restarts"] = float(state["restarts"])
        if "bpt" in state:  # on rank 0
            times, wall = state["bpt"], state["wall"]
            self.latest |= self._of_ranks("bpt", times)
            self.latest["antdt/imbalance"] = max(times) / max(sum(times) / len(times), 1e-9)
            self.latest["antdt/bubble"] = state["bubble"] / max(wall, 1e-9)
            self.latest["antdt/overhead"] = (state["agent_seconds"] - self._seconds) / max(wall * every, 1e-9)
        self._seconds = state["agent_seconds"]
        for name, value in self.latest.items() if trainer.is_global_zero else ():
            pl_module.log(name, value, rank_zero_only=True)

    def _of_ranks(self, name: str, values: list[float]) -> dict[str, float]:
        if len(values) <= self.max_ranks:
            return {f"antdt/{name}_rank_{rank}": float(value) for rank, value in enumerate(values)}
        return {f"antdt/{name}_min": float(min(values)), f"antdt/{name}_max": float(max(values))}
