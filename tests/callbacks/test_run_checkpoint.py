"""`RunCheckpoint`: what a checkpoint says that is saved before the run, or its continuation, has taken a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn

from datamodules import ZooDataModule
from zoo import ZooModule
from zoo.callbacks import RunCheckpoint


class Rows(ZooDataModule):
    """Thirty-five batches of two rows."""

    def __init__(self) -> None:
        super().__init__(batch_size=2)

    def train_dataloader(self) -> Any:
        return self.train_loader(torch.randn(70, 3, generator=torch.Generator().manual_seed(0)).double())


class Linear(ZooModule):
    """Remembers what it has seen, and at which of the logger's steps."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.seen: list[Tensor] = []
        self.logged: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        self.logged.append(self.trainer.fit_loop.epoch_loop._batches_that_stepped)
        return (batch @ self.weight - 1).square().mean()


class Saves(Callback):
    """Saves after one batch more than once the run has begun or gone on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == 2:
            trainer.save_checkpoint(self.path)


def run(folder: Path, steps: int, *callbacks: Callback, ckpt_path: Path | None = None) -> Linear:
    model = Linear()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, accumulate_grad_batches=4, callbacks=[RunCheckpoint(folder=folder), *callbacks],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=Rows(), ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.parametrize("taken", [0, 3, 9])
def test_first_micro_batches_of_a_run_that_begins_or_goes_on_are_trained_again(tmp_path: Path, taken: int) -> None:
    whole = run(tmp_path, 14)
    if taken:
        run(tmp_path, taken)
    start, middle = tmp_path / "last.ckpt" if taken else None, tmp_path / "middle.ckpt"
    run(tmp_path, taken + 3, Saves(middle), ckpt_path=start)
    rest = run(tmp_path, 14, ckpt_path=middle)
    assert torch.equal(rest.weight, whole.weight)
    assert rest.logged == whole.logged[-len(rest.logged) :]
    assert all(torch.equal(a, b) for a, b in zip(rest.seen, whole.seen[-len(rest.seen) :], strict=True))
    assert len(rest.seen) == len(whole.seen) - {0: 0, 3: 12, 9: 35}[taken]
