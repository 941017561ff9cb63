"""The average is the published recursion over applied steps, and validation, checkpoints and resuming see the right weights."""

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from tiny import MLP, Tiny, TinyData

from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA


class Record(Callback):
    """Keeps the weights after each applied step, and what validation saw."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []
        self.after_validation: list[torch.Tensor] = []

    def on_train_start(self, trainer, module):
        self.steps.append(flat(module))

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == len(self.steps):
            self.steps.append(flat(module))

    def on_validation_epoch_end(self, trainer, module):
        self.validated.append(flat(module))

    def on_train_epoch_start(self, trainer, module):
        self.after_validation.append(flat(module))


def flat(module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


def recursion(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = weights[0]
    for current in weights[1:]:
        average = decay * average + (1 - decay) * current
    return average


def run(tmp_path, ema: EMA, *others: Callback, **options) -> tuple[Tiny, Trainer]:
    module = Tiny(MLP(5)).double()
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "precision": "64-true"}
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=[ema, *others],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{**defaults, **options},
    )
    trainer.fit(module, TinyData())
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recursion_over_applied_steps(tmp_path, accumulate):
    record = Record()
    module, _ = run(tmp_path, EMA(0.9), record, accumulate_grad_batches=accumulate)
    assert len(record.steps) == 1 + 16 // accumulate
    assert torch.allclose(flat(module), recursion(record.steps, 0.9), atol=1e-14)


def test_warm_up_forgets_the_initial_weights_sooner(tmp_path):
    record = Record()
    module, _ = run(tmp_path, EMA(0.999, warmup=True), record)
    average = record.steps[0]
    for step, current in enumerate(record.steps[1:]):
        decay = min(0.999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * current
    assert torch.allclose(flat(module), average, atol=1e-14)


def test_validation_sees_the_average_and_training_goes_on_with_the_weights(tmp_path):
    record = Record()
    run(tmp_path, EMA(0.9), record)
    assert torch.allclose(record.validated[0], recursion(record.steps[:9], 0.9), atol=1e-14)
    assert torch.equal(record.after_validation[1], record.steps[8])


def test_a_step_that_the_scaler_skips_does_not_count(tmp_path):
    class SkipOdd(Callback):
        """Does what a gradient scaler does on overflow: the optimizer's step does not happen."""

        def on_train_start(self, trainer, module):
            optimizer = trainer.optimizers[0]
            step, calls = optimizer.step, iter(range(1000))
            optimizer.step = lambda closure=None: step(closure) if next(calls) % 2 == 0 else closure()

    counted = EMA(0.5)
    run(tmp_path, counted, SkipOdd(), max_epochs=1)
    assert counted.state_dict()["applied"] == 4


def test_checkpoints_hold_the_average_and_the_weights(tmp_path):
    record = Record()

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    run(tmp_path, EMA(0.9), record, Save())
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    stored = {key: torch.cat([t.flatten() for t in checkpoint[key].values()]) for key in ("state_dict", "current_model_state")}
    assert torch.allclose(stored["state_dict"], recursion(record.steps[:6], 0.9), atol=1e-14)
    assert torch.equal(stored["current_model_state"], record.steps[5])


def test_an_exception_in_validation_leaves_the_weights(tmp_path):
    class Fail(Callback):
        def on_validation_batch_end(self, trainer, module, *args):
            raise RuntimeError("stop")

    record, ema = Record(), EMA(0.9)
    module = Tiny(MLP(5)).double()
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
                      enable_progress_bar=False, precision="64-true", callbacks=[ema, record, Fail()])  # fmt: skip
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, TinyData())
    assert torch.equal(flat(module), record.steps[-1])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="must lie in"):
        EMA(decay)


def test_sharding_strategies_are_refused_by_name():
    trainer = Trainer(max_steps=1, logger=False, accelerator="cpu")
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match="FSDPStrategy shards the weights"):
        EMA(0.9).setup(trainer, Tiny(MLP()), "fit")
