"""A strategy of your own, and a callback that asks it; both know `zoo.strategy_contract` and nothing of one another.

torchrun --nproc-per-node 2 examples/my_strategy.py
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer
from typing_extensions import override

from datamodules import Digits
from zoo.bfn import BFN, ResidualMLP
from zoo.callbacks import SpikeGuard
from zoo.strategy_contract import StrategyContract, gradient_norm, replicas_diverge, step_group


class LocalSGDStrategy(StrategyContract, DDPStrategy):
    """Ranks train apart, and average their weights every few steps.

    Args:
        average_every: Steps between two averages.
        **kwargs: As for Lightning's ``DDPStrategy``.
    """

    def __init__(self, average_every: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.average_every = average_every
        self.alone: dist.ProcessGroup | None = None

    @override
    def replicas_diverge(self) -> bool:
        """Yes: SpikeGuard says that it queues no samples then."""
        return True

    @override
    def step_group(self) -> dist.ProcessGroup | None:
        """This rank alone: what is measured at a step is not reduced over others."""
        return self.alone

    @override
    def configure_ddp(self) -> None:
        """Gradients stay apart, so nothing wraps the module; all begin with the weights of rank 0."""
        for parameter in self.model.parameters():
            dist.broadcast(parameter.detach(), src=0)
        self.alone, _ = dist.new_subgroups(group_size=1)

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, *args, **kwargs)
        if (self.lightning_module.global_step + 1) % self.average_every == 0:
            self.average()
        return output

    @override
    def on_validation_start(self) -> None:
        self.average()

    @override
    def on_train_end(self) -> None:
        self.average()

    @torch.no_grad()
    def average(self) -> None:
        """Give all ranks the mean of their weights."""
        for parameter in self.model.parameters():
            dist.all_reduce(parameter.data)
            parameter.data /= self.world_size


class GradientNorms(Callback):
    """Keeps the gradient norm of each step, the mean over the ranks that take it together; goes with any strategy."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        norm = gradient_norm(trainer.strategy, optimizer).detach().clone()
        if trainer.world_size > 1:
            group = step_group(trainer.strategy)
            dist.all_reduce(norm, group=group)
            norm /= dist.get_world_size(group)
        self.norms.append(float(norm))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scope = "on each rank" if replicas_diverge(trainer.strategy) else "over all ranks"
        print(f"Mean gradient norm {scope}: {sum(self.norms) / len(self.norms):.3f}")


def main(strategy: Any = None, max_steps: int = 100, **options: Any) -> tuple[BFN, list[float]]:
    """Train; the module and the norms that the callback kept."""
    model, norms = BFN(ResidualMLP(width=32)), GradientNorms()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy or LocalSGDStrategy(),
        max_steps=max_steps,
        callbacks=[norms, SpikeGuard()],
        **options,
    )
    trainer.fit(model, Digits(batch_size=32))
    return model, norms.norms


if __name__ == "__main__":
    main()
