"""Tasks that training has not seen: variants of meta learning beside joint training, closed forms and popularity.

``python -m benchmarks.gmeta_cold_start`` trains ``gmeta/movielens`` (a task is a user) and ``gmeta/flights`` (an aircraft) as
they are, and tests on cold tasks after 0 to 5 steps of adaptation; ``bias`` adds a constant of the task, in closed
form, in place of steps. Joint training learns from support and query alike, without an inner loop, and adapts only when it is
tested. Popularity is the smoothed rate of a film, or of a flight number, in training. MAML with 2 processes (``hybrid``) is
compared with one.

``auc`` is over all rows, ``gauc`` inside of tasks, which a constant of the task cannot change.

Claim: arXiv 2401.04338 gives no figure that we could verify; bars are ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc

from benchmarks.commands import column, run, zoo, zoo_here
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Flights, Tasks
from zoo.gmeta import task_bias
from zoo.metrics.grouped_auc import GroupedAUC

MAML, JOINT = "MAML, second order", "joint"
ARMS: dict[str, list[str]] = {
    MAML: ["--model.variant", "maml"],
    "MAML, first order": ["--model.variant", "maml", "--model.first_order", "true"],
    "MeLU": ["--model.variant", "melu"],
    JOINT: ["--model.variant", "joint"],
    "ANIL": ["--model.variant", "anil"],
    "rows only": ["--model.variant", "rows"],
    "Meta-SGD": ["--model.variant", "meta_sgd"],
    "Reptile": ["--model.variant", "reptile"],
    "CBML": ["--model.variant", "cbml"],
}
SEVERAL = 4  # so many of them are trained with all seeds
SHOWN = [0, 1, 2, 3, 5]
NAMES = [f"{kind}@{steps}" for kind in ("auc", "gauc", "log_loss") for steps in (*SHOWN, "bias")]
CONFIGS = {"MovieLens": "gmeta/movielens", "Flights": "gmeta/flights"}


def trained(config: str, folder: Path, seed: int, steps: int, options: Sequence[str], ranks: int = 1) -> dict[str, float]:
    """Metrics of cold tasks by the command line."""
    eval_steps = ["--model.eval_steps", json.dumps(SHOWN)]
    options = [*options, *eval_steps]
    fit = zoo("fit", config, folder, *options, "--seed_everything", str(seed), "--trainer.max_steps", str(steps),
              "--trainer.limit_val_batches", "0")  # fmt: skip
    if ranks == 1:
        zoo_here(fit)
    else:
        hybrid = ["-c", "strategies/hybrid", "--trainer.devices", str(ranks), "--data.batch_size", str(32 // ranks)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        run([*launch, *fit[1:], *hybrid], threads=1)
    last = folder / "checkpoints" / "last.ckpt"
    zoo_here(zoo("test", config, folder / "test", *options, "--ckpt_path", str(last)))
    return {name: column(folder / "test", f"test/{name}")[-1][1] for name in NAMES}


def popularity(data: Tasks, field: int) -> dict[str, float]:
    """Metrics of the smoothed rate of a field's values."""
    table = data.tables[0]["train"].table
    ids_N, label_N = np.asarray(table.sparse[:, field]), np.asarray(table.label)
    clicks, seen = np.bincount(ids_N, label_N, data.field_dims[field]), np.bincount(ids_N, minlength=data.field_dims[field])
    logit_V = torch.logit(torch.from_numpy((clicks + 10 * label_N.mean()) / (seen + 10)))
    scores: dict[str, list[torch.Tensor]] = {"0": [], "bias": []}
    labels, tasks = [], []
    for batch in data.test_dataloader():
        support, query = ({**batch[name], "logit": logit_V[batch[name]["sparse"][..., field]]} for name in ("support", "query"))
        bias_T1 = task_bias(support["logit"], support["label"], support["mask"])
        scores["0"].append(query["logit"].flatten())
        scores["bias"].append((query["logit"] + bias_T1).flatten())
        labels.append(query["label"].flatten())
        tasks.append(batch["task"][:, None].expand_as(query["mask"]).flatten())
    label_B, task_B = torch.cat(labels), torch.cat(tasks)
    found = {}
    for name, parts in scores.items():
        gauc = GroupedAUC()
        gauc.update(torch.cat(parts), label_B, task_B)
        found[f"auc@{name}"] = float(binary_auroc(torch.cat(parts), label_B.long()))
        found[f"gauc@{name}"] = float(gauc.compute()["auc"])
        found[f"log_loss@{name}"] = float(binary_cross_entropy_with_logits(torch.cat(parts), label_B.double()))
    return found


def measure(record: Record, folder: Path, name: str, seeds: Sequence[int], steps: int) -> dict[str, list[dict[str, float]]]:
    """Add the rows of a data set; metrics of each arm, by seed."""
    config = CONFIGS[name]
    found: dict[str, list[dict[str, float]]] = {}
    for number, (arm, options) in enumerate(ARMS.items()):
        for seed in seeds if number < SEVERAL else seeds[:1]:
            metrics = trained(config, folder / f"{name}_{number}_{seed}", seed, steps, options)
            found.setdefault(arm, []).append(metrics)
            record.row(**{name: arm}, seed=seed, **metrics)
            for each in SHOWN:
                record.row(**{f"curve of {name}": arm}, steps=each, auc=metrics[f"auc@{each}"], seed=seed)
    data = (
        Tasks(num_workers=0)
        if name == "MovieLens"
        else Tasks(clicks=Flights(), task_field="tailnum", support=32, query=32, num_workers=0)
    )
    popular = popularity(data, data.columns.fields.index("item" if name == "MovieLens" else "flight"))
    record.row(**{name: "popularity"}, seed=0, **popular)
    for each in (0, SHOWN[-1]):
        record.row(**{f"curve of {name}": "popularity"}, steps=each, auc=popular["auc@0"], seed=0)
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gmeta_cold_start", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the arms that are compared by a bar")
    parser.add_argument("--smoke", action="store_true", help="few steps; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = range(1 if options.smoke else options.seeds)
    values = [f"{kind}@{steps}" for kind in ("auc", "gauc", "log_loss") for steps in (0, 1, 5, "bias")]
    record = Record("gmeta_cold_start", seeds=seeds, smoke=options.smoke, tables=[
        *[Table(f"{name}, cold tasks, by steps of adaptation", name, values, digits=3) for name in CONFIGS],
        Table("MovieLens, MAML with 2 processes", "ranks", ["auc@0", "auc@1", "auc@5"], digits=5),
    ], plots=[Plot(f"{name}: AUC over steps of adaptation", "steps", "auc", f"curve of {name}", reference="popularity")
              for name in CONFIGS])  # fmt: skip
    sizes = {"MovieLens": 5, "Flights": 3} if options.smoke else {"MovieLens": 250, "Flights": 300}
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, steps in sizes.items():
            results[name] = measure(record, folder, name, seeds, steps)
        one = results["MovieLens"][MAML][0]
        two = trained(CONFIGS["MovieLens"], folder / "two", seeds[0], sizes["MovieLens"], ARMS[MAML], ranks=2)
    for ranks, metrics in ((1, one), (2, two)):
        record.row(ranks=ranks, **metrics)
    medians = {arm: statistics.median(metrics["auc@1"] for metrics in results["MovieLens"][arm]) for arm in (MAML, JOINT)}
    record.measure("maml_minus_joint", medians[MAML] - medians[JOINT])
    record.measure("two_ranks_from_one", max(abs(one[key] - two[key]) for key in ("auc@0", "auc@1", "auc@5")))
    return record.save()


if __name__ == "__main__":
    main()
