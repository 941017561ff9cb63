"""Parameter servers under Lightning: the training of one process, or one that loses no sample, whoever is slow or killed."""

import faulthandler
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import RankPool
from fork_server import start_fork_server
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from sweep import sweep, sweep_tuples
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric
from warm_python import Popen

from strategies import ParameterServerStrategy
from strategies.antdt.ps import launch
from strategies.antdt.ps.server import ServerThread
from strategies.antdt.service.server import ServerThread as DataServer
from strategies.antdt.simulation.inject import Slowdown
from zoo.callbacks import RunCheckpoint, SpikeGuard

ROWS = 70


class Clicks(Dataset[dict[str, Tensor]]):
    """Rows with an id, numbers and a target."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 13, (rows, 2), generator=generator)
        self.x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randn(rows, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "ids": self.ids[index], "x": self.x[index], "y": self.y[index]}


class Regression(LightningModule):
    """An embedding, a layer and a schedule."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(13, 4).double()
        self.layer = nn.Linear(7, 1).double()
        self.norm = nn.BatchNorm1d(7, affine=False).double().eval()
        self.kind = optimizer
        self.metric = MeanMetric()
        self.seen: list[Tensor] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        features = torch.cat([self.table(batch["ids"]).sum(1), batch["x"]], 1)
        return self.layer(features).squeeze(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = (self(batch) - batch["y"]).square().mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["y"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        error = (self(batch) - batch["y"]).square()
        self.metric.update(error.float())
        self.log("metric", self.metric, on_epoch=True)
        self.log("val_loss", error.mean(), sync_dist=True, batch_size=len(error))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return torch.stack([batch["index"].double(), self(batch)], 1)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.table.parameters(), "weight_decay": 0.0}, {"params": self.layer.parameters(), "lr": 0.02}]
        make = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=0.05),
            "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
            "lbfgs": lambda: torch.optim.LBFGS(self.layer.parameters()),
        }
        optimizer = make[self.kind]()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loader(batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(Clicks(), batch_size=batch_size, shuffle=shuffle)


@contextmanager
def services(count: int = 1, **options: Any) -> Iterator[dict[str, Any]]:
    """A data-sharding server and parameter servers in this process; arguments of the strategy that name them."""
    with DataServer() as data:
        token = data.address.token
        servers = [ServerThread(index, token, **options) for index in range(count)]
        former = os.environ.get("ANTDT_TOKEN")
        os.environ["ANTDT_TOKEN"] = token
        try:
            yield {
                "server": f"127.0.0.1:{data.address.port}",
                "servers": [f"127.0.0.1:{server.address.port}" for server in servers],
            }
        finally:
            if former is None:
                del os.environ["ANTDT_TOKEN"]
            for server in servers:
                server.stop()


def trainer(folder: Path, ranks: int, strategy: Any, **options: Any) -> Trainer:
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()  # workers share none
    return Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"enable_checkpointing": False, "max_epochs": 2, **options},
    )  # fmt: skip


def fit(folder: Path, ranks: int, options: dict[str, Any], kind: str = "adamw", ckpt: str | None = None, save: str = "",
        **trainer_options: Any) -> dict[str, Any]:  # fmt: skip
    """Train on a rank, and tell what came out."""
    module = Regression(kind)
    strategy = ParameterServerStrategy(**{"shard_steps": 1, "heartbeat_timeout": 30.0, **options})
    strategy.positions_log = []
    of = trainer(folder, ranks, strategy, **trainer_options)
    of.fit(module, loader(), loader(shuffle=False), ckpt_path=ckpt)
    if save:
        of.save_checkpoint(save)
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "steps": [(epoch, version, positions.tolist()) for epoch, version, positions in strategy.positions_log],
        "metrics": {name: float(value) for name, value in of.callback_metrics.items()},
        "global_step": of.global_step,
        "lr": of.optimizers[0].param_groups[0]["lr"],
    }


