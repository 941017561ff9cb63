"""G-Meta under Lightning: it learns to adapt, whatever the processes, and says what adaptation is worth."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from gmeta_runs import CASES, DIMS, Drawn, batches, model, run, same, trainer
from lightning.pytorch import seed_everything

import zoo
from datamodules import Flights, Tasks
from zoo.__main__ import main
from zoo.ctr import DLRM
from zoo.gmeta import GMeta


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_it_learns_to_adapt(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module, data = model(optimizer=partial(torch.optim.Adam, lr=2e-2)), Drawn(steps=60, tasks=16)
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module, data)
    (found,) = fit.test(module, data, verbose=False)
    assert found["test/auc@1"] > 0.9 > 0.7 > found["test/auc@0"]
    assert found["test/auc"] == found["test/auc@1"]
    assert found["test/log_loss@1"] < found["test/log_loss@0"]
    assert {name for name in found if "bias" in name} == {f"test/{kind}@bias" for kind in ("auc", "gauc", "log_loss")}
    predicted = fit.predict(module, data)
    assert predicted is not None
    for batch, found_batch in zip(batches(1, 5, 16), predicted, strict=True):
        assert found_batch["index"].tolist() == batch["query"]["index"][batch["query"]["mask"]].tolist()
        assert found_batch["probability"].shape == found_batch["task"].shape == found_batch["index"].shape


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, pool: RankPool, tmp_path: Path, float64: None) -> None:
    """Some have no task in a step; tables are whole or divided."""
    alone = run(tmp_path, CASES[case], "auto")
    for found in pool.run(run, tmp_path, CASES[case], "ddp" if case == "rows" else "hybrid", world_size=2):
        same(alone, found, 1e-10)


def test_checkpoint_holds_everything(tmp_path: Path) -> None:
    module = model(variant="meta_sgd", inner_steps=2)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(module, Drawn())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = GMeta.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.hparams == module.hparams
    assert torch.equal(again.adaptation.rates_K, module.adaptation.rates_K)  # type: ignore[arg-type]
    other = GMeta.from_pretrained(module.save_pretrained(tmp_path / "weights"))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))


def test_tables_grow_by_new_ids() -> None:
    module = model(variant="cbml")
    grown = module.grown([8, 11, 5])
    random = torch.Generator().manual_seed(0)
    sparse = torch.stack([torch.randint(dim, (9,), generator=random) for dim in DIMS], dim=-1)
    dense = torch.randn(9, 2, generator=random)
    assert torch.equal(grown.network(sparse, dense), module.network(sparse, dense))
    assert grown.network.field_dims == (8, 11, 5)
    with pytest.raises(ValueError, match="each field must keep its ids"):
        module.grown([6, 10, 4])


def test_a_plain_model_is_not_given_tasks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs batches with sparse"):
        trainer(tmp_path).fit(DLRM(DIMS, 2), Drawn())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda batch: batch.pop("support"), "needs batches of tasks"),
        (lambda batch: batch["query"]["mask"].zero_(), "no sample in its query"),
        (lambda batch: batch["support"]["sparse"].fill_(7), "Field 0 of the batch"),
        (lambda batch: batch["support"].update(dense=torch.zeros(6, 6, 3)), "needs batches with sparse"),
    ],
)
def test_bad_batches_are_refused(change: Any, says: str) -> None:
    batch = batches(0, 1, 6)[0]
    module = model()
    module.check(batch)
    change(batch)
    with pytest.raises(ValueError, match=says) as error:
        module.check(batch)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize(
    ("options", "says"),
    [({"inner_steps": 0}, "inner_steps=0"), ({"eval_steps": [-1]}, "eval_steps"), ({"compile": True}, "compile false")],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        model(**options)
    assert len(str(error.value)) <= 300


def test_a_run_that_is_continued_repeats_the_losses(tmp_path: Path) -> None:
    def losses(folder: Path, *stages: list[str]) -> list[str]:
        for words in stages:
            options = ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0"]
            quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
            root = ["--trainer.default_root_dir", str(folder)]
            assert main(["fit", "-c", "gmeta/movielens", *root, *options, *quiet, *words]) == 0
        with (folder / "metrics.csv").open(newline="") as file:
            return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]

    whole = losses(tmp_path / "whole", ["--trainer.max_steps", "30"])  # more than an epoch
    parts = ["--trainer.max_steps", "7"], ["--trainer.max_steps", "30", "--ckpt_path", "last"]
    assert losses(tmp_path / "parts", *parts) == whole and len(whole) == 30


def test_shipped_weights_score_unseen_aircraft(tmp_path: Path) -> None:
    data = Tasks(clicks=Flights(), task_field="tailnum", support=32, query=32, num_workers=0)
    (found,) = trainer(tmp_path, limit_test_batches=4).test(zoo.load("gmeta-flights"), data, verbose=False)
    assert found["test/auc@0"] > 0.7 and found["test/auc@1"] > 0.7
