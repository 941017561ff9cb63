"""A small job for the tests of AntDT: rows that know their index, and a module that draws noise."""

import json
import os
import select
import signal
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules import ZooDataModule
from strategies import AntDTStrategy
from strategies.antdt.control.solutions import StaticBSP
from zoo import ZooModule
from zoo.callbacks import RunCheckpoint


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


class Reports(Callback):
    """Reports each step before the next, so that decisions do not depend on when the agent's thread had its turn."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, AntDTStrategy) and trainer.strategy._agent is not None
        trainer.strategy._agent.report()


def trainer_of(strategy: Any, folder: Path, **options: Any) -> Trainer:
    options = {"enable_checkpointing": False, "limit_val_batches": 0, "max_epochs": 2, "precision": "64-true", **options}
    return Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, logger=False,
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
    callbacks = [epochs] if antdt is None else [epochs, Reports()]
    trainer = trainer_of(strategy, folder, callbacks=callbacks, **options)
    trainer.fit(module, RowsData(**data or {}))
    return Run(module.seen, weights_of(module), {f"loss {n}": loss for n, loss in enumerate(epochs.losses)})


def samples(runs: list[Run], epoch: int) -> list[int]:
    return sorted(index for run in runs for at, _, indices in run.seen if at == epoch for index in indices)


class Diary(Callback):
    """Writes down what each rank trains in each step, so that it outlives the process; and ends the process on purpose.

    Args:
        folder: where; a file for each rank.
        attempt: number of this start of the job.
        end: ``(how, rank, step)``: ``kill`` or ``term`` or ``raise``, after that step.
    """

    def __init__(self, folder: Path, attempt: int, end: tuple[str, int, int] | None) -> None:
        self.folder, self.attempt, self.end = folder, attempt, end
        self._told = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, {"begins_after": trainer.global_step})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        seen, self._told = pl_module.seen[self._told :], len(pl_module.seen)
        indices = [index for _, _, each in seen for index in each]
        self._write(trainer, {"epoch": trainer.current_epoch, "step": trainer.global_step, "indices": indices})
        if self.end is not None and self.end[1:] == (trainer.global_rank, trainer.global_step):
            if self.end[0] == "raise":
                raise ZeroDivisionError("on purpose")
            os.kill(os.getpid(), signal.SIGKILL if self.end[0] == "kill" else signal.SIGTERM)

    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        with (self.folder / f"diary{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"attempt": self.attempt, **row}) + "\n")


def diary(folder: Path) -> tuple[dict[int, Counter[int]], list[int]]:
    """What the final trajectory consists of: for each epoch, how often each sample was trained; and numbers of the steps."""
    rows = [json.loads(line) for path in folder.glob("diary*.jsonl") for line in path.read_text().splitlines()]
    begins = {row["attempt"]: row["begins_after"] for row in rows if "begins_after" in row}
    steps: set[int] = set()
    trained: dict[int, Counter[int]] = {}
    for row in rows:
        undone = any(later > row["attempt"] and begin < row.get("step", 0) for later, begin in begins.items())
        if "step" in row and not undone:
            steps.add(row["step"])
            trained.setdefault(row["epoch"], Counter()).update(row["indices"])
    return trained, sorted(steps)


def job(
    folder: Path,
    strategy: dict[str, Any] | str,
    attempt: int = 0,
    *,
    data: dict[str, Any] | None = None,
    save_every: int = 4,
    resume: bool = False,
    end: tuple[str, int, int] | None = None,
    max_restarts: int = 0,
    **options: Any,
) -> Run:
    """Train with checkpoints in ``folder``, from the last one on if told so; what ends it is in ``extra``."""
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = str(max_restarts)
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module = Noisy()
    made: Any = strategy
    if isinstance(strategy, dict):
        made = AntDTStrategy(
            **{"server": "inprocess", "solution": StaticBSP(), "report_every": 1, "decide_every": 1.0, **strategy}
        )
    keeper = RunCheckpoint(every_n_steps=save_every, minutes=None)
    trainer = trainer_of(made, folder, callbacks=[keeper, Diary(folder, attempt, end)], enable_checkpointing=True, **options)
    last = folder / "checkpoints" / "last.ckpt"
    extra: dict[str, Any] = {}
    try:
        trainer.fit(module, RowsData(**data or {}), ckpt_path=last if resume else None)
    except (SystemExit, ZeroDivisionError) as ended:
        extra = {"ended": type(ended).__name__, "code": getattr(ended, "code", None)}
    return Run(module.seen, weights_of(module), {}, {**extra, "step": trainer.global_step})


def wait_for_end(pid: int) -> None:
    """Wait until a process, of whomever, is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([handle], [], [], 20)
    os.close(handle)
    assert ended, f"process {pid} goes on"
