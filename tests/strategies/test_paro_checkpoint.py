"""Checkpoints of PaRO are those of one process, and continue exactly under other codes, other strategies, other rank numbers."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed import RankPool
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from tiny import TinyData
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.optim.lr_scheduler import CosineAnnealingLR

from strategies import PaROStrategy
from strategies.paro import consolidate
from strategies.paro.checkpoint import load_sharded_weights, read_sharded
from strategies.paro.collectives import Collectives
from strategies.paro.engine import PaROEngine
from strategies.paro.grid import RankGrid
from strategies.paro.partition import Partition
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA, RunCheckpoint
from zoo.module import ZooModule

STEPS = 6
Saved = tuple[Path, dict[str, Tensor], dict[str, Tensor]]


class Layers(ZooModule):
    """A stack of layers whose sizes no number of ranks divides; matrices and vectors are groups of their own."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__(optimizer=partial(torch.optim.AdamW, lr=0.02), lr_scheduler=partial(CosineAnnealingLR, T_max=STEPS))
        self.first = nn.Linear(4, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(2))
        self.last = nn.Linear(5, 4)
        self.register_buffer("count", torch.zeros(()))
        self.first.bias.requires_grad_(not frozen)
        self.seen: list[float] = []

    def parameter_groups(self) -> Any:
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.2},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(h)
        loss = (self.last(h) - x.roll(1, 1)).square().mean()
        self.seen.append(loss.item())
        return loss


def strategy_of(name: str) -> Any:
    if name.endswith(" sharded"):
        return PaROStrategy(name[:3], group_size=2, state_dict_type="sharded", min_unit_params=10)
    if len(name) == 3 and name.isupper():
        return PaROStrategy(name, group_size=2)
    return {"one": "auto", "ddp": "ddp"}[name]


def fit(
    folder: Path, name: str, steps: int, save: str | None = None, resume: str | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    torch.set_default_dtype(torch.float64)
    seed_everything(1, verbose=False)
    model = Layers()
    callbacks: list[Callback] = [] if "sharded" in f"{save}{resume}" or resume == "file" else [EMA(decay=0.8)]
    if save is not None:
        callbacks.append(RunCheckpoint(every_n_steps=3, minutes=None, folder=folder / save))
    trainer = Trainer(
        accelerator="cpu",
        devices=get_world_size(),
        strategy=strategy_of(name),
        precision="64-true",
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, TinyData(rows=64, batch_size=8 // get_world_size()), ckpt_path=resume and folder / resume / "last.ckpt")
    return {key: value.detach().clone() for key, value in LightningModule.state_dict(model).items()}, model.seen


def fits(folder: Path, jobs: list[dict[str, Any]]) -> list[Any]:
    return [fit(folder, **job) for job in jobs]


def compare(a: Any, b: Any, where: str) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=where)
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            compare(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        for number, pair in enumerate(zip(a, b, strict=True)):
            compare(*pair, f"{where}/{number}")


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Checkpoints after half of the steps, by one process and under two codes; and the averages and weights of a whole run."""
    folder = tmp_path_factory.mktemp("saved")
    jobs: list[dict[str, Any]] = [{"steps": STEPS}, {"steps": 3, "save": "one"}, {"steps": STEPS, "save": "unsharded"}]
    ((average, _), _, (whole, _)) = pool.run(fits, folder, [{"name": "one", **job} for job in jobs], world_size=1)[0]
    pool.run(fits, folder, [{"name": code, "steps": 3, "save": code} for code in ("IIG", "GGG", "IIG sharded")], world_size=4)
    return folder, average, whole


def test_checkpoints_are_those_of_one_process(saved: Saved) -> None:
    one = read_checkpoint(saved[0] / "one/last.ckpt")
    for code in ("IIG", "GGG"):
        ours = read_checkpoint(saved[0] / code / "last.ckpt")
        assert ours.keys() == one.keys()
        for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            compare(one[key], ours[key], key)


def test_sharded_checkpoints_are_read_a_unit_at_a_time(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    load = dcp.load

    def counted(state: dict[str, Tensor], **options: Any) -> None:
        sizes.append(sum(value.numel() for value in state.values()))
        load(state, **options)

    monkeypatch.setattr(dcp, "load", counted)
    checkpoint = read_sharded(saved[0] / "IIG sharded" / "last.ckpt")
    assert not sizes  # nothing yet
    weights = checkpoint["state_dict"]
    total = sum(weights.parameter(name).numel() for name in weights.shapes())
    units = len(sizes)
    assert units > 1 and total <= sum(sizes) < total + units * 8 and max(sizes) < total  # each once, with its padding
    states = dict(checkpoint["optimizer_states"][0]["state"])
    assert max(sizes[units:]) < total and {len(state) for state in states.values()} == {3}


def load_into_another_model(folder: Path) -> None:
    engine = PaROEngine(nn.Linear(3, 5), None, Partition.of("GGG"), Collectives(RankGrid(1)))
    with pytest.raises(ValueError, match=r"of another model: missing: weight, bias; unknown: count, first.weight, .*"):
        load_sharded_weights(engine, read_sharded(folder)["state_dict"])
    engine = PaROEngine(nn.ModuleDict({"first": nn.Linear(3, 5)}), None, Partition.of("GGG"), Collectives(RankGrid(1)))
    with pytest.raises(ValueError, match=r"of another shape: first.weight \(5, 4\) instead of \(5, 3\)\."):
        load_sharded_weights(engine, read_sharded(folder)["state_dict"], strict=False)


def test_sharded_checkpoints_of_another_model_are_refused(pool: RankPool, saved: Saved) -> None:
    pool.run(load_into_another_model, saved[0] / "IIG sharded" / "last.ckpt", world_size=2)


@pytest.mark.parametrize(("world_size", "pairs"), [
    pytest.param(4, [("III", "GGG"), ("ddp", "IIG")], marks=pytest.mark.slow),
    pytest.param(4, [("IIG", "IIG"), ("GGG", "IIG sharded")], marks=pytest.mark.slow),
    (2, [("NNG", "IIG sharded")]),
    (1, [("one", "IIG"), ("one", "file")]),
    pytest.param(4, [("NIG", "IIG"), ("GGG", "one")], marks=pytest.mark.slow),
    pytest.param(2, [("NNG", "GGG")], marks=pytest.mark.slow),
])  # fmt: skip
def test_runs_continue_exactly_anywhere(pool: RankPool, saved: Saved, world_size: int, pairs: list[tuple[str, str]]) -> None:
    folder, average, whole = saved
    if ("one", "file") in pairs:
        (folder / "file").mkdir()
        consolidate(folder / "IIG sharded" / "last.ckpt", folder / "file" / "last.ckpt")
    jobs = [{"name": name, "steps": STEPS, "resume": resume} for name, resume in pairs]
    for rank in pool.run(fits, folder, jobs, world_size=world_size):
        for job, (weights, _) in zip(jobs, rank, strict=True):
            expected = whole if job["resume"] in ("IIG sharded", "file") else average
            for name, value in weights.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=f"{job} {name}")
