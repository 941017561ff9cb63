"""Training that is cut anywhere and resumed sees the samples it would have seen."""

import itertools
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import Dataset

from datamodules.datamodule import ZooDataModule


class Indices(Dataset):
    """A data set whose samples are their own indices."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class IndexData(ZooDataModule):
    def __init__(self, length: int = 22, batch_size: int = 4, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.length = length

    def train_dataloader(self):
        return self.train_loader(Indices(self.length))

    def val_dataloader(self):
        return self.eval_loader(Indices(7))


class Recorder(L.LightningModule):
    """Records which samples each step was given, and fails inside the step it is told to."""

    def __init__(self, fail_in_step: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int]]] = []
        self.fail_in_step = fail_in_step

    def training_step(self, batch, batch_idx):
        if self.fail_in_step is not None and self.trainer.global_step == self.fail_in_step:
            raise Killed
        self.seen.append((self.trainer.current_epoch, batch.tolist()))
        return self.layer(batch.float().unsqueeze(1)).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Killed(Exception):
    pass


class SaveAndKill(Callback):
    """Saves a checkpoint at the ``count``-th call of a hook, and kills the run there."""

    def __init__(self, hook: str, count: int, path: Path) -> None:
        calls = itertools.count(1)

        def act(trainer, *args):
            if not trainer.sanity_checking and next(calls) == count:
                trainer.save_checkpoint(path)
                raise Killed

        setattr(self, hook, act)


def trainer(tmp_path: Path, *callbacks: Callback, **options) -> L.Trainer:
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 4, "num_sanity_val_steps": 0} | options,
    )


def whole_run(tmp_path: Path, **options) -> list[tuple[int, list[int]]]:
    module = Recorder()
    trainer(tmp_path, **options).fit(module, datamodule=IndexData())
    return module.seen


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_steps": 20, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("hook", "count"),
    [("on_train_batch_end", step) for step in range(1, 20)]
    + [("on_train_epoch_end", epoch) for epoch in range(1, 4)]
    + [("on_validation_end", epoch) for epoch in range(1, 4)],
)
def test_a_run_cut_right_after_a_checkpoint_continues_with_the_next_batch(hook, count, limit, tmp_path):
    expected = whole_run(tmp_path, **limit)
    path = tmp_path / "cut.ckpt"
    first, second = Recorder(), Recorder()
    with pytest.raises(Killed):
        trainer(tmp_path, SaveAndKill(hook, count, path), **limit).fit(first, datamodule=IndexData())
    trainer(tmp_path, **limit).fit(second, datamodule=IndexData(), ckpt_path=path, weights_only=True)
    assert first.seen + second.seen == expected
    assert len(expected) == 20
