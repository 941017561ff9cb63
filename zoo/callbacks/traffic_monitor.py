"""Bytes that a training step sends and a rank keeps."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from zoo.base.step_interval import crosses_multiple
from zoo.strategy_contract import CountsTraffic

__all__ = ["TrafficMonitor"]


class TrafficMonitor(Callback):
    """Logs what rank 0 sends in an optimizer step and keeps of the states, as its strategy counts them.

    ===================  =============================================================================
    name                 meaning
    ===================  =============================================================================
    traffic/intra_bytes  sent to ranks of the own group, mean over the steps since the last log
    traffic/inter_bytes  sent to other groups, likewise
    traffic/state_bytes  parameters, gradients and optimizer state that the rank keeps now
    ===================  =============================================================================

    Args:
        every_n_steps: optimizer steps between two logs; None: the trainer's ``log_every_n_steps``.

    Attributes:
        latest: what was logged last.

    Raises:
        ValueError: ``every_n_steps`` below 1, or, when training starts, a strategy that does not count.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"TrafficMonitor: every_n_steps={every_n_steps} must be at least 1, or null for the trainer's.")
        self.every_n_steps = every_n_steps
        self.latest: dict[str, float] = {}
        self._seen_step = self._logged_step = 0
        self._sent: dict[str, int] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that does not count."""
        if stage == "fit" and not isinstance(trainer.strategy, CountsTraffic):
            raise ValueError(
                f"TrafficMonitor: {type(trainer.strategy).__name__} does not count what it sends; take PaROStrategy (NNN is DDP),"
                " or remove TrafficMonitor."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._seen_step = self._logged_step = trainer.global_step
        self._sent = self._strategy(trainer).comm_stats()

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
        strategy, steps = self._strategy(trainer), trainer.global_step - self._logged_step
        sent = strategy.comm_stats()
        self.latest = {f"traffic/{link}_bytes": (sent[link] - self._sent[link]) / steps for link in ("intra", "inter")}
        self.latest["traffic/state_bytes"] = float(sum(strategy.memory_report().values()))
        self._sent, self._logged_step = sent, trainer.global_step
        for name, value in self.latest.items():
            pl_module.log(name, value)

    @staticmethod
    def _strategy(trainer: Trainer) -> CountsTraffic:
        assert isinstance(trainer.strategy, CountsTraffic)
        return trainer.strategy
