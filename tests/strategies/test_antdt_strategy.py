"""AntDT on real processes: what it computes, in which steps, from which samples, and that it goes on where it was."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from antdt_job import Noisy, Reports, Rows, RowsData, Run, fit, samples, trainer_of, weights_of
from antdt_plans import Plans
from distributed import RankPool
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from sweep import sweep_tuples
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from strategies import AntDTStrategy
from strategies.antdt.control.solutions import BackupWorkersSolution, StaticBSP
from strategies.antdt.simulation.inject import SleepInjector, Slowdown
from zoo.callbacks import EMA, AntDTMonitor


def assert_same(runs: list[Run], one: Run, tolerance: float = 1e-10) -> None:
    for run in runs:
        assert run.metrics == pytest.approx(one.metrics, rel=tolerance)
        for name, value in run.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=tolerance, atol=tolerance)


UNEVEN = [[6, 2], [1, 7], [3, 5], [7, 1]]
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # of AntDT, of the data, of the trainer
    "equal": ({}, {}, {}),
    "uneven": ({"solution": Plans(UNEVEN)}, {}, {"max_epochs": 4}),
    "hook": ({"solution": Plans(UNEVEN), "weighting": "hook"}, {}, {}),
    "micro-batches": ({"solution": Plans(UNEVEN), "max_micro_batch": 2}, {}, {}),
    "micro-batches by hook": ({"solution": Plans(UNEVEN), "max_micro_batch": [1, 3], "weighting": "hook"}, {}, {}),
    "clipped": ({"solution": Plans(UNEVEN), "max_micro_batch": 3}, {}, {"gradient_clip_val": 0.05}),
}


QUICK = ("uneven", "micro-batches by hook", "clipped")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS])
def test_equal_to_one_process(pool: RankPool, tmp_path: Path, name: str) -> None:
    """Losses and weights of the DataLoader's own epochs in one process, whatever the batches, in float64."""
    antdt, data, options = SETTINGS[name]
    (one,) = pool.run(fit, tmp_path / "one", None, {"batch_size": 8}, world_size=1, **options)
    fast = {"report_every": 1, "decide_every": 1.0, "shard_steps": 1}
    two = pool.run(fit, tmp_path / "two", {**fast, **antdt}, {"batch_size": 4, **data}, world_size=2, **options)
    assert_same(two, one)
    sizes = {len(indices) for _, _, indices in two[0].seen}
    if "uneven" in name:
        assert len(sizes) > 2, "no decision came into force"


