"""AntDT on real processes: what it computes, in which steps, from which samples, and that it goes on where it was."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from tiny import MLP, Tiny, TinyData
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules import ZooDataModule
from strategies import AntDTStrategy
from strategies.antdt.actions import Action, AdjustBatch
from strategies.antdt.monitor import Windows
from strategies.antdt.solutions import Solution, StaticBSP
from zoo import ZooModule


class Plans(Solution):
    """Decides on the given batches, one decision after the other."""

    windows = Windows(1, 2, "steps", min_steps=1, skip_steps=0)

    def __init__(self, plans: list[list[int]], cap: list[int | None] | None = None) -> None:
        self.plans, self.cap = plans, cap
        self.given = 0

    def decide(self, view: Any, now: float) -> list[Action]:
        if self.given >= len(self.plans) or AdjustBatch.kind not in view.ready:
            return []
        self.given += 1
        batch = self.plans[self.given - 1]
        return [AdjustBatch(tuple(batch), tuple(self.cap or view.cap))]

    def cooldowns(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Any) -> None:
        self.given = state["given"]


class Rows(Dataset):
    """Regression data that know their index."""

    def __init__(self, rows: int) -> None:
        self.x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.y = self.x.sin().sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        dtype = torch.get_default_dtype()
        return {"x": self.x[index].to(dtype), "y": self.y[index].to(dtype), "index": torch.tensor(index)}


class RowsData(ZooDataModule):
    """The rows, for training and evaluation."""

    def __init__(self, rows: int = 48, batch_size: int = 4, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.rows = rows

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(Rows(self.rows))

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(Rows(12))

    test_dataloader = predict_dataloader = val_dataloader


class Noisy(ZooModule):
    """Regression with noise on the input, drawn per sample."""

    def __init__(self, lr: float = 0.05, noise: float = 0.1) -> None:
        super().__init__(
            optimizer=partial(torch.optim.AdamW, lr=lr),
            lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=5, gamma=0.9),
        )
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.noise = noise
        self.seen: list[tuple[int, int, list[int]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, index = batch["x"], batch["index"]
        strategy = self.trainer.strategy
        if isinstance(strategy, AntDTStrategy) and strategy._step.is_shadow:
            index = index[:0]
        self.seen.append((self.trainer.current_epoch, self.trainer.global_step, index.tolist()))
        noise = self.train_random(len(x)).normal("noise", (3,), dtype=torch.float64).to(x)
        loss = (self(x + self.noise * noise) - batch["y"]).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = self.eval_random(len(batch["x"])).normal("noise", (3,), dtype=torch.float64).to(batch["x"])
        self.log("val_loss", (self(batch["x"] + noise) - batch["y"]).square().mean(), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["x"])


@dataclass
class Run:
    """What one rank saw."""

    seen: list[tuple[int, int, list[int]]]
    weights: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class Epochs(Callback):
    """Keeps the mean loss of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))


def trainer_of(strategy: Any, folder: Path, **options: Any) -> Trainer:
    options = {"enable_checkpointing": False, "limit_val_batches": 0, "max_epochs": 2, **options}
    return Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, precision="64-true", logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def weights_of(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in LightningModule.state_dict(module).items()}


def fit(folder: Path, antdt: dict[str, Any] | None, data: dict[str, Any] | None = None, **options: Any) -> Run:
    """Train, with AntDT or, given None, with whatever Lightning takes."""
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module, epochs = Noisy(), Epochs()
    strategy: Any = "ddp"
    if antdt is not None:
        strategy = AntDTStrategy(**{"server": "inprocess", "solution": StaticBSP(), **antdt})
    trainer = trainer_of(strategy, folder, callbacks=[epochs], **options)
    trainer.fit(module, RowsData(**data or {}))
    return Run(module.seen, weights_of(module), {f"loss {n}": loss for n, loss in enumerate(epochs.losses)})


def samples(runs: list[Run], epoch: int) -> list[int]:
    return sorted(index for run in runs for at, _, indices in run.seen if at == epoch for index in indices)