def one_process(steps: list[list[int]], kind: str, clip: float = 0.0, order_seed: int = 0) -> Regression:
    """What one process makes of these samples, step by step."""
    module = Regression(kind)
    (optimizer,), (schedule,) = module.configure_optimizers()
    data = Clicks()
    for indices in steps:
        optimizer.zero_grad()
        batch = torch.utils.data.default_collate([data[index] for index in indices])
        (module(batch) - batch["y"]).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        schedule["scheduler"].step()
    return module


def union(results: list[dict[str, Any]], seed: int = 0) -> list[list[int]]:
    """Sample indices of each step, of all workers together."""
    found: dict[tuple[int, int], list[int]] = {}
    for result in results:
        for epoch, version, positions in result["steps"]:
            found.setdefault((epoch, version), []).extend(positions)
    orders = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed + epoch)).tolist() for epoch in range(9)]
    return [[orders[epoch][position] for position in positions] for (epoch, _), positions in sorted(found.items())]


def trained(results: list[dict[str, Any]]) -> Counter[tuple[int, int]]:
    return Counter((epoch, position) for result in results for epoch, _, positions in result["steps"] for position in positions)


EVERYTHING = Counter({(epoch, position): 1 for epoch in range(2) for position in range(ROWS)})


@pytest.mark.parametrize(("count", "kind", "clip", "tables"), sweep_tuples([
    (1, "adamw", 0.0, None), (2, "sgd", 0.5, ["table"]), (3, "adamw", 0.0, ["ta*"])], quick=(1, 2)))  # fmt: skip
def test_synchronous_training_is_that_of_one_process_with_the_union_batch(
    pool: RankPool, tmp_path: Path, count: int, kind: str, clip: float, tables: list[str] | None
) -> None:
    with services(count) as where:
        options = {**where, "mode": "bsp", "tables": tables}
        results = pool.run(fit, tmp_path, 2, options, kind, gradient_clip_val=clip or None, world_size=2)
    assert trained(results) == EVERYTHING
    steps = union(results)
    assert len(steps) == 2 * 7
    expected = one_process(steps, kind, clip).state_dict()
    for result in results:
        assert result["lr"] == pytest.approx(0.05 * 0.95**14, rel=1e-12)
        for name, value in expected.items():
            assert (value - result["weights"][name]).abs().max() < 1e-10, name
    module = Regression(kind)
    module.load_state_dict(results[0]["weights"])
    whole = torch.utils.data.default_collate([Clicks()[index] for index in range(ROWS)])
    loss = float((module(whole) - whole["y"]).square().mean().detach())
    for result in results:
        assert result["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-6)
        assert result["metrics"]["metric"] == pytest.approx(loss, rel=1e-6)
    assert results[0]["metrics"]["loss_epoch"] == results[1]["metrics"]["loss_epoch"]


# ---- asynchronous -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    sweep([{"mode": "asp"}, {"mode": "ssp", "staleness": 2}, {"mode": "bsp", "backup": 1, "on_drop": "requeue"}], quick=(1,)),
)
def test_asynchronous_training_uses_each_sample_once_and_learns(pool: RankPool, tmp_path: Path, options: dict[str, Any]) -> None:
    with services(2) as where:
        results = pool.run(fit, tmp_path, 3, {**where, "tables": ["table"], **options}, "adamw", max_epochs=2, world_size=3)
    assert trained(results) == EVERYTHING
    for result in results[1:]:
        assert all(torch.equal(value, results[0]["weights"][name]) for name, value in result["weights"].items())
        assert result["metrics"] == {
            **results[0]["metrics"],
            **{k: v for k, v in result["metrics"].items() if "step" in k or k == "loss"},
        }
    before = one_process([], "adamw")
    whole = torch.utils.data.default_collate([Clicks()[index] for index in range(ROWS)])
    start = float((before(whole) - whole["y"]).square().mean().detach())
    assert results[0]["metrics"]["val_loss"] < 0.95 * start


def test_budget_of_steps_counts_those_of_all_workers(pool: RankPool, tmp_path: Path) -> None:
    with services() as where:
        results = pool.run(fit, tmp_path, 2, {**where, "mode": "asp"}, max_epochs=-1, max_steps=9, world_size=2)
    pushed = sum(len(result["steps"]) for result in results)
    assert 18 <= pushed <= 19  # a gradient may be on its way when the last one comes
    versions = sorted(version for result in results for _, version, _ in result["steps"])
    assert versions[0] == 0
    for result in results:
        assert result["lr"] == pytest.approx(0.05 * 0.95**9, rel=1e-12), "the schedule follows the servers' clock"


