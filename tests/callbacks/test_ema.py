"""The average is the published recursion over applied steps, and validation, checkpoints and resuming see the right weights."""

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from tiny import MLP, Tiny, TinyData

from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA, RunCheckpoint


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
    assert counted.state_dict()["applied"] == [4]


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


def sgd(parameters):
    """An optimizer whose numbers fit into float16."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


FORMATS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "32-true": torch.float32}


@pytest.mark.parametrize("precision", FORMATS)
def test_average_is_in_float32_or_wider_and_a_run_continues_exactly(tmp_path, precision):
    """A module built in float32, as the command line builds it."""

    def fit(steps: int, ckpt_path=None) -> tuple[Record, dict]:
        torch.manual_seed(0)
        record = Record()
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, precision=precision,
            enable_model_summary=False, callbacks=[EMA(0.9), record, RunCheckpoint(folder=tmp_path / str(steps))],
            num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(Tiny(MLP(5), optimizer=sgd), TinyData(), ckpt_path=ckpt_path, weights_only=True)
        return record, read_checkpoint(tmp_path / str(steps) / "last.ckpt")

    record, whole = fit(13)
    _, half = fit(11)
    (tmp_path / "13" / "last.ckpt").unlink()
    _, continued = fit(13, tmp_path / "11" / "last.ckpt")
    wide = torch.float64 if precision == "64-true" else torch.float32
    average = recursion([weights.to(wide) for weights in record.steps], 0.9)
    assert torch.allclose(torch.cat([t.flatten() for t in whole["state_dict"].values()]), average, rtol=1e-6, atol=1e-6)
    for key, dtype in (("state_dict", wide), ("current_model_state", FORMATS[precision])):
        for name, tensor in whole[key].items():
            assert tensor.dtype == dtype and torch.equal(tensor, continued[key][name]), (key, name)
        assert any(not torch.equal(tensor, half[key][name]) for name, tensor in whole[key].items())
    # Validation at the end of the first epoch gives the weights back bit for bit.
    assert torch.equal(record.after_validation[1], record.steps[8])
    assert torch.allclose(record.validated[0].to(wide), recursion([w.to(wide) for w in record.steps[:9]], 0.9), atol=4e-3)


def test_part_of_a_module_is_averaged(tmp_path):
    record = Record()
    ema = EMA(0.9, modules=["net.layers.3"])
    module, _ = run(tmp_path, ema, record)
    first = 4 * 5 + 5
    assert torch.equal(flat(module)[:first], record.steps[-1][:first])
    assert torch.allclose(flat(module)[first:], recursion(record.steps, 0.9)[first:], atol=1e-14)
    assert torch.equal(record.validated[0][:first], record.steps[8][:first])
    assert not torch.equal(record.validated[0][first:], record.steps[8][first:])


def test_part_that_is_not_there_is_refused_before_training(tmp_path):
    record = Record()
    with pytest.raises(ValueError, match="modules='generator' names no parameter of Tiny: give names of its parts, such as net"):
        run(tmp_path, EMA(0.9, modules=["net", "generator"]), record)
    assert not record.steps


def test_state_of_earlier_versions_is_read():
    ema = EMA()
    ema.load_state_dict({"latest_update_step": 7, "applied": 5})
    assert ema.state_dict() == {"applied": [5]}
