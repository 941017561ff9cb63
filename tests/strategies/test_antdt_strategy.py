"""AntDT on real processes: what it computes, in which steps, from which samples, and that it goes on where it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from antdt_job import Noisy, Plans, Rows, RowsData, Run, fit, samples, trainer_of, weights_of
from distributed import RankPool
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from strategies import AntDTStrategy


def assert_same(runs: list[Run], one: Run, tolerance: float = 1e-10) -> None:
    for run in runs:
        assert run.metrics == pytest.approx(one.metrics, rel=tolerance)
        for name, value in run.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=tolerance, atol=tolerance)


UNEVEN = [[6, 2], [1, 7], [3, 5], [7, 1]]
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # of AntDT, of the data, of the trainer
    "equal": ({}, {}, {}),
    "uneven": ({"solution": Plans(UNEVEN)}, {}, {}),
    "hook": ({"solution": Plans(UNEVEN), "weighting": "hook"}, {}, {}),
    "micro-batches": ({"solution": Plans(UNEVEN), "max_micro_batch": 2}, {}, {}),
    "micro-batches by hook": ({"solution": Plans(UNEVEN), "max_micro_batch": [1, 3], "weighting": "hook"}, {}, {}),
    "clipped": ({"solution": Plans(UNEVEN), "max_micro_batch": 3}, {}, {"gradient_clip_val": 0.05}),
}


@pytest.mark.parametrize("name", SETTINGS)
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


@pytest.mark.parametrize(("rows", "world"), [(45, 2), (50, 3), (3, 3)])
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


@pytest.mark.parametrize("limit", [3, 1.0])
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

    def antdt_weight(self, batch: Any) -> int:
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