def evaluate(folder: Path, options: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    module = Regression()
    if int(os.environ["RANK"]) == 0:  # others get them
        module.load_state_dict(weights)
    strategy = ParameterServerStrategy(**options)
    of = trainer(folder, 2, strategy)
    (validated,) = of.validate(module, loader(shuffle=False), verbose=False)
    (tested,) = of.test(module, loader(shuffle=False), verbose=False)
    predicted = of.predict(module, loader(shuffle=False))
    return {"validated": validated, "tested": tested, "predicted": torch.cat(predicted)}


def test_evaluation_is_divided_and_exact(pool: RankPool, tmp_path: Path) -> None:
    module = Regression()
    nn.init.normal_(module.layer.weight, generator=torch.Generator().manual_seed(5))
    whole = torch.utils.data.default_collate([Clicks()[index] for index in range(ROWS)])
    with torch.no_grad():
        expected = module(whole)
    loss = float((expected - whole["y"]).square().mean())
    with services() as where:
        results = pool.run(evaluate, tmp_path, where, module.state_dict(), world_size=2)
    for result in results:
        for found in (result["validated"], result["tested"]):
            assert found["val_loss"] == pytest.approx(loss, rel=1e-6) and found["metric"] == pytest.approx(loss, rel=1e-6)
    predicted = torch.cat([result["predicted"] for result in results])
    assert sorted(predicted[:, 0].tolist()) == list(range(ROWS)), "each sample is predicted by one worker"
    assert (predicted[predicted[:, 0].argsort(), 1] - expected).abs().max() < 1e-12


# ---- checkpoints --------------------------------------------------------------------------------------------------------


def go_on_alone(folder: Path, ckpt: str, epochs: int, strategy: str) -> dict[str, Tensor]:
    module = Regression()
    of = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=epochs, logger=False, enable_progress_bar=False,
                 enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
                 use_distributed_sampler=False)  # fmt: skip
    of.fit(module, loader(10, shuffle=False), ckpt_path=ckpt)
    return module.state_dict()


def stay(folder: Path, ranks: int, options: dict[str, Any], ckpt: str | None, epochs: int, save: str) -> Any:
    """Like `fit`, in the order of the data set, so that what comes next is known."""
    module = Regression()
    strategy = ParameterServerStrategy(**{"shard_steps": 1, **options})
    strategy.positions_log = []
    of = trainer(folder, ranks, strategy, max_epochs=epochs, use_distributed_sampler=False)
    of.fit(module, loader(5, shuffle=False), ckpt_path=ckpt)
    if save:
        of.save_checkpoint(save)
    return module.state_dict(), strategy.positions_log


@pytest.mark.parametrize("strategy", sweep(["auto", "ddp"]))
def test_checkpoint_goes_on_in_one_process_and_back(pool: RankPool, tmp_path: Path, strategy: str) -> None:
    first, second = str(tmp_path / "first.ckpt"), str(tmp_path / "second.ckpt")
    with services(2) as where:
        options = {**where, "mode": "bsp", "tables": ["table"]}
        pool.run(stay, tmp_path, 2, options, None, 1, first, world_size=2)
        (through, log), _ = pool.run(stay, tmp_path, 2, options, first, 2, second, world_size=2)
    assert [(epoch, version) for epoch, version, _ in log] == [(1, 7 + step) for step in range(7)]
    alone = go_on_alone(tmp_path, first, 2, strategy)
    steps = [list(range(start, min(start + 10, ROWS))) for start in range(0, ROWS, 10)] * 2
    whole = one_process(steps, "adamw").state_dict()
    for name, value in whole.items():
        assert (value - through[name]).abs().max() < 1e-10, name
        assert (value - alone[name]).abs().max() < 1e-10, name
    content = torch.load(first, weights_only=True)
    assert content["antdt_ps"]["version"] == 7 and content["antdt_ps"]["ledger"]["todo"] == []


