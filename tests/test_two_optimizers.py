"""A module with two optimizers: schedules, clipping, counts, averages and checkpoints are as exact as with one."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankError, RankPool
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from sweep import sweep
from torch import Tensor, nn
from torch.distributed import get_world_size, is_initialized
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import StepLR

from datamodules import Digits
from strategies import PaROStrategy
from zoo import ZooModule
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA, RunCheckpoint

GLOBAL_BATCH = 16
STEPS = 3  # of a batch: two of the critic, one of the generator
ADAM = partial(torch.optim.Adam, lr=1e-2, betas=(0.5, 0.9))


class GAN(ZooModule):
    """Draws digits; the critic takes two steps to one of the generator."""

    def __init__(
        self,
        dropout: float = 0.1,
        optimizer: OptimizerCallable = ADAM,
        critic_optimizer: OptimizerCallable = ADAM,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Any = "step",
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, lr_scheduler_interval=lr_scheduler_interval)
        self.automatic_optimization = False
        self.critic_optimizer = critic_optimizer
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 64))
        self.critic = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return [
            self.optimizer_config(self.optimizer, self.generator.parameters(), self.lr_scheduler),
            self.optimizer_config(self.critic_optimizer, self.critic.parameters(), self.lr_scheduler),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        image_BP = batch[0].flatten(1)
        generator, critic = self.optimizers()
        random = self.train_random(len(image_BP))
        for number in range(STEPS):
            noise_BZ = random.normal(f"noise {number}", (4,), dtype=torch.float64).to(image_BP)
            optimizer = generator if number == STEPS - 1 else critic
            with self.toggled_optimizer(optimizer):
                drawn_BP = self.generator(noise_BZ)
                loss = softplus(-self.critic(drawn_BP)).mean()
                if optimizer is critic:
                    loss = softplus(-self.critic(image_BP)).mean() + softplus(self.critic(drawn_BP.detach())).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
        self.log("loss", loss, on_epoch=True, on_step=False)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.critic(self.generator(batch[0].flatten(1)[:, :4])).mean(), sync_dist=True)


class Watch(Callback):
    """Notes the steps at which a checkpoint is saved, and the learning rates of each batch; keeps one checkpoint of the run."""

    def __init__(self, keep_at: int = -1) -> None:
        self.keep_at = keep_at
        self.saved: list[int] = []
        self.rates: list[list[float]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved.append(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])
        if trainer.global_step == self.keep_at:  # what a process that is killed here leaves
            folder = next(c for c in trainer.callbacks if isinstance(c, RunCheckpoint)).folder
            assert folder is not None
            shutil.copy(folder / "last.ckpt", folder / "killed.ckpt")


def fit(
    folder: Path, *callbacks: Callback, model: GAN | None = None, batches: int = 8, ckpt_path: Any = None, **options: Any
) -> GAN:
    """Train on the ranks of the present group, or in this process."""
    ranks = get_world_size() if is_initialized() else 1
    seed_everything(3, verbose=False)
    model = GAN().double() if model is None else model
    defaults = {"precision": "64-true", "limit_train_batches": 5, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, RunCheckpoint) for callback in callbacks),
        max_steps=STEPS * batches, callbacks=list(callbacks), default_root_dir=folder, **{**defaults, **options},
    )  # fmt: skip
    trainer.fit(model, Digits(batch_size=GLOBAL_BATCH // ranks), ckpt_path=ckpt_path, weights_only=True)
    return model


def on_ranks(folder: Path, strategy: str) -> dict[str, Tensor]:
    model = fit(
        folder, EMA(0.9, modules=["generator"]), strategy=strategy, gradient_clip_val=0.05,
        model=GAN(dropout=0.0, lr_scheduler=partial(StepLR, step_size=2, gamma=0.7)).double(),
    )  # fmt: skip
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        fit(folder, strategy=PaROStrategy("GGG", group_size=1))
    return str(error.value)


def test_two_ranks_equal_one_process_and_paro_refuses(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(on_ranks, tmp_path, "auto", world_size=1)
    for weights in pool.run(on_ranks, tmp_path, "ddp_find_unused_parameters_true", world_size=2):
        assert weights.keys() == one.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, one[name], rtol=1e-10, atol=1e-10, msg=name)
    said = pool.run(refused, tmp_path, world_size=2)[0]
    assert "gives 2 optimizers (Adam, Adam)" in said and len(said) <= 300


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("killed_at", sweep([12, 15, 24], quick=(0, 1)))  # in an epoch, at its end, in the next
def test_a_killed_run_continues_exactly(tmp_path: Path, interval: str, killed_at: int) -> None:
    def model() -> GAN:
        schedule = partial(StepLR, step_size=2, gamma=0.7) if interval == "step" else partial(StepLR, step_size=1, gamma=0.7)
        return GAN(lr_scheduler=schedule, lr_scheduler_interval=interval).double()

    watches = Watch(keep_at=killed_at), Watch()
    saves = partial(RunCheckpoint, every_n_steps=5, folder=tmp_path)
    whole = fit(tmp_path, EMA(0.9, warmup=True), watches[0], saves(), model=model(), batches=12)
    checkpoints = [read_checkpoint(tmp_path / "last.ckpt")]
    rest = fit(
        tmp_path, EMA(0.9, warmup=True), watches[1], saves(), model=model(), batches=12, ckpt_path=tmp_path / "killed.ckpt"
    )
    checkpoints.append(read_checkpoint(tmp_path / "last.ckpt"))

    assert watches[0].saved == [6, 12, 15, 21, 27, 30, 36]
    assert watches[0].rates[-len(watches[1].rates) :] == watches[1].rates
    assert whole.applied_steps_by_optimizer == rest.applied_steps_by_optimizer == [12, 24]
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "zoo_applied_steps"):
        assert same(checkpoints[0][key], checkpoints[1][key]), key


class Kill(Callback):
    """Ends its process at a step, without a word."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 18:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
    """The last checkpoint of a run that saves every five steps."""
    saves = RunCheckpoint(every_n_steps=5, folder=folder)
    fit(folder, EMA(0.9), *callbacks, saves, model=GAN().double(), batches=12, ckpt_path=ckpt_path)
    return read_checkpoint(folder / "last.ckpt")


