"""xDeepFM on real rows against hashed logistic regression and the constant rate: late arrivals of flights from New York.

``python -m benchmarks.ctr_flights`` trains the model of ``configs/ctr/flights.yaml`` as ``zoo fit`` does, once per seed, and fits
logistic regression (scikit-learn, 2^17 hashed weights) to the same fields of the same training rows: without crosses, and with
all pairs of the nine fields of the schedule. Its penalty is chosen on the validation days. The model is also trained without its
interaction network (CIN) and without its hidden layers (DNN), and DCN-v2 and DLRM by their own configurations. Shown are the area
under the curve and the log loss (nats) of the test days.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.hashed_regression import HashedRegression
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Flights
from zoo.cli.command import ZooCLI

CONFIG = "ctr/flights"
OURS = {
    "xDeepFM": ["-c", CONFIG],
    "without CIN": ["-c", CONFIG, "--model.cin", "[]"],
    "without DNN": ["-c", CONFIG, "--model.dnn", "[]"],
    "DCN-v2": ["-c", "ctr/flights_dcn"],
    "DLRM": ["-c", "ctr/flights_dlrm"],
}
CROSSED, PLAIN, CONSTANT = "logistic regression, pairs of fields", "logistic regression", "constant rate"
SCHEDULE = ("carrier", "origin", "dest", "tailnum", "flight", "month", "weekday", "hour", "arrival_hour")


def train(seed: int, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """Train and test a configuration with a seed."""
    begin = time.perf_counter()
    common = ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    cli = ZooCLI(["fit", *options, *common])
    seconds = time.perf_counter() - begin
    (test,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return {"auc": test["test/auc"], "log_loss": test["test/log_loss"], "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ctr_flights", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="a short trial that leaves the results alone")
    options = parser.parse_args(arguments)
    seeds = options.seeds[:1] if options.smoke else options.seeds
    table = Table("Late arrivals on the test days (64,197 flights)", "arm", ["auc", "log_loss"], digits=4)
    record = Record("ctr_flights", seeds=seeds, tables=[table], smoke=options.smoke)
    data = Flights(train_rows=2000 if options.smoke else None, seed=0)
    data.setup("fit")
    splits = {split: data.dataset(split) for split in ("train", "val", "test")}
    whole = {split: rows.batch(np.arange(len(rows))) for split, rows in splits.items()}
    ids = {split: batch["sparse"].numpy() for split, batch in whole.items()}
    label = {split: batch["label"].numpy() for split, batch in whole.items()}

    def score(probability: np.ndarray) -> dict[str, float]:
        return {"auc": float(roc_auc_score(label["test"], probability)), "log_loss": float(log_loss(label["test"], probability))}

    record.row(arm=CONSTANT, **score(np.full(len(label["test"]), label["train"].mean())))
    crossed = [data.columns.fields.index(name) for name in SCHEDULE]
    for arm, fields in ((PLAIN, []), (CROSSED, crossed)):
        begin = time.perf_counter()
        model = HashedRegression(fields, [0.01] if options.smoke else [0.001, 0.003, 0.01, 0.03])
        model.fit(ids["train"], label["train"], ids["val"], label["val"])
        seconds = (time.perf_counter() - begin) / len(model.strengths)
        record.row(arm=arm, strength=model.strength, seconds=seconds, **score(model.predict(ids["test"])))
    smoke = ["--trainer.max_steps", "5", "--data.train_rows", "2000", "--trainer.limit_val_batches", "1"] if options.smoke else []
    for arm, command in OURS.items():
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                record.row(arm=arm, seed=seed, **train(seed, Path(folder), [*command, *smoke]))
    return record.save()


if __name__ == "__main__":
    main()