class Terminated(Callback):
    """Tells one worker in the middle of the epoch to end, as a scheduler does."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(folder: Path, options: dict[str, Any], stop: bool) -> list[Any]:
    """Train with a checkpoint every other step, until told to stop, or from there on."""
    module = Regression()
    strategy = ParameterServerStrategy(**{"shard_steps": 1, **options})
    strategy.positions_log = []
    checkpoint = RunCheckpoint(every_n_steps=2, minutes=None)
    of = trainer(folder, 3, strategy, enable_checkpointing=True, callbacks=[checkpoint, *([Terminated()] if stop else [])])
    if stop:
        with pytest.raises(SIGTERMException):
            of.fit(module, loader(3), loader(3))
    else:
        of.fit(module, loader(3), loader(3), ckpt_path=str(checkpoint.path(of)))
    return [(epoch, version, positions.tolist()) for epoch, version, positions in strategy.positions_log]


@pytest.mark.parametrize(
    "options", sweep([{"mode": "asp"}, {"mode": "bsp"}, pytest.param({"mode": "ssp", "staleness": 1}, marks=pytest.mark.slow)])
)
def test_run_that_is_told_to_stop_goes_on_with_the_samples_that_are_left(
    pool: RankPool, tmp_path: Path, options: dict[str, Any]
) -> None:
    with services() as where:
        before = pool.run(interrupted, tmp_path, {**where, **options}, True, world_size=3)
        kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["antdt_ps"]
        after = pool.run(interrupted, tmp_path, {**where, **options}, False, world_size=3)
    first, second = (trained([{"steps": log} for log in logs]) for logs in (before, after))
    left = {position for lo, hi in kept["ledger"]["todo"] for position in range(lo, hi)}
    done = Counter({(0, position): 1 for position in range(ROWS) if position not in left})
    assert kept["ledger"]["epoch"] == 0 and 0 < done.total() < ROWS
    # A worker may train a batch after the last save, before it hears that it is to stop: that is undone in weights and ledger.
    assert done <= first and max(first.values()) == 1
    assert done + second == EVERYTHING


class Apart(Callback):
    """One worker stops after a batch, in which the other, that has not heard of it, saves."""

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) != (0, 2):
            return
        if trainer.global_rank == 1:
            raise SIGTERMException
        trainer.save_checkpoint(self.checkpoint.path(trainer).with_name("middle.ckpt"))


def parting(folder: Path, options: dict[str, Any]) -> int:
    checkpoint = RunCheckpoint(every_n_steps=100, minutes=None)
    strategy = ParameterServerStrategy(shard_steps=1, **options)
    of = trainer(folder, 2, strategy, enable_checkpointing=True, callbacks=[checkpoint, Apart(checkpoint)])
    with pytest.raises(SIGTERMException) if of.global_rank == 1 else nullcontext():
        of.fit(Regression(), loader(3))
    return of.global_step


def test_worker_that_stops_meets_one_that_saves(pool: RankPool, tmp_path: Path) -> None:
    with services() as where:
        steps, few = pool.run(parting, tmp_path, {**where, "mode": "asp"}, world_size=2)
    middle, last = (torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("middle", "last"))
    assert few == 3 and steps > 3 and middle["global_step"] == 3 and last["global_step"] == steps
    assert middle["antdt_ps"]["ledger"]["todo"] and not last["antdt_ps"]["ledger"]["todo"]


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "async"}, "asp, ssp or bsp"), ({"backup": 1}, "bsp only"), ({"servers": 0}, "servers=0 must be at least 1"),
    ({"servers": []}, "servers=0"), ({"row_update": "no"}, "exact or lazy"), ({"ddp_comm_hook": print}, "another way"),
    ({"save_every": -1}, "save_every=-1"), ({"frame_limit": 1}, "frame_limit=1"),
])  # fmt: skip
def test_arguments_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterServerStrategy(**options)


class Tied(Regression):
    """Uses its table otherwise than by looking rows up."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.table.weight.square().mean()