def assert_same(runs: list[Run], one: Run, tolerance: float = 1e-10) -> None:
    for run in runs:
        assert run.metrics == pytest.approx(one.metrics, rel=tolerance)
        for name, value in run.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=tolerance, atol=tolerance)


UNEVEN = [[6, 2], [1, 7], [3, 5], [7, 1]]
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # of AntDT, of the data, of the trainer
    "equal": ({}, {}, {}),
    "uneven": ({"solution": Plans(UNEVEN)}, {}, {}),
    "hook": ({"solution": Plans(UNEVEN), "weighting": "hook"}, {}, {}),
    "micro-batches": ({"solution": Plans(UNEVEN), "max_micro_batch": 2}, {}, {}),
    "micro-batches by hook": ({"solution": Plans(UNEVEN), "max_micro_batch": [1, 3], "weighting": "hook"}, {}, {}),
    "clipped": ({"solution": Plans(UNEVEN), "max_micro_batch": 3}, {}, {"gradient_clip_val": 0.05}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_one_process(pool: RankPool, tmp_path: Path, name: str) -> None:
    """Losses and weights of the DataLoader's own epochs in one process, whatever the batches, in float64."""
    antdt, data, options = SETTINGS[name]
    (one,) = pool.run(fit, tmp_path / "one", None, {"batch_size": 8}, world_size=1, **options)
    fast = {"report_every": 1, "decide_every": 1.0, "shard_steps": 1}
    two = pool.run(fit, tmp_path / "two", {**fast, **antdt}, {"batch_size": 4, **data}, world_size=2, **options)
    assert_same(two, one)
    sizes = {len(indices) for _, _, indices in two[0].seen}
    if "uneven" in name:
        assert len(sizes) > 2, "no decision came into force"


def test_what_is_compared_makes_a_difference(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(fit, tmp_path, None, {"batch_size": 8}, world_size=1)
    (clipped,) = pool.run(fit, tmp_path, None, {"batch_size": 8}, world_size=1, gradient_clip_val=0.05)
    (other,) = pool.run(fit, tmp_path, None, {"batch_size": 6}, world_size=1)
    assert one.metrics != pytest.approx(clipped.metrics, rel=1e-4)
    assert one.metrics != pytest.approx(other.metrics, rel=1e-4)


@pytest.mark.parametrize(("rows", "world"), [(45, 2), (50, 3), (2, 3)])
def test_every_sample_once_an_epoch(pool: RankPool, tmp_path: Path, rows: int, world: int) -> None:
    """A last step that is not full, ranks that have nothing in it, and fewer samples than ranks."""
    antdt = {"solution": Plans([[6, 1, 1][:world], [1, 6, 1][:world]] if world == 3 else UNEVEN), "shuffle": "global"}
    fast = {"report_every": 1, "decide_every": 1.0, "shard_steps": 3, "global_batch_size": 8}
    runs = pool.run(fit, tmp_path, {**fast, **antdt}, {"rows": rows, "batch_size": 1 if rows == 2 else 4}, world_size=world)
    for epoch in (0, 1):
        assert samples(runs, epoch) == list(range(rows))
    steps = {(epoch, step) for epoch, step, _ in runs[0].seen}
    assert len(steps) == 2 * -(-rows // 8)
    assert runs[0].metrics == runs[1].metrics


def fit_tiny(folder: Path, num_workers: int) -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module = Tiny(MLP(dropout=0.0))
    strategy = AntDTStrategy(solution=StaticBSP(), server="inprocess", shard_steps=1, max_micro_batch=3)
    trainer_of(strategy, folder).fit(module, TinyData(batch_size=8, num_workers=num_workers))
    return weights_of(module)


def test_workers_change_nothing(pool: RankPool, tmp_path: Path) -> None:
    here, there = (pool.run(fit_tiny, tmp_path, workers)[0] for workers in (0, 1))
    for name, value in there.items():
        torch.testing.assert_close(value, here[name], rtol=1e-10, atol=1e-10)