def test_what_is_compared_makes_a_difference(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(fit, tmp_path, None, {"batch_size": 8}, world_size=1)
    (clipped,) = pool.run(fit, tmp_path, None, {"batch_size": 8}, world_size=1, gradient_clip_val=0.05)
    (other,) = pool.run(fit, tmp_path, None, {"batch_size": 6}, world_size=1)
    assert one.metrics != pytest.approx(clipped.metrics, rel=1e-4)
    assert one.metrics != pytest.approx(other.metrics, rel=1e-4)


@pytest.mark.parametrize(("rows", "world"), sweep_tuples([(45, 2), (50, 3), (3, 3)], quick=(1, 2)))
def test_every_sample_once_an_epoch(pool: RankPool, tmp_path: Path, rows: int, world: int) -> None:
    """A last step that is not full, ranks that have nothing in it, and hardly a sample for each rank."""
    antdt = {"solution": Plans([[6, 1, 1][:world], [1, 6, 1][:world]] if world == 3 else UNEVEN), "shuffle": "global"}
    fast = {"report_every": 1, "decide_every": 1.0, "shard_steps": 3, "global_batch_size": 8}
    runs = pool.run(fit, tmp_path, {**fast, **antdt}, {"rows": rows, "batch_size": 1 if rows == 3 else 4}, world_size=world)
    for epoch in (0, 1):
        assert samples(runs, epoch) == list(range(rows))
    steps = {(epoch, step) for epoch, step, _ in runs[0].seen}
    assert len(steps) == 2 * -(-rows // 8)
    assert runs[0].metrics == runs[1].metrics


def test_evaluation_is_that_of_ddp(pool: RankPool, tmp_path: Path) -> None:
    ddp = pool.run(evaluate, tmp_path, None)
    assert pool.run(evaluate, tmp_path, {}) == ddp


def evaluate(folder: Path, antdt: dict[str, Any] | None) -> tuple[Any, ...]:
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module, data = Noisy(), RowsData()
    trainer = trainer_of("ddp" if antdt is None else AntDTStrategy(**antdt), folder, limit_val_batches=1.0)
    (validation,) = trainer.validate(module, data, verbose=False)
    (test,) = trainer.test(module, data, verbose=False)
    return validation, test, [batch.tolist() for batch in trainer.predict(module, data) or []]


@pytest.mark.parametrize("limit", [3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_epochs_cut_short_and_validation_between(pool: RankPool, tmp_path: Path, limit: Any) -> None:
    """What is left of an epoch that ends early is not used in the next; validation leaves training alone."""
    options = {"limit_train_batches": limit, "limit_val_batches": 2, "val_check_interval": 2, "max_epochs": 3}
    (one,) = pool.run(fit, tmp_path, None, {"batch_size": 8}, world_size=1, **options)
    assert_same(pool.run(fit, tmp_path, {"shard_steps": 1}, {"batch_size": 4}, **options), one)


class Schedule(Noisy):
    """Asks Lightning for the number of steps; that of the weights of tokens instead of samples."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loss_denominator(self, batch: Any) -> int:
        return int(_tokens(batch).sum())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens = _tokens(batch)
        self.log("loss", torch.zeros(()), on_step=False, on_epoch=True)
        self.seen.append((self.trainer.current_epoch, self.trainer.global_step, batch["index"].tolist()))
        return ((self(batch["x"]) - batch["y"]).square().squeeze(1) * tokens).sum() / tokens.sum()


def _tokens(batch: Any) -> Tensor:
    return batch["index"] % 5 + 1


def fit_plain(folder: Path, antdt: dict[str, Any], **loading: Any) -> Run:
    """A plain DataLoader, a schedule that needs the number of steps, losses that are means over tokens."""
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module = Schedule()
    trainer = trainer_of(AntDTStrategy(server="inprocess", shard_steps=1, **antdt), folder)
    trainer.fit(module, DataLoader(Rows(48), batch_size=8 // dist.get_world_size(), shuffle=True, **loading))
    return Run(module.seen, weights_of(module))


def test_plain_loaders_schedules_token_means_and_workers(pool: RankPool, tmp_path: Path) -> None:
    uneven = {"solution": Plans(UNEVEN), "report_every": 1, "decide_every": 1.0, "max_micro_batch": 3}
    (one,) = pool.run(fit_plain, tmp_path, {}, world_size=1)
    for loading in ({}, {"num_workers": 2, "multiprocessing_context": "fork"}):
        two = pool.run(fit_plain, tmp_path, uneven, **loading)
        assert_same(two, one)
        assert samples(two, 0) == samples([one], 0) == list(range(48))
    assert one.seen[0][2] != list(range(8))


class Overflowing(Noisy):
    """Its loss is infinite in one step and NaN in another; the gradients are those of a finite loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + {1: torch.inf, 3: torch.nan}.get(self.trainer.global_step, 0.0)


def fit_overflowing(folder: Path, antdt: dict[str, Any] | None) -> Run:
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module, world = Overflowing(), dist.get_world_size()
    strategy: Any = "ddp" if antdt is None else AntDTStrategy(server="inprocess", shard_steps=1, **antdt)
    trainer = trainer_of(strategy, folder, callbacks=[] if antdt is None else [Reports()])
    trainer.fit(module, RowsData(batch_size=8 // world))
    return Run(module.seen, weights_of(module))


def test_losses_that_are_not_finite_end_nothing(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(fit_overflowing, tmp_path, None, world_size=1)
    assert_same(pool.run(fit_overflowing, tmp_path, {"report_every": 1}, world_size=2), one)


def measure(folder: Path) -> list[dict[str, Any]]:
    """Rank 0 sleeps 30 ms a step more than rank 1; the lines of all steps."""
    torch.set_default_dtype(torch.float64)
    injector = SleepInjector(0.0, [Slowdown(0, 6.0)], cost_per_batch=0.006)
    monitor = AntDTMonitor(every_n_steps=1)
    strategy = AntDTStrategy(solution=StaticBSP(), server="inprocess", injector=injector)
    trainer = trainer_of(strategy, folder, max_epochs=3, callbacks=[monitor])
    trainer.fit(Noisy(), RowsData(rows=64))
    if dist.get_rank():
        return []
    times = [monitor.latest[f"antdt/bpt_rank_{rank}"] for rank in (0, 1)]  # of one step: nobody knows which was slow in it
    assert monitor.latest["antdt/imbalance"] == pytest.approx(2 * max(times) / sum(times))
    assert monitor.latest["antdt/overhead"] > 0
    return [json.loads(line) for line in (folder / "antdt" / "events.jsonl").read_text().splitlines()]


def test_times_of_ranks_leave_out_the_waiting(pool: RankPool, tmp_path: Path) -> None:
    rows = [row for row in pool.run(measure, tmp_path)[0] if row["kind"] == "step"]
    assert len(rows) > 15
    slow, fast, wall = (statistics.median(row[key] for row in each) for each, key in (
        ([{"t": row["bpt"][0]} for row in rows], "t"), ([{"t": row["bpt"][1]} for row in rows], "t"), (rows, "wall")
    ))  # fmt: skip
    assert slow > 0.036
    assert fast < slow - 0.02
    assert wall > slow
    assert all(sum(row["n"]) == 8 and row["batch"] == [4, 4] and row["bubble"] >= 0 for row in rows)


class Ranges(IterableDataset):
    """Has no samples by number."""

    def __iter__(self) -> Any:
        return iter(())


REFUSED: dict[str, tuple[str, Any]] = {
    "accumulation": ("accumulate_grad_batches=2 must be 1", lambda folder: refuse(folder, accumulate_grad_batches=2)),
    "an iterable": ("__getrange__", lambda folder: refuse(folder, DataLoader(Ranges()))),
    "a sampler": (
        "chooses samples in its own way",
        lambda folder: refuse(folder, DataLoader(Rows(8), sampler=WeightedRandomSampler([1.0] * 8, 8))),
    ),
    "several loaders": ("one DataLoader", lambda folder: refuse(folder, [DataLoader(Rows(8)), DataLoader(Rows(8))])),
    "no torch loader": ("needs a torch DataLoader", lambda folder: refuse(folder, [Rows(8)[0]])),
    "caps of others": ("names 3 ranks, there are 1", lambda folder: refuse(folder, antdt={"max_micro_batch": [1, 2, 3]})),
    "an empty set": ("is empty", lambda folder: refuse(folder, DataLoader(Rows(0), sampler=SequentialSampler(Rows(0))))),
    "a callback that accumulates": (
        "a callback accumulates",
        lambda folder: refuse(folder, callbacks=[GradientAccumulationScheduler({1: 2})], max_epochs=2),
    ),
    "a server that is none": ("must be host:port", lambda folder: refuse(folder, antdt={"server": "somewhere"})),
    "drop_last": ("fill no global batch", lambda folder: refuse(folder, antdt={"drop_last": True, "global_batch_size": 90})),
}


def refuse(folder: Path, data: Any = None, antdt: dict[str, Any] | None = None, **options: Any) -> None:
    strategy = AntDTStrategy(**{"server": "inprocess", **(antdt or {})})
    data = RowsData(rows=16) if data is None else data
    trainer = trainer_of(strategy, folder, **options)
    if isinstance(data, RowsData):
        trainer.fit(Noisy(), data)
    else:
        trainer.fit(Noisy(), train_dataloaders=data)


def refused(folder: Path) -> dict[str, str]:
    torch.set_default_dtype(torch.float64)
    messages = {}
    for name, (_, attempt) in REFUSED.items():
        try:
            attempt(folder)
        except (ValueError, TypeError) as refusal:
            messages[name] = str(refusal)
    return messages


def test_what_cannot_be_is_refused_before_it_does_harm(pool: RankPool, tmp_path: Path) -> None:
    messages = pool.run(refused, tmp_path, world_size=1)[0]
    for name, (message, _) in REFUSED.items():
        assert message in messages[name], name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefetch": 0}, "prefetch=0 must be at least 1"),
        ({"max_micro_batch": [4, 0]}, "at least 1"),
        ({"shuffle": "yes"}, "shuffle='yes'"),
        ({"weighting": "hook", "ddp_comm_hook": print}, "weighting=hook"),
        ({"solution": BackupWorkersSolution(1)}, "ParameterServerStrategy"),
        ({"model_averaging_period": 4}, "model_averaging_period"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AntDTStrategy(**arguments)


def fit_averaged(folder: Path, antdt: dict[str, Any] | None) -> Run:
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module, world = Noisy(), dist.get_world_size()
    trainer = trainer_of("ddp" if antdt is None else AntDTStrategy(**antdt), folder, callbacks=[EMA(decay=0.9)])
    trainer.fit(module, RowsData(batch_size=8 // world))
    return Run(module.seen, weights_of(module))


def test_averages_of_weights(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(fit_averaged, tmp_path / "one", None, world_size=1)
    quick = {"server": "inprocess", "shard_steps": 1, "solution": Plans(UNEVEN), "report_every": 1, "decide_every": 1.0}
    assert_same(pool.run(fit_averaged, tmp_path / "two", quick), one)


def fit_scaled(folder: Path, antdt: dict[str, Any] | None) -> Run:
    """float16 with scaled losses, from a scale that overflows in the first steps."""
    seed_everything(3, verbose=False)
    module, world = Noisy(lr=0.01), dist.get_world_size()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    strategy: Any = "ddp" if antdt is None else AntDTStrategy(server="inprocess", shard_steps=1, **antdt)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = trainer_of(strategy, folder, plugins=[plugin], precision=None, gradient_clip_val=1.0)
    trainer.fit(module, RowsData(batch_size=8 // world))
    return Run(module.seen, weights_of(module), {"scale": scaler.get_scale(), "applied": float(module.applied_steps)})


def test_scaled_losses(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(fit_scaled, tmp_path, None, world_size=1)
    uneven = {"solution": Plans(UNEVEN), "report_every": 1, "decide_every": 1.0, "max_micro_batch": 3}
    two = pool.run(fit_scaled, tmp_path, uneven)
    assert 0 < one.metrics["applied"] < 12, "no step was skipped"
    assert_same(two, one, tolerance=2e-2)
