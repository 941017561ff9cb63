"""Two processes with batches of b are one process with batches of 2b: losses, weights, averages, metrics, predictions."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.distributed import get_world_size

from datamodules import Digits
from zoo.bfn.module import BFN
from zoo.bfn.networks import ResidualMLP
from zoo.callbacks import EMA

GLOBAL_BATCH = 96


@dataclass
class Outcome:
    """What one process saw of a run."""

    losses: list[float]
    weights: dict[str, Tensor]
    validation: dict[str, float]
    test: dict[str, float]
    indices: list[int]
    images: Tensor


class RecordingBFN(BFN):
    """Keeps the loss of every micro-batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.__dict__.setdefault("seen", []).append(loss.item())
        return loss


def run(folder: Path, dtype: torch.dtype, accumulate: int, clip: float | None, stratified: bool) -> Outcome:
    """Fit, validate, test and predict on the ranks of the present group."""
    world_size = get_world_size()
    torch.set_default_dtype(dtype)
    seed_everything(3, verbose=False)
    model = RecordingBFN(
        network=ResidualMLP(width=32, depth=1),
        stratified_time=stratified,
        likelihood_steps=(0, 10),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    data = Digits(batch_size=GLOBAL_BATCH // world_size, predict_samples=13)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        precision="64-true" if dtype == torch.float64 else "32-true",
        max_epochs=2,
        limit_train_batches=5,  # not a multiple of the accumulation: the epoch's last step has one micro-batch
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[EMA(decay=0.9)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, data)
    (validation,) = trainer.validate(model, data, verbose=False)
    (test,) = trainer.test(model, data, verbose=False)
    batches = trainer.predict(model, data)
    assert batches is not None
    return Outcome(
        losses=model.seen,
        weights={name: value.detach().clone() for name, value in LightningModule.state_dict(model).items()},
        validation=dict(validation),
        test=dict(test),
        indices=torch.cat([batch["index"] for batch in batches]).tolist(),
        images=torch.cat([batch["images"] for batch in batches]),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), pytest.param(torch.float32, 1e-4, marks=pytest.mark.slow)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize(
    ("accumulate", "clip", "stratified"),
    [pytest.param(1, None, False, marks=pytest.mark.slow), (2, 0.5, False), (2, 0.5, True)],
    ids=["plain", "accumulated and clipped", "stratified"],
)
def test_two_ranks_equal_one_process(
    pool: RankPool,
    tmp_path: Path,
    dtype: torch.dtype,
    tolerance: float,
    accumulate: int,
    clip: float | None,
    stratified: bool,
) -> None:
    (one,) = pool.run(run, tmp_path, dtype, accumulate, clip, stratified, world_size=1)
    two = pool.run(run, tmp_path, dtype, accumulate, clip, stratified, world_size=2)

    mean_losses = [(first + second) / 2 for first, second in zip(two[0].losses, two[1].losses, strict=True)]
    assert len(one.losses) == 10
    assert mean_losses == pytest.approx(one.losses, rel=tolerance)

    for outcome in two:
        assert outcome.weights.keys() == one.weights.keys()
        for name, value in outcome.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=tolerance, atol=tolerance)
        assert outcome.validation == pytest.approx(one.validation, rel=tolerance)
        assert outcome.test == pytest.approx(one.test, rel=tolerance)
    assert {"test/bits_per_dim/continuous", "test/bits_per_dim/n=10"} <= one.test.keys()

    assert sorted(two[0].indices + two[1].indices) == list(range(13)) == one.indices
    for outcome in two:
        torch.testing.assert_close(outcome.images, one.images[outcome.indices], rtol=0, atol=max(tolerance, 1e-5))


def test_what_is_compared_makes_a_difference(pool: RankPool, tmp_path: Path) -> None:
    settings = [(1, None, False), (2, None, False), (2, 0.5, False), (2, 0.5, True)]
    outcomes = [pool.run(run, tmp_path, torch.float64, *setting, world_size=1)[0] for setting in settings]
    assert len({outcome.losses[-1] for outcome in outcomes}) == len(settings)
    assert len({tuple(outcome.validation.items()) for outcome in outcomes}) == len(settings)
