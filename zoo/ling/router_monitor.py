"""Evenness of the use of experts by the routers of a mixture of experts."""

from typing import Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, distributed
from typing_extensions import override

from zoo.base.step_interval import crosses_multiple
from zoo.strategy_contract import step_group

__all__ = ["ReportsRouters", "RouterMonitor", "RouterStats"]

# L mixture-of-experts layers, E experts of each


class RouterStats(Protocol):
    """Statistics of the routers on one micro-batch; detached, padded tokens left out.

    Attributes:
        counts: (L, E), tokens assigned to each expert.
        mean_probability: (L, E), mean of the router's probabilities over the tokens.
        logit_mean: (L,), mean of the router's logits over tokens and experts.
        logit_std: (L,), their standard deviation.
    """

    counts: Tensor
    mean_probability: Tensor
    logit_mean: Tensor
    logit_std: Tensor


class ReportsRouters(Protocol):
    """A module that keeps the statistics of its routers for callbacks.

    Attributes:
        router_stats: those of the last micro-batch; None before the first.
    """

    router_stats: RouterStats | None


class RouterMonitor(Callback):
    """Logs how evenly experts are used, over all micro-batches and ranks since the last time.

    The ranks are those of `step_group`: of one replica, where replicas train apart.

    ==========================  =============================================================================================
    name                        meaning
    ==========================  =============================================================================================
    router/max_violation        ``max_e load_e / mean load - 1``, mean over the layers; 0 when perfectly even, E/k - 1 at worst
    router/max_violation_worst  the same in the worst layer
    router/entropy              entropy in nats of the mean probability, mean over the layers; ``ln E`` when perfectly even
    router/dead_experts         experts, over all layers, that no token was assigned to
    router/logit_std            standard deviation of the logits, mean over the layers
    ==========================  =============================================================================================

    The module has to be one that `ReportsRouters`. Sums are kept on the device; the host looks at them only to log. Steps that
    the spike guard skipped count too: what is monitored is the forward pass.

    Args:
        every_n_steps: optimizer steps between two logs; None: the trainer's ``log_every_n_steps``.

    Attributes:
        latest: The values logged last.

    Raises:
        ValueError: ``every_n_steps`` below 1, or, when training starts, a module without router statistics.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"RouterMonitor: every_n_steps={every_n_steps} must be at least 1, or null for the trainer's.")
        self.every_n_steps = every_n_steps
        self.latest: dict[str, float] = {}
        self._counts_LE: Tensor | None = None
        self._sums: Tensor | None = None
        self._seen_step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without routers."""
        if stage == "fit" and not hasattr(pl_module, "router_stats"):
            raise ValueError(
                f"RouterMonitor: {type(pl_module).__name__} has no router_stats, so it has no experts or does not report its"
                " routers: remove RouterMonitor."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._counts_LE = self._sums = None
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Add a micro-batch, and log if it is time."""
        stats: RouterStats | None = pl_module.router_stats  # type: ignore[assignment]
        if stats is not None:
            self._add(stats)
        before, now = self._seen_step, trainer.global_step
        if now == before:
            return
        self._seen_step = now
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if crosses_multiple(before, now, every) and self._counts_LE is not None:
            self.latest = self._summary(trainer)
            for name, value in self.latest.items():
                pl_module.log(name, value)

    def _add(self, stats: RouterStats) -> None:
        counts_LE = stats.counts.detach().long()
        tokens_L = counts_LE.sum(1).float()  # times experts a token: a weight
        mean_L, std_L = stats.logit_mean.detach().float(), stats.logit_std.detach().float()
        probability_LE = stats.mean_probability.detach().float() * tokens_L[:, None]
        # Second moments add up over micro-batches, standard deviations do not.
        moments_L3 = torch.stack([torch.ones_like(mean_L), mean_L, std_L.square() + mean_L.square()], 1) * tokens_L[:, None]
        sums = torch.cat([probability_LE, moments_L3], 1)
        if self._counts_LE is None or self._sums is None:
            self._counts_LE, self._sums = counts_LE.clone(), sums
        else:
            self._counts_LE += counts_LE
            self._sums += sums

    def _summary(self, trainer: Trainer) -> dict[str, float]:
        assert self._counts_LE is not None and self._sums is not None
        counts_LE, sums = self._counts_LE, self._sums
        self._counts_LE = self._sums = None
        if trainer.world_size > 1:
            # Replicas that train on their own need not come here at the same time: only ranks that step together are asked.
            group = step_group(trainer.strategy)
            distributed.all_reduce(counts_LE, group=group)
            distributed.all_reduce(sums, group=group)
        num_experts = counts_LE.shape[1]
        loads_LE = counts_LE.float()
        violation_L = loads_LE.amax(1) / loads_LE.mean(1).clamp(min=1e-9) - 1
        weight_L, mean_L, second_L = sums[:, num_experts:].unbind(1)
        weight_L = weight_L.clamp(min=1e-9)
        probability_LE = sums[:, :num_experts] / weight_L[:, None]
        entropy_L = torch.special.entr(probability_LE).sum(1)
        std_L = (second_L / weight_L - (mean_L / weight_L).square()).clamp(min=0).sqrt()
        dead = (counts_LE == 0).sum().float()
        values = torch.stack([violation_L.mean(), violation_L.max(), entropy_L.mean(), dead, std_L.mean()]).tolist()
        names = ("max_violation", "max_violation_worst", "entropy", "dead_experts", "logit_std")
        return {f"router/{name}": value for name, value in zip(names, values, strict=True)}