class Manual(Regression):
    """Optimizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Stream(torch.utils.data.IterableDataset[Any]):
    """Has no numbers."""

    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(("module", "options", "trainer_options", "message"), [
    (lambda: Regression("lbfgs"), {}, {}, "cannot run torch.optim.lbfgs.LBFGS"),
    (Manual, {}, {}, "optimizes by itself"),
    (Regression, {}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 must be 1"),
    (Regression, {}, {"val_check_interval": 0.5}, "validate after epochs"),
    (Regression, {}, {"limit_train_batches": 3}, "set max_steps"),
    (Regression, {}, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs=1 must be 0"),
    (Regression, {"tables": ["tabel"]}, {}, "tables names 'tabel', but the embeddings of Regression are table"),
    (Tied, {"tables": ["table"]}, {}, "table.weight is used otherwise than by looking rows up"),
])  # fmt: skip
def test_what_does_not_go_is_refused_by_name(
    tmp_path: Path, module: Any, options: Any, trainer_options: Any, message: str
) -> None:
    with services() as where, pytest.raises((ValueError, RuntimeError), match=message):
        trainer(tmp_path, 1, ParameterServerStrategy(**where, **options), **trainer_options).fit(module(), loader(), loader())


def test_stream_is_refused(tmp_path: Path) -> None:
    with services() as where, pytest.raises(TypeError, match=r"Stream.*IterableDataset"):
        trainer(tmp_path, 1, ParameterServerStrategy(**where)).fit(Regression(), DataLoader(Stream(), batch_size=2))


@pytest.mark.parametrize(("callback", "options", "message"), [
    (lambda: SpikeGuard(), {"mode": "bsp"}, "SpikeGuard acts on the optimizer of this process"),
    (lambda: EMAWeightAveraging(), {"mode": "asp"}, "averages weights"),
    (lambda: EMAWeightAveraging(), {"mode": "bsp", "tables": ["table"]}, "of tables only some rows"),
    (lambda: ModelCheckpoint(every_n_train_steps=2), {}, "each rank's own count of steps"),
])  # fmt: skip
def test_callbacks_that_need_what_is_not_here_are_refused(tmp_path: Path, callback: Any, options: Any, message: str) -> None:
    with services() as where, pytest.raises(ValueError, match=message):
        of = trainer(tmp_path, 1, ParameterServerStrategy(**where, **options), callbacks=[callback()], enable_checkpointing=True)
        of.fit(Regression(), loader(), loader())


def averaged(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    module = Regression()
    average = EMAWeightAveraging(decay=0.7)
    of = trainer(folder, 2, ParameterServerStrategy(shard_steps=1, mode="bsp", **options), callbacks=[average],
                 use_distributed_sampler=False)  # fmt: skip
    of.fit(module, loader(5, shuffle=False))
    return module.state_dict()


def test_average_of_weights_is_that_of_one_process(pool: RankPool, tmp_path: Path) -> None:
    with services() as where:
        results = pool.run(averaged, tmp_path, where, world_size=2)
    module = Regression()
    of = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_checkpointing=False,
                 enable_model_summary=False, default_root_dir=tmp_path, callbacks=[EMAWeightAveraging(decay=0.7)])  # fmt: skip
    of.fit(module, loader(10, shuffle=False))
    for result in results:
        assert all((value - result[name]).abs().max() < 1e-10 for name, value in module.state_dict().items())


# ---- deaths -------------------------------------------------------------------------------------------------------------


def _start_warm(words: list[str], **options: Any) -> Popen:
    return Popen([words[0], *(word for word in words[1:] if word != "-P")], **options)


WARM = SimpleNamespace(Popen=_start_warm, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
"""In place of ``subprocess`` where servers are started: they are forked from a process that has imported all."""


class Witness(list[Any]):
    """Writes down what was trained at once, so that it survives the process."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def append(self, entry: Any) -> None:
        epoch, version, positions = entry
        with self.path.open("a") as file:
            file.write(json.dumps([epoch, version, positions.tolist()]) + "\n")


