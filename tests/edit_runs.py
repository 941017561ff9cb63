"""Small regressions by EDiT, for its tests: what is trained, on which rows, and what a rank saw of it."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules import ZooDataModule
from zoo import ZooModule

WIDTH = 4
PLAIN: dict[str, Any] = {"outer_lr": 1.0, "outer_momentum": 0.0, "weighted": False, "skip_anomaly": False, "clip": None}
FULL: dict[str, Any] = {"outer_lr": 0.7, "outer_momentum": 0.8, "temperature": 0.1, "ewma_warmup": 2, "ewma_alpha": 0.3,
                        "ewma_threshold": 0.5, "clip": 0.02}  # fmt: skip


class Layer(nn.Module):
    """A residual layer with a buffer that it moves in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("level", torch.zeros(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level.lerp_(x.detach().mean().view(1).to(self.level), 0.1)
            self.count += 1
        return x + self.linear(x).tanh()


class Residual(ZooModule):
    """Regression by residual layers; the middle one may be read instead of called, and one is skipped at odd steps."""

    def __init__(self, depth: int = 3, lr: float = 0.05, adam: bool = True) -> None:
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        super().__init__(
            optimizer=partial(kind, lr=lr), lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.9)
        )
        self.embed = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 1)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self(x) - y).square().mean()
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class ReadsLayer(Residual):
    """Uses the second layer by its weights, without calling it, and the third one at even batches only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = self.layers[0](self.embed(x))
        x = x + nn.functional.linear(x, self.layers[1].linear.weight)
        x = self.layers[2](x) if batch_idx % 2 == 0 else x
        loss = (self.head(x) - y).square().mean()
        self.seen.append(loss.item())
        return loss


class Numbers(Dataset):
    """Regression data; the row of an index is always the same."""

    def __init__(self, rows: int) -> None:
        self.x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.y = self.x.sin().sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        dtype = torch.get_default_dtype()
        return self.x[index].to(dtype), self.y[index].to(dtype)


class NumbersData(ZooDataModule):
    """The same rows from a loader that knows its place."""

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(Numbers(48))


@dataclass
class Run:
    """What one rank saw."""

    losses: list[float]
    weights: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


def trainer_of(strategy: Any, steps: int = 8, **options: Any) -> Trainer:
    options = {"enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, precision="64-true", max_steps=steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=options.pop("limit_val_batches", 0), **options,
    )  # fmt: skip


def model_of(kind: type[Residual] = Residual, **options: Any) -> Residual:
    torch.set_default_dtype(torch.float64)
    seed_everything(5, verbose=False)
    return kind(**options)


def loader(batch: int = 4, rows: int = 48) -> DataLoader:
    torch.set_default_dtype(torch.float64)
    return DataLoader(Numbers(rows), batch_size=batch)


def weights_of(model: LightningModule) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in LightningModule.state_dict(model).items()
    }


def fit(strategy: Any, batch: int = 4, kind: type[Residual] = Residual, steps: int = 8, adam: bool = True, **options: Any) -> Run:
    """Train on the ranks of the present group."""
    model = model_of(kind, adam=adam)
    strategy = strategy() if callable(strategy) else strategy
    trainer_of(strategy, steps, **options).fit(model, loader(batch))
    return Run(model.seen, weights_of(model))


def apart(one: Run, other: Run, buffers: bool = True) -> float:
    """Largest difference of two runs' weights."""
    assert one.weights.keys() == other.weights.keys()
    return max(
        (one.weights[name] - other.weights[name]).abs().max().item()
        for name in one.weights
        if buffers or not name.endswith(("level", "count"))
    )
