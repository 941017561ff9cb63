"""Two processes: times of their own, one gradient; equal to one process where the masks are."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Trainer, seed_everything
from sweep import sweep
from torch import Tensor
from torch.distributed import get_world_size

from datamodules import Digits
from zoo.callbacks import EMA
from zoo.emigm import EMIGM, Architecture, Masking, MaskSampler, PixelCodec

GLOBAL_BATCH = 32
METHODS = {
    "eMIGM": {},
    "eMIGM, equal masks": {"masking": Masking(law="fixed_count")},
    "MDM": {
        "masking": Masking(schedule="linear", t_min=0.0, time="sample"),
        "weighting": "elbo",
        "reduction": "sum_over_N",
        "use_mae": False,
    },
}


@dataclass
class Outcome:
    """What one process saw of a run."""

    counts: list[int]
    losses: list[float]
    weights: dict[str, Tensor]
    validation: dict[str, float]
    test: dict[str, float]
    indices: list[int]
    labels: list[int]
    images: Tensor


class Recorded(EMIGM):
    """Keeps losses and numbers of masked tokens; masks at one time where ``time`` is set."""

    time: float | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        draw, seen = self.masking.draw, self.__dict__.setdefault("counts", [])

        def recorded(random, num_tokens, time=None):
            drawn = draw(random, num_tokens, self.time if time is None else time)
            seen.append(int(drawn.mask.sum()))
            return drawn

        self.masking.draw = recorded
        try:
            loss = super().training_step(batch, batch_idx)
        finally:
            del self.masking.draw
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def run(folder: Path, method: str) -> Outcome:
    """Fit, validate, test and predict on the ranks of the present group."""
    world_size = get_world_size()
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    model = Recorded(
        codec=PixelCodec((1, 8, 8), mean=0.3052, std=0.3761),
        architecture=Architecture(width=16, encoder_depth=1, decoder_depth=1, num_heads=2, head_depth=1, head_width=16),
        num_classes=10,
        patch_size=2,
        buffer_size=2,
        attn_dropout=0.0,
        proj_dropout=0.0,
        sampler=MaskSampler(num_iter=4, head_steps=2),
        samples_per_class=1,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        **METHODS[method],
    )
    model.time = 0.3 if "equal" in method else None
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        precision="64-true",
        max_epochs=2,
        limit_train_batches=4,
        check_val_every_n_epoch=3,
        num_sanity_val_steps=0,
        accumulate_grad_batches=2,
        gradient_clip_val=3.0,
        callbacks=[EMA(decay=0.9)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = Digits(batch_size=GLOBAL_BATCH // world_size, predict_samples=13)
    trainer.fit(model, data)
    (validation,) = trainer.validate(model, data, verbose=False)
    (test,) = trainer.test(model, data, verbose=False)
    batches = trainer.predict(model, data)
    assert batches is not None
    return Outcome(
        counts=model.counts,
        losses=model.losses,
        weights={name: value.detach().clone() for name, value in model.network.state_dict().items()},
        validation=dict(validation),
        test=dict(test),
        indices=torch.cat([batch["index"] for batch in batches]).tolist(),
        labels=torch.cat([batch["label"] for batch in batches]).tolist(),
        images=torch.cat([batch["images"] for batch in batches]),
    )


def test_ranks_hide_different_numbers_of_tokens_and_still_reduce(pool: RankPool, tmp_path: Path) -> None:
    """Sequences of different length in the same step, and one set of weights."""
    first, second = pool.run(run, tmp_path, "eMIGM", world_size=2)
    assert len(first.counts) == len(second.counts) == 8
    assert sum(a != b for a, b in zip(first.counts, second.counts, strict=True)) >= 4
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert all(value.isfinite().all() for value in first.weights.values())

    assert sorted(first.indices + second.indices) == list(range(13))
    for outcome in (first, second):
        assert outcome.labels == [index % 10 for index in outcome.indices]
    assert first.validation == second.validation
    assert first.test == second.test


@pytest.mark.parametrize("method", sweep(["eMIGM, equal masks", "MDM"]))
def test_two_ranks_equal_one_process(pool: RankPool, tmp_path: Path, method: str) -> None:
    """Where a number of masked tokens is shared, the same is injected; masks of each sample are its own anyway."""
    (one,) = pool.run(run, tmp_path, method, world_size=1)
    two = pool.run(run, tmp_path, method, world_size=2)
    assert len(set(one.losses)) == 8
    means = [(first + second) / 2 for first, second in zip(two[0].losses, two[1].losses, strict=True)]
    assert means == pytest.approx(one.losses, rel=1e-9)
    for outcome in two:
        for name, value in one.weights.items():
            torch.testing.assert_close(outcome.weights[name], value, rtol=1e-9, atol=1e-10)
        assert outcome.validation == pytest.approx(one.validation, rel=1e-9)
        assert outcome.test == pytest.approx(one.test, rel=1e-9)
        torch.testing.assert_close(outcome.images, one.images[outcome.indices], rtol=0, atol=1e-6)
    assert sorted(two[0].indices + two[1].indices) == one.indices == list(range(13))
