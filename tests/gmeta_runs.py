"""Tasks that are drawn, and runs of meta learning on the ranks of the present group."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.distributed import get_rank, get_world_size, is_initialized
from torch.utils.data import DataLoader

from strategies import HybridStrategy
from zoo.ctr import DLRMNetwork, XDeepFMNetwork
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


def run(folder: Path, options: dict[str, Any], strategy: Any = "auto", **fit_options: Any) -> dict[str, Any]:
    """Fit and test on the ranks of the present group.

    Args:
        folder: Where the run lies.
        options: Of the model.
        strategy: Its name, or the arguments of ``HybridStrategy``.
        fit_options: Of the Trainer; ``ckpt_path`` continues, ``save`` names a checkpoint that is written after two steps,
            ``precision`` is 64-true.
    """
    ranks = get_world_size() if is_initialized() else 1
    precision = fit_options.pop("precision", "64-true")
    torch.set_default_dtype(torch.float64 if precision == "64-true" else torch.float32)
    seed_everything(3, verbose=False)
    module, data = model(**options), Drawn(steps=fit_options.pop("steps", 4))
    saved, path = fit_options.pop("save", None), fit_options.pop("ckpt_path", None)
    chosen = HybridStrategy(**strategy) if isinstance(strategy, dict) else strategy
    fit = trainer(folder, devices=ranks, strategy=chosen, precision=precision, **fit_options)
    losses: list[float] = []

    def after_step(*_: Any) -> None:
        losses.append(float(fit.callback_metrics["train/loss"]))
        if saved and fit.global_step == 2:
            fit.save_checkpoint(saved)

    module.on_train_batch_end = after_step  # type: ignore[method-assign]
    fit.fit(module, data, ckpt_path=path)
    (test,) = fit.test(module, data, verbose=False)
    weights = {name: value.detach().clone() for name, value in LightningModule.state_dict(module).items()}
    return {"weights": weights, "test": dict(test), "losses": losses}


def same(one: dict[str, Any], other: dict[str, Any], atol: float) -> None:
    assert one["losses"] == pytest.approx(other["losses"], abs=atol)
    for name, value in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], value, rtol=0, atol=atol)
    assert other["test"] == pytest.approx(one["test"], abs=1e-6)