def test_a_process_that_is_killed_continues_exactly(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        pool.run(saving, tmp_path / "killed", Kill(), world_size=1)
    assert read_checkpoint(tmp_path / "killed/last.ckpt")["global_step"] == 15
    (rest,) = pool.run(saving, tmp_path / "killed", ckpt_path=tmp_path / "killed/last.ckpt", world_size=1)
    (whole,) = pool.run(saving, tmp_path / "whole", world_size=1)
    for key in ("state_dict", "current_model_state", "optimizer_states", "zoo_applied_steps"):
        assert same(whole[key], rest[key]), key


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested data."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedules_follow_the_steps_of_their_own_optimizer(tmp_path: Path, interval: str) -> None:
    watch = Watch()
    fit(tmp_path, watch, model=GAN(lr_scheduler=partial(StepLR, step_size=2, gamma=0.5), lr_scheduler_interval=interval).double(),
        batches=13)  # fmt: skip
    done = [(batch, 2 * batch) if interval == "step" else (batch // 5, batch // 5) for batch in range(13)]
    assert watch.rates == [[pytest.approx(1e-2 * 0.5 ** (steps // 2)) for steps in counts] for counts in done]


def test_a_schedule_follows_a_metric(tmp_path: Path) -> None:
    def plateau(monitor: str) -> GAN:
        return GAN(lr_scheduler=partial(ReduceLROnPlateau, monitor=monitor, patience=0, threshold=1e9, mode="min")).double()

    watch = Watch()
    fit(tmp_path, watch, model=plateau("loss"), batches=12)  # no epoch is better by so much
    assert [rates[0] for rates in watch.rates] == pytest.approx([1e-2] * 5 + [1e-3] * 5 + [1e-4] * 2)
    with pytest.raises(ValueError, match="follows the metric 'lost', which was not logged: log it, or name one of"):
        fit(tmp_path, model=plateau("lost"), batches=12)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_trainers_clipping_holds_for_each_step(tmp_path: Path, algorithm: str) -> None:
    sgd = partial(torch.optim.SGD, lr=1.0)
    model = GAN(optimizer=sgd, critic_optimizer=sgd).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(tmp_path, model=model, batches=1, gradient_clip_val=1e-4, gradient_clip_algorithm=algorithm)
    for part, steps in (("generator", 1), ("critic", 2)):
        change = torch.cat([(v - before[n]).flatten() for n, v in model.state_dict().items() if n.startswith(part)])
        size = change.norm() if algorithm == "norm" else change.abs().max()
        assert 0 < size <= steps * 1e-4 * (1 + 1e-6)


def test_each_optimizers_steps_average_its_own_weights(tmp_path: Path) -> None:
    class Record(Callback):
        weights: list[dict[str, Tensor]] = []  # noqa: RUF012

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(lambda *_: self.keep(pl_module))
            self.keep(pl_module)

        def keep(self, module: LightningModule) -> None:
            self.weights.append({name: value.clone() for name, value in module.state_dict().items()})

    record = Record()
    model = fit(tmp_path, EMA(0.8), record, batches=3)
    for name, value in model.state_dict().items():
        average, last = record.weights[0][name], record.weights[0]
        for number, weights in enumerate(record.weights[1:]):
            if name.startswith("generator") == (number % STEPS == STEPS - 1):
                average = 0.8 * average + 0.2 * weights[name]
            else:
                assert torch.equal(weights[name], last[name])
            last = weights
        torch.testing.assert_close(value, average, rtol=1e-12, atol=1e-12)