class Mortal(Regression):
    """Rank 1 is killed in the middle of a step; rank 0 waits in its first until another has been let in for it."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        super().__init__()
        self.pipe, self.kill_at = folder / "let-in", kill_at

    def on_train_epoch_start(self) -> None:
        if self.global_rank == 1 and self.kill_at is None and self.pipe.exists():
            self.pipe.write_text("here I am")
            self.kill_at = -1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.kill_at == batch_idx:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.global_rank == 0 and self.current_epoch == 0 and batch_idx == 0 and self.pipe.exists():
            self.pipe.read_text()
        return super().training_step(batch, batch_idx)


class KillServer(Callback):
    """Kills a parameter server, as an operator would who means it: after six steps, or whenever this worker meets others."""

    def __init__(self, folder: Path, server: int = 1, meetings: bool = False) -> None:
        self.file = folder / "antdt" / f"ps{server}" / "server.json"
        self.meetings = meetings
        self.killed: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step >= 6 and not self.killed and not self.meetings:
            self.kill()

    def on_validation_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.meetings and not trainer.sanity_checking:
            self.kill()

    on_train_epoch_end = on_validation_epoch_end

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.killed.append(json.loads(self.file.read_text())["pid"])
            os.kill(self.killed[-1], signal.SIGKILL)


def worker(
    rank: int,
    ranks: int,
    folder: Path,
    environment: dict[str, str],
    options: dict[str, Any],
    kill_at: int | None,
    kill_server: int | None = None,
    meetings: bool = False,
    warm: bool = False,
) -> None:
    """The body of a process that somebody watches over, one by one."""
    if warm:
        launch.subprocess = WARM  # type: ignore[assignment]
    os.environ.update(environment | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"})
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240, exit=True)  # a worker that waits forever says where
    module = Mortal(folder, kill_at)
    strategy = ParameterServerStrategy(**{"shard_steps": 2, **options})
    strategy.positions_log = Witness(folder / f"{rank}-{os.getpid()}.jsonl")
    killers = [] if kill_server is None else [KillServer(folder, kill_server, meetings)]
    of = trainer(folder, ranks, strategy, max_epochs=3, callbacks=killers)
    of.fit(module, loader(), loader(shuffle=False))
    torch.save(module.state_dict(), folder / f"{rank}.pt")


def start(*arguments: Any) -> multiprocessing.process.BaseProcess:
    start_fork_server()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=runpy.run_path, args=(__file__, {"_as_worker": arguments}, "worker"))
    process.start()
    return process


@pytest.mark.parametrize(
    ("options", "kill_at"), [pytest.param({"mode": "asp"}, 0, marks=pytest.mark.slow), ({"mode": "ssp", "staleness": 3}, 2)]
)
def test_killed_worker_stops_nobody_and_a_new_one_joins_those_who_train(
    tmp_path: Path, options: dict[str, Any], kill_at: int
) -> None:
    with services(1, grace=0.1) as where:
        where |= options
        environment = {"ANTDT_TOKEN": os.environ["ANTDT_TOKEN"]}
        os.mkfifo(tmp_path / "let-in")
        processes = {rank: start(rank, 3, tmp_path, environment, where, kill_at if rank == 1 else None) for rank in range(3)}
        processes[1].join()
        assert processes[1].exitcode == -signal.SIGKILL
        processes[1] = start(1, 3, tmp_path, environment, where, None)
        for process in processes.values():
            process.join()
        assert [process.exitcode for process in processes.values()] == [0, 0, 0]
    counted: Counter[tuple[int, int]] = Counter()
    workers: dict[str, int] = {}
    for path in sorted(tmp_path.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            epoch, _, positions = json.loads(line)
            counted.update((epoch, position) for position in positions)
            workers[path.name] = workers.get(path.name, 0) + 1
    # One server takes a gradient and commits its samples in one: not even the batch that was being computed comes twice.
    assert counted == Counter({(epoch, position): 1 for epoch in range(3) for position in range(ROWS)})
    if options["mode"] == "ssp":
        assert len(workers) == 4, "the killed worker trained, and so did the one in its place"
        assert sorted(count for name, count in workers.items() if name.startswith("1-"))[0] == kill_at
    weights = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())


def test_server_that_is_killed_is_started_again_by_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "subprocess", WARM)
    with services() as where:
        strategy = ParameterServerStrategy(
            mode="bsp", servers=2, server=where["server"], save_every=0.0, shard_steps=1, server_cost=0.01,
            server_slowdowns=[Slowdown(rank=1, factor=3.0, pid_bound=True)],
        )  # fmt: skip
        killer = KillServer(tmp_path)
        of = trainer(tmp_path, 1, strategy, callbacks=[killer])
        of.fit(Regression(), loader(10), loader(10, shuffle=False))
    assert of.global_step == 14
    events = [json.loads(line) for line in (tmp_path / "antdt" / "ps-events.jsonl").read_text().splitlines()]
    kinds = Counter(event["kind"] for event in events)
    assert kinds["configure"] == 2 and kinds["restored"] == 1
    (restored,) = [event for event in events if event["kind"] == "restored"]
    assert restored["server"] == 1 and restored["pid"] != killer.killed[0]
    lost = sum(event["steps"] for event in events if event["kind"] == "lost steps")
    assert restored["version"] + lost <= 7 and lost <= 6
    assert not list((tmp_path / "antdt").glob("ps*/slice.safetensors")), "a run that is over leaves no part behind"


@pytest.mark.parametrize("options", [
    {"mode": "bsp"}, pytest.param({"mode": "ssp", "staleness": 2}, marks=pytest.mark.slow),
    pytest.param({"mode": "asp"}, marks=pytest.mark.slow)])  # fmt: skip
def test_clock_that_is_killed_under_several_workers_goes_on_with_all_of_them(tmp_path: Path, options: dict[str, Any]) -> None:
    """Server 0 keeps the clock; what it had not written down when it was killed is lost, as the log says, and nothing else."""
    with services() as where:
        where |= {"servers": 2, "save_every": 0.0, **options}
        environment = {"ANTDT_TOKEN": os.environ["ANTDT_TOKEN"]}
        warm = options["mode"] == "bsp"  # the slow ones are started as outside of tests
        processes = [
            start(rank, 3, tmp_path, environment, where, None, 0 if rank == 2 else None, False, warm) for rank in range(3)
        ]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]
    events = [json.loads(line) for line in (tmp_path / "antdt" / "ps-events.jsonl").read_text().splitlines()]
    assert [event["server"] for event in events if event["kind"] == "restored"] == [0]
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    counted = Counter((epoch, position) for epoch, _, positions in lines for position in positions)
    missing = {(epoch, position) for epoch in range(3) for position in range(ROWS)} - counted.keys()
    lost = sum(event["steps"] for event in events if event["kind"] == "lost steps")
    assert len(missing) <= 15 * lost, "no sample is missing but of steps that the log calls lost"
    # Nobody's gradient was left out of a step because it came back a little later than the others.
    assert not [event for event in events if event["kind"] in ("dropped", "lost")]
    weights = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"mode": "bsp", "backup": 1, "on_drop": "requeue"}, {"mode": "asp"}])
def test_clock_that_is_killed_at_meeting_after_meeting_keeps_nobody_waiting(tmp_path: Path, options: dict[str, Any]) -> None:
    """Again and again: some workers have had an answer of a meeting then, and others have not."""
    with services() as where:
        where |= {"servers": 2, "save_every": 0.0, **options}
        environment = {"ANTDT_TOKEN": os.environ["ANTDT_TOKEN"]}
        processes = [start(rank, 3, tmp_path, environment, where, None, 0 if rank == 2 else None, True) for rank in range(3)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]
    events = [json.loads(line) for line in (tmp_path / "antdt" / "ps-events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "restored" for event in events) >= 3
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    counted = Counter((epoch, position) for epoch, _, positions in lines for position in positions)
    assert max(counted.values()) == 1
    lost = sum(event["steps"] for event in events if event["kind"] == "lost steps")
    assert 3 * ROWS - len(counted) <= 15 * lost
    weights = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())


if "_as_worker" in globals():
    worker(*globals()["_as_worker"])
