"""Training that is cut anywhere and resumed sees the samples it would have seen."""

from itertools import count as counting
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from sweep import sweep_tuples
from torch import distributed, nn
from torch.utils.data import Dataset

from datamodules.base.datamodule import ZooDataModule
from zoo.callbacks import RunCheckpoint


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
        self.validated: list[int] = []
        self.fail_in_step = fail_in_step

    def training_step(self, batch, batch_idx):
        if self.fail_in_step is not None and self.trainer.global_step == self.fail_in_step:
            raise Killed
        self.seen.append((self.trainer.current_epoch, batch.tolist()))
        return self.layer(batch.float().unsqueeze(1)).mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Killed(Exception):
    pass


class SaveAndKill(Callback):
    """Saves a checkpoint at the ``count``-th call of a hook, and kills the run there."""

    def __init__(self, hook: str, count: int, path: Path) -> None:
        calls = counting(1)

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
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 4, "num_sanity_val_steps": 0, "enable_checkpointing": False} | options,
    )


def whole_run(tmp_path: Path, **options) -> list[tuple[int, list[int]]]:
    module = Recorder()
    trainer(tmp_path, **options).fit(module, datamodule=IndexData())
    return module.seen


LIMITS = {"epochs": {"max_epochs": 4}, "steps": {"max_steps": 20, "max_epochs": -1}}


def cut_and_resume(hook: str, count: int, limit: dict[str, int], tmp_path: Path, workers: tuple[int, int]) -> None:
    expected = whole_run(tmp_path, **limit)
    path = tmp_path / "cut.ckpt"
    first, second = Recorder(), Recorder()
    with pytest.raises(Killed):
        trainer(tmp_path, SaveAndKill(hook, count, path), **limit).fit(first, datamodule=IndexData(num_workers=workers[0]))
    trainer(tmp_path, **limit).fit(second, datamodule=IndexData(num_workers=workers[1]), ckpt_path=path, weights_only=True)
    assert first.seen + second.seen == expected
    assert len(expected) == 20


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    ("hook", "count"),
    sweep_tuples(
        [("on_train_batch_end", step) for step in (1, 4, 5, 6, 10, 13, 19)]
        + [("on_train_epoch_end", epoch) for epoch in range(1, 4)]
        + [("on_validation_end", epoch) for epoch in range(1, 4)],
        quick=(1, 2, 7, 11),
    ),
)
def test_a_run_cut_right_after_a_checkpoint_continues_with_the_next_batch(hook, count, limit, tmp_path):
    cut_and_resume(hook, count, LIMITS[limit], tmp_path, workers=(0, 0))


@pytest.mark.parametrize("workers", [pytest.param((2, 2), marks=pytest.mark.slow), (0, 2), (2, 0)])
@pytest.mark.parametrize(
    ("hook", "count"), [("on_train_batch_end", 7), pytest.param("on_train_epoch_end", 2, marks=pytest.mark.slow)]
)
def test_it_does_with_workers_and_another_number_of_them(hook, count, workers, tmp_path):
    cut_and_resume(hook, count, LIMITS["epochs"], tmp_path, workers)


@pytest.mark.parametrize(("step", "num_workers"), [
    pytest.param(step, workers, marks=[] if (step, workers) in ((5, 2), (13, 0)) else [pytest.mark.slow])
    for step in (0, 1, 5, 13) for workers in (0, 2)
])  # fmt: skip
def test_a_batch_that_was_fetched_and_not_trained_is_trained_after_resuming(step, num_workers, tmp_path):
    expected = whole_run(tmp_path)
    first, second = Recorder(fail_in_step=step), Recorder()
    checkpoint = RunCheckpoint(folder=tmp_path)
    with pytest.raises(Killed):
        trainer(tmp_path, checkpoint, enable_checkpointing=True).fit(first, datamodule=IndexData(num_workers=num_workers))
    path = checkpoint.path(None)
    assert path.exists() == (step > 0)
    trainer(tmp_path).fit(
        second, datamodule=IndexData(num_workers=num_workers), ckpt_path=path if step else None, weights_only=True
    )
    assert first.seen == expected[:step]
    assert first.seen + second.seen == expected


@pytest.mark.parametrize("stop", [3, 5])
def test_limited_epochs_resume_too(stop, tmp_path):
    cut_and_resume("on_train_batch_end", stop, {"max_epochs": 7, "limit_train_batches": 3, "max_steps": 20}, tmp_path, (0, 0))


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit_as_rank(folder: Path, batch_size: int, ckpt_path: Path | None = None):
    """What this process saw in training and in validation."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    module = Recorder()
    options = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    callbacks = [] if ckpt_path else [SaveAt(8, folder / f"{ranks}.ckpt")]
    trainer(folder, *callbacks, **options).fit(
        module,
        datamodule=IndexData(batch_size=batch_size),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return module.seen, module.validated


def interleave(ranks) -> list[tuple[int, list[int]]]:
    """The global batches of several ranks."""
    steps = zip(*(seen for seen, _ in ranks), strict=True)
    return [(parts[0][0], [i for row in zip(*(b for _, b in parts), strict=True) for i in row]) for parts in steps]


def test_two_processes_see_what_one_sees_and_resume_as_either(pool, tmp_path):
    expected, validated = fit_as_rank(tmp_path, 4)
    ranks = pool.run(fit_as_rank, tmp_path, 2, world_size=2)
    assert interleave(ranks) == expected
    assert validated == list(range(7)) * 4
    assert [seen for _, seen in ranks] == [[0, 2, 4, 6] * 4, [1, 3, 5] * 4]
    for saved_by in (1, 2):
        path = tmp_path / f"{saved_by}.ckpt"
        assert interleave(pool.run(fit_as_rank, tmp_path, 2, path, world_size=2)) == expected[8:]
        assert fit_as_rank(tmp_path, 4, path)[0] == expected[8:]
