"""Tokens, times and utilisation follow from a clock that the test turns itself."""

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from zoo.callbacks import SpeedMonitor, speed_monitor
from zoo.callbacks.speed_monitor import peak_flops_of


class Clock:
    """A clock that stands still until it is turned."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed_monitor, "time", made)
    return made


class Slow(LightningModule):
    """Each batch takes the time that is given."""

    def __init__(self, clock: Clock, seconds) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.clock, self.seconds = clock, seconds

    def training_step(self, batch, batch_idx):
        self.clock.now += self.seconds[batch_idx]
        return self.weight * 2.0

    def validation_step(self, batch, batch_idx):
        self.clock.now += 1000.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counting(Slow):
    """And knows its arithmetic."""

    def flops_per_token(self, seq_len: int) -> float:
        return 10.0 * seq_len


class SlowSave(Callback):
    """Saves a checkpoint in the middle of training, which takes long."""

    def __init__(self, clock: Clock, folder) -> None:
        self.clock, self.folder = clock, folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx % 2 == 1:
            trainer.save_checkpoint(self.folder / "a.ckpt")
            self.clock.now += 500.0


def run(module, monitor, *callbacks, batch=None, batches=9, **options) -> Trainer:
    batch = {"input_ids": torch.zeros(4, 5, dtype=torch.long)} if batch is None else batch
    loader = torch.utils.data.DataLoader([batch] * batches, batch_size=None)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, max_epochs=1, log_every_n_steps=4, callbacks=[monitor, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader if options.get("val_check_interval") else None)
    return trainer


def test_speed_is_tokens_over_time_without_the_first_step(clock):
    monitor = SpeedMonitor()
    trainer = run(Slow(clock, [50.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 1.0, 4.0]), monitor)
    assert monitor.latest["throughput/tokens_per_second"] == pytest.approx(4 * 20 / (4 + 1 + 2 + 1))
    assert monitor.latest["throughput/step_seconds"] == pytest.approx(1.5)
    assert 3.0 < monitor.latest["throughput/step_seconds_p95"] <= 8.0
    assert trainer.callback_metrics["throughput/tokens_per_second"] == pytest.approx(10.0)
    assert "throughput/mfu" not in monitor.latest


def test_accumulated_steps_count_all_their_micro_batches(clock):
    monitor = SpeedMonitor(every_n_steps=2)
    run(Slow(clock, [9.0, 9.0, 9.0, 1.0, 2.0, 3.0]), monitor, batches=6, accumulate_grad_batches=3)
    assert monitor.latest["throughput/tokens_per_second"] == pytest.approx(60 / 6)
    assert monitor.latest["throughput/step_seconds"] == pytest.approx(6.0)


class Several(Slow):
    """Takes three steps a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for _ in range(3):
            self.optimizers().step()


def test_a_batch_of_several_steps_counts_each(clock):
    monitor = SpeedMonitor(every_n_steps=10)
    trainer = run(Several(clock, [9.0, 3.0, 6.0, 12.0, 1.0]), monitor, batches=5)
    assert trainer.global_step == 15  # logged after the fourth batch, at step 12
    assert monitor.latest["throughput/tokens_per_second"] == pytest.approx(60 / 21)
    assert monitor.latest["throughput/step_seconds"] == pytest.approx(2.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_and_saving_do_not_count(clock, tmp_path, accumulate):
    monitor = SpeedMonitor(every_n_steps=4)
    module = Slow(clock, [1.0] * 8)
    trainer = run(module, monitor, SlowSave(clock, tmp_path), batches=8, val_check_interval=1 + 2 * (accumulate == 1),
                  accumulate_grad_batches=accumulate)  # fmt: skip
    assert clock.now > 3000 and trainer.global_step == 8 // accumulate
    assert monitor.latest["throughput/step_seconds"] == pytest.approx(accumulate)
    assert monitor.latest["throughput/step_seconds_p95"] == pytest.approx(accumulate)


def test_utilisation_is_counted_arithmetic_over_the_peak(clock):
    monitor = SpeedMonitor(peak_flops=1000.0)
    run(Counting(clock, [2.0] * 9), monitor)
    assert monitor.latest["throughput/mfu"] == pytest.approx(10 * 5 * (20 / 2) / 1000)


def test_batches_without_tokens_are_counted_in_samples(clock):
    monitor = SpeedMonitor(peak_flops=1000.0)
    run(Counting(clock, [2.0] * 9), monitor, batch=(torch.zeros(6, 1, 2, 2), torch.zeros(6)))
    assert monitor.latest["throughput/samples_per_second"] == pytest.approx(3.0)
    assert "throughput/mfu" not in monitor.latest


def test_a_step_far_slower_than_usual_is_named(clock):
    seconds = [1.0 + 0.01 * (step % 3) for step in range(30)]
    seconds[17], seconds[25] = 1.5, 9.0  # the first is an outlier, but not twice as slow
    monitor = SpeedMonitor(slow_warmup=10)
    with pytest.warns(UserWarning, match=r"step 25 took 9 s; usual are 1\.0\d s"):
        run(Slow(clock, seconds), monitor, batches=30)
    assert monitor.slow_steps == 1


def test_a_device_that_is_not_in_the_table_is_named(clock, capsys, caplog):
    with caplog.at_level("INFO"):
        run(Counting(clock, [1.0] * 9), SpeedMonitor(), batches=2)
        run(Slow(clock, [1.0] * 9), SpeedMonitor(), batches=2)
    assert "peak FLOP/s of this cpu not known, so MFU is not logged: give peak_flops" in caplog.text
    assert "Slow has no flops_per_token()" in caplog.text


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA GeForce GTX 1080", None), ("AMD A1000", None)],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_flops_of(name) == peak


@pytest.mark.parametrize("options", [{"peak_flops": 0.0}, {"every_n_steps": 0}, {"slow_factor": 0.5}, {"slow_warmup": 0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)).removeprefix("slow_")):
        SpeedMonitor(**options)
