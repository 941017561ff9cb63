"""G-Meta under Lightning: it learns to adapt, whatever the processes, and says what adaptation is worth."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.distributed import get_rank, get_world_size, is_initialized
from torch.utils.data import DataLoader

from zoo.ctr import DLRM, DLRMNetwork, XDeepFMNetwork
from zoo.gmeta import GMeta

DIMS = [6, 11, 4]
DLRM_NETWORK = partial(DLRMNetwork, embed_dim=4, bottom=(6,), top=(8, 5), dropout=0.0)


def rows(random: torch.Generator, tasks: int, size: int, taste_T: Tensor, step: int) -> dict[str, Tensor]:
    """Rows whose label is the taste of their task, turned round by the first field."""
    sparse = torch.stack([torch.randint(dim, (tasks, size), generator=random) for dim in DIMS], dim=-1)
    mask = torch.rand(tasks, size, generator=random) < 0.8
    mask[:, 0] = True
    label = (taste_T[:, None] ^ (sparse[..., 0] < 2)).to(torch.get_default_dtype())
    index = torch.arange(tasks * size).view(tasks, size) + step * tasks * size
    return {
        "sparse": sparse * mask[..., None],
        "dense": torch.randn(tasks, size, 2, generator=random) * mask[..., None],
        "label": label * mask,
        "mask": mask,
        "index": index.where(mask, -1),
    }


def batches(seed: int, count: int, tasks: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(seed)
    found = []
    for step in range(count):
        taste_T = torch.rand(tasks, generator=random) < 0.5
        support, query = (rows(random, tasks, size, taste_T, step) for size in (6, 5))
        found.append({"support": support, "query": query, "task": torch.arange(tasks) + step * tasks, "num_tasks": tasks})
    return found


def part(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """A rank's tasks: the first has one, the last all that are left, and in every third step none."""
    tasks = len(batch["task"])
    ends = [0, *([1] * (ranks > 1)), *(1 + (tasks - 1) * r // (ranks - 1) for r in range(1, ranks))] if ranks > 1 else [0, tasks]
    if ranks > 1 and int(batch["task"][0]) // tasks % 3 == 2:
        ends = [0, *[tasks] * ranks]
    own = slice(ends[rank], ends[rank + 1])
    sets = {name: {key: value[own] for key, value in batch[name].items()} for name in ("support", "query")}
    return {**sets, "task": batch["task"][own], "num_tasks": tasks}


class Drawn(LightningDataModule):
    """Tasks that are drawn, divided unevenly."""

    field_dims = tuple(DIMS)
    num_dense = 2

    def __init__(self, steps: int = 4, tasks: int = 6) -> None:
        super().__init__()
        self.steps, self.tasks = steps, tasks

    def loader(self, seed: int, steps: int) -> Any:
        rank, ranks = (get_rank(), get_world_size()) if is_initialized() else (0, 1)
        return DataLoader([part(batch, rank, ranks) for batch in batches(seed, steps, self.tasks)], batch_size=None)

    def train_dataloader(self) -> Any:
        return self.loader(0, self.steps)

    def val_dataloader(self) -> Any:
        return self.loader(1, 5)

    test_dataloader = predict_dataloader = val_dataloader


def model(**options: Any) -> GMeta:
    defaults: dict[str, Any] = {"inner_lr": 0.3, "optimizer": partial(torch.optim.Adam, lr=1e-2)}
    return GMeta(options.pop("network", DLRM_NETWORK), DIMS, 2, **{**defaults, **options})


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        default_root_dir=folder, accelerator="cpu", use_distributed_sampler=False, **{**quiet, "max_epochs": 1, **options}
    )


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


def run(folder: Path, options: dict[str, Any], strategy: str) -> dict[str, Any]:
    """Fit and test on the ranks of the present group."""
    ranks = get_world_size() if is_initialized() else 1
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    module, data = model(**options), Drawn()
    fit = trainer(folder, devices=ranks, strategy=strategy if ranks > 1 else "auto", precision="64-true")
    losses: list[float] = []
    module.on_train_batch_end = lambda *_: losses.append(float(fit.callback_metrics["train/loss"]))  # type: ignore[method-assign]
    fit.fit(module, data)
    (test,) = fit.test(module, data, verbose=False)
    weights = {name: value.detach().clone() for name, value in LightningModule.state_dict(module).items()}
    return {"weights": weights, "test": dict(test), "losses": losses}


CASES = {
    "maml": {"variant": "maml", "inner_steps": 2},
    "melu": {"variant": "melu"},
    "anil": {"variant": "anil", "first_order": True},
    "rows": {"variant": "rows", "inner_steps": 3},
    "meta_sgd": {"variant": "meta_sgd"},
    "reptile": {"variant": "reptile"},
    "cbml": {"variant": "cbml", "network": partial(XDeepFMNetwork, embed_dim=4, cin=(3,), dnn=(8,), dropout=0.2)},
    "joint": {"variant": "joint"},
}


def same(one: dict[str, Any], other: dict[str, Any], atol: float) -> None:
    assert one["losses"] == pytest.approx(other["losses"], abs=atol)
    for name, value in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], value, rtol=0, atol=atol)
    assert other["test"] == pytest.approx(one["test"], abs=1e-6)


@pytest.mark.parametrize("case", ["maml", "cbml"])
def test_two_processes_are_one(case: str, pool: RankPool, tmp_path: Path, float64: None) -> None:
    alone = run(tmp_path, CASES[case], "auto")
    for found in pool.run(run, tmp_path, CASES[case], "ddp", world_size=2):
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
