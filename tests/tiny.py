"""A module, components and data that are as small as can be, written as a user would write them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from datamodules import ZooDataModule
from datamodules.clicks.click_table import ClickRows
from zoo import Configurable, ZooModule


class Net(Configurable, nn.Module):
    """Base class of the tiny networks."""


class MLP(Net):
    """Two layers with dropout."""

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Deep(Net):
    """A network made of networks."""

    def __init__(self, parts: list[Net], scale: float = 1.0) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.parts(x)


class Tiny(ZooModule):
    """Denoises four numbers."""

    def __init__(
        self,
        net: Net,
        noise: float = 0.1,
        root: Path | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99)),
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, compile=compile)
        self.net = net
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        noise = self.train_random(len(x)).normal("noise", (4,), dtype=torch.float64).to(x)
        loss = (self(x + self.noise * noise) - x).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        noise = self.eval_random(len(x)).normal("noise", (4,), dtype=torch.float64).to(x)
        self.log("val_loss", (self(x + self.noise * noise) - x).square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", (self(batch[0]) - batch[0]).square().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Wider(Tiny):
    """A user's subclass with an argument of its own."""

    def __init__(self, gain: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


class Renamed(Tiny):
    """A module one of whose arguments had another name in an earlier version."""

    renamed_arguments = {"sigma": "noise"}  # noqa: RUF012

    def __init__(self, net: Net, noise: float = 0.5) -> None:
        super().__init__(net=net, noise=noise)


class TinyData(ZooDataModule):
    """Sixty-four rows of four numbers."""

    def __init__(self, rows: int = 64, batch_size: int = 8, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.num_rows = rows

    def setup(self, stage: str) -> None:
        self.rows = TensorDataset(torch.randn(self.num_rows, 4, generator=torch.Generator().manual_seed(0)))

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.rows)

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(self.rows)

    test_dataloader = predict_dataloader = val_dataloader


class TinyClicks(ZooDataModule):
    """Forty-eight rows of clicks, which know the sizes of their columns."""

    model_arguments = ("field_dims", "num_dense")
    field_dims = (6, 4)
    num_dense = 1

    def __init__(self, rows: int = 48, batch_size: int = 8) -> None:
        super().__init__(batch_size=batch_size)
        random = np.random.default_rng(0)
        sparse = np.stack([random.integers(dim, size=rows) for dim in self.field_dims], axis=1)
        self.rows = ClickRows(sparse, random.normal(size=(rows, 1)), random.integers(2, size=rows))

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.rows)

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(self.rows)

    test_dataloader = predict_dataloader = val_dataloader
