"""Parameter servers under Lightning: the training of one process, or one that loses no sample, whoever is slow or killed."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from distributed import RankPool
from strategies import ParameterServerStrategy
from strategies.antdt.ps.server import ServerThread
from strategies.antdt.server import ServerThread as DataServer
from strategies.antdt.solutions import StaticBSP

ROWS = 70


class Clicks(Dataset[dict[str, Tensor]]):
    """Rows with an id, numbers and a target."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 13, (rows, 2), generator=generator)
        self.x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randn(rows, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "ids": self.ids[index], "x": self.x[index], "y": self.y[index]}


class Regression(LightningModule):
    """An embedding, a layer and a schedule."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(13, 4).double()
        self.layer = nn.Linear(7, 1).double()
        self.norm = nn.BatchNorm1d(7, affine=False).double().eval()
        self.kind = optimizer
        self.metric = MeanMetric()
        self.seen: list[Tensor] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        features = torch.cat([self.table(batch["ids"]).sum(1), batch["x"]], 1)
        return self.layer(features).squeeze(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = (self(batch) - batch["y"]).square().mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["y"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        error = (self(batch) - batch["y"]).square()
        self.metric.update(error.float())
        self.log("metric", self.metric, on_epoch=True)
        self.log("val_loss", error.mean(), sync_dist=True, batch_size=len(error))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return torch.stack([batch["index"].double(), self(batch)], 1)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.table.parameters(), "weight_decay": 0.0}, {"params": self.layer.parameters(), "lr": 0.02}]
        make = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=0.05),
            "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
            "lbfgs": lambda: torch.optim.LBFGS(self.layer.parameters()),
        }
        optimizer = make[self.kind]()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loader(batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(Clicks(), batch_size=batch_size, shuffle=shuffle)


@contextmanager
def services(count: int = 1, **options: Any) -> Iterator[dict[str, Any]]:
    """A data-sharding server and parameter servers in this process; arguments of the strategy that name them."""
    with DataServer() as data:
        token = data.address.token
        servers = [ServerThread(index, token, **options) for index in range(count)]
        former = os.environ.get("ANTDT_TOKEN")
        os.environ["ANTDT_TOKEN"] = token
        try:
            yield {
                "server": f"127.0.0.1:{data.address.port}",
                "servers": [f"127.0.0.1:{server.address.port}" for server in servers],
            }
        finally:
            if former is None:
                del os.environ["ANTDT_TOKEN"]
            for server in servers:
                server.stop()


def trainer(folder: Path, ranks: int, strategy: Any, **options: Any) -> Trainer:
    if distributed.is_initialized():
        distributed.destroy_process_group()  # workers share none
    return Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"enable_checkpointing": False, "max_epochs": 2, **options},
    )  # fmt: skip


def fit(folder: Path, ranks: int, options: dict[str, Any], kind: str = "adamw", ckpt: str | None = None, save: str = "",
        **trainer_options: Any) -> dict[str, Any]:  # fmt: skip
    """Train on a rank, and tell what came out."""
    module = Regression(kind)
    strategy = ParameterServerStrategy(**{"shard_steps": 1, "heartbeat_timeout": 30.0, **options})
    strategy.positions_log = []
    of = trainer(folder, ranks, strategy, **trainer_options)
    of.fit(module, loader(), loader(shuffle=False), ckpt_path=ckpt)
    if save:
        of.save_checkpoint(save)
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "steps": [(epoch, version, positions.tolist()) for epoch, version, positions in strategy.positions_log],
        "metrics": {name: float(value) for name, value in of.callback_metrics.items()},
        "global_step": of.global_step,
        "lr": of.optimizers[0].param_groups[0]["lr"],
    }


def one_process(steps: list[list[int]], kind: str, clip: float = 0.0, order_seed: int = 0) -> Regression:
    """What one process makes of these samples, step by step."""
    module = Regression(kind)
    (optimizer,), (schedule,) = module.configure_optimizers()
    data = Clicks()
    for indices in steps:
        optimizer.zero_grad()
        batch = torch.utils.data.default_collate([data[index] for index in indices])
        (module(batch) - batch["y"]).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        schedule["scheduler"].step()
    return module


def union(results: list[dict[str, Any]], seed: int = 0) -> list[list[int]]:
    """Sample indices of each step, of all workers together."""
    found: dict[tuple[int, int], list[int]] = {}
    for result in results:
        for epoch, version, positions in result["steps"]:
            found.setdefault((epoch, version), []).extend(positions)
    orders = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed + epoch)).tolist() for epoch in range(9)]
    return [[orders[epoch][position] for position in positions] for (epoch, _), positions in sorted(found.items())]


def trained(results: list[dict[str, Any]]) -> Counter[tuple[int, int]]:
    return Counter((epoch, position) for result in results for epoch, _, positions in result["steps"] for position in positions)


EVERYTHING = Counter({(epoch, position): 1 for epoch in range(2) for position in range(ROWS)})


@pytest.mark.parametrize(("count", "kind", "clip", "tables"), [
    (1, "adamw", 0.0, None), (2, "sgd", 0.5, ["table"]), (3, "adamw", 0.0, ["ta*"])])  # fmt: skip
def test_synchronous_training_is_that_of_one_process_with_the_union_batch(
    pool: RankPool, tmp_path: Path, count: int, kind: str, clip: float, tables: list[str] | None
) -> None:
    with services(count) as where:
        options = {**where, "mode": "bsp", "tables": tables}
        results = pool.run(fit, tmp_path, 2, options, kind, gradient_clip_val=clip or None, world_size=2)
    assert trained(results) == EVERYTHING
    steps = union(results)
    assert len(steps) == 2 * 7
    expected = one_process(steps, kind, clip).state_dict()
    for result in results:
        assert result["lr"] == pytest.approx(0.05 * 0.95**14, rel=1e-12)
        for name, value in expected.items():
            assert (value - result["weights"][name]).abs().max() < 1e-10, name
    module = Regression(kind)
    module.load_state_dict(results[0]["weights"])
    whole = torch.utils.data.default_collate([Clicks()[index] for index in range(ROWS)])
    loss = float((module(whole) - whole["y"]).square().mean())
    for result in results:
        assert result["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-6)
        assert result["metrics"]["metric"] == pytest.approx(loss, rel=1e-6)
    assert results[0]["metrics"]["loss_epoch"] == results[1]["metrics"]["loss_epoch"]
