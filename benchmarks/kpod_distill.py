"""Arms of KPOD on GSM-Symbolic: a small student from scratch, by the commands of the card.

``python -m benchmarks.kpod_distill`` types ``zoo fit`` and ``zoo predict`` of ``kpod/weighter_gsm_symbolic`` once, and for each
arm and seed ``zoo fit`` of ``kpod/sft_gsm_symbolic`` or ``kpod/distill_gsm_symbolic`` and ``zoo test``; data, order and number
of updates are the same. *Random weights* are the learned ones, each at the place of another; *first steps first* leaves the last
steps out where the curriculum gives the first ones; *equal tokens* is plain fine-tuning that ends once it has learned from as
many tokens as KPOD. Two runs at a time, each with one thread.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from benchmarks.plots import Plot
from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from zoo.kpod import KPOD
from zoo.kpod.artefacts import TokenWeights, read_weights
from zoo.kpod.scorer import wilson_interval

WEIGHTER, SFT, DISTILL = "kpod/weighter_gsm_symbolic", "kpod/sft_gsm_symbolic", "kpod/distill_gsm_symbolic"
GROUPS = {"items": "new items", "templates": "new templates"}


class FirstStepsFirst(KPOD):
    """Learns the first steps first: where the curriculum gives k steps, the last k are left out of the loss."""

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if not self.trainer.training:
            return batch
        step_BS = batch["step_ids"]
        return {**batch, "step_ids": (step_BS.amax(1, keepdim=True) - step_BS).where(step_BS >= 0, -1)}


def zoo(verb: str, config: str, folder: Path, *more: str) -> None:
    """A command of the zoo, whose run lies in a folder.

    Raises:
        SystemExit: With the end of its output, if it fails.
    """
    command = [sys.executable, "-m", "zoo", verb, "-c", config, "--trainer.default_root_dir", str(folder),
               "--trainer.enable_progress_bar", "false", *more]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])}\n{done.stdout[-3000:]}")


def logged(folder: Path) -> dict[str, list[float]]:
    """Values of each column of a run's ``metrics.csv``."""
    found: dict[str, list[float]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    found.setdefault(name, []).append(float(value))
    return found


class Arms:
    """The runs.

    Args:
        folder: Where they lie.
        options: Options of all commands.
        weights: File of the learned weights.
        shuffled: File of the same, each at the place of another.
    """

    def __init__(self, folder: Path, options: Sequence[str], weights: Path, shuffled: Path) -> None:
        self.folder, self.options = folder, list(options)
        floor = ["--model.weight_floor", "0.1"]
        none = ["--model.token_weights", "null"]
        reverse = folder / "first_steps_first.yaml"
        config = (ROOT / "configs" / f"{DISTILL}.yaml").read_text()
        reverse.write_text(config.replace("class_path: KPOD", f"class_path: {__spec__.name}.FirstStepsFirst"))
        self.arms: Mapping[str, tuple[str, list[str]]] = {
            "KPOD": (DISTILL, ["--model.token_weights", str(weights)]),
            "SFT": (SFT, []),
            "weights": (SFT, ["--model.token_weights", str(weights), *floor]),
            "curriculum": (DISTILL, none),
            "random weights": (SFT, ["--model.token_weights", str(shuffled), *floor]),
            "first steps first": (str(reverse), none),
        }

    def run(self, arm: str, seed: int, config: str, more: Sequence[str]) -> dict[str, float]:
        """Train and test; losses, accuracies and the tokens that were learned from."""
        folder = self.folder / f"{arm.replace(' ', '_')}_{seed}"
        seeded = ["--seed_everything", str(seed), *self.options]
        zoo("fit", config, folder, *seeded, *more, "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1")
        tokens = logged(folder)["train/supervised_tokens"]
        tested = folder / "test"
        kept = [word for word in more if not word.startswith("--trainer.")] if "--trainer.max_steps" not in more else []
        zoo("test", config, tested, *seeded, *kept, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"))
        found = {name.removeprefix("test/"): values[-1] for name, values in logged(tested).items()}
        return {**found, "tokens": sum(tokens), "updates": len(tokens)}

    def of_seed(self, arm: str, seed: int) -> dict[str, float]:
        """An arm."""
        return self.run(arm, seed, *self.arms[arm])

    def equal_tokens(self, seed: int, tokens: float) -> dict[str, float]:
        """Plain fine-tuning on as many tokens as another arm had."""
        learned = accumulate(logged(self.folder / f"SFT_{seed}")["train/supervised_tokens"])
        steps = 1 + sum(total < tokens for total in learned)
        return self.run("SFT, equal tokens", seed, SFT, ["--trainer.max_steps", str(steps)])


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kpod_distill", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run; steps are given in the first half")
    parser.add_argument("--questions", type=int, default=250, help="questions of each group of held-out ones")
    parser.add_argument("--folder", type=Path, help="where runs lie; a temporary one")
    parser.add_argument("--smoke", action="store_true", help="a few examples; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = range(1 if options.smoke else options.seeds)
    record = Record(
        "kpod_distill",
        seeds=seeds,
        smoke=options.smoke,
        tables=[
            Table("Accuracy of answers, with the interval of 95 % over the questions of all seeds", "arm",
                  [f"{name}: {part}" for name in GROUPS.values() for part in ("accuracy", "low", "high")], digits=3),
            Table("Loss of held-out rationales and answers (nats a token)", "arm_losses",
                  [f"{name}: {kind}" for name in GROUPS.values() for kind in ("arithmetic", "words")], digits=3),
            Table("Training", "arm_training", ["updates", "tokens_thousands"]),
            Table("Weights of tokens", "weights_of", ["auc", "mean_weight", "answer_kept", "answer_hard", "answer_masked"],
                  digits=3),
        ],
        plots=[Plot("Loss of digits and operators, new items", x="tokens_thousands", y="loss", series="arm_training")],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        small = ["--data.num_train", "32", "--data.num_val", "4"] if options.smoke else []
        zoo("fit", WEIGHTER, folder / "weighter", *small)
        zoo("predict", WEIGHTER, folder / "weighter", *small, "--ckpt_path", "last")
        measured = {name: values[-1] for name, values in logged(folder / "weighter").items()}
        record.row(weights_of="default seed", auc=measured["val/auc"], mean_weight=measured["val/mean_weight"],
                   **{f"answer_{name}": measured[f"val/answer_loss_{name}"] for name in ("kept", "hard", "masked")})  # fmt: skip
        weights = folder / "weighter" / "predictions" / "token_weights.safetensors"
        shuffled = folder / "shuffled.safetensors"
        learned = read_weights(weights)
        place = torch.randperm(len(learned.values), generator=torch.Generator().manual_seed(0))
        TokenWeights.save(replace(learned, values=learned.values[place]), shuffled)
        epochs = 2 if options.smoke else options.epochs
        questions = [] if options.smoke else ["--data.num_val", str(options.questions)]
        arms = Arms(folder, [*small, *questions, "--trainer.max_epochs", str(epochs)], weights, shuffled)
        with ThreadPoolExecutor(2) as pool:
            runs = {(arm, seed): pool.submit(arms.of_seed, arm, seed) for seed in seeds for arm in arms.arms}
            found = {key: run.result() for key, run in runs.items()}
            last = {seed: pool.submit(arms.equal_tokens, seed, found["KPOD", seed]["tokens"]) for seed in seeds}
            found |= {("SFT, equal tokens", seed): run.result() for seed, run in last.items()}
    report(record, found, options.questions if not options.smoke else 4)
    return record.save()


def report(record: Record, found: Mapping[tuple[str, int], dict[str, float]], questions: int) -> None:
    """Rows of the tables."""
    names = list(dict.fromkeys(arm for arm, _ in found))
    for arm in names:
        runs = {seed: run for (name, seed), run in found.items() if name == arm}
        cells: dict[str, float] = {}
        for group, name in GROUPS.items():
            correct = round(sum(run[f"{group}/accuracy"] * questions for run in runs.values()))
            low, high = wilson_interval(correct, questions * len(runs))
            cells |= {f"{name}: accuracy": correct / (questions * len(runs)), f"{name}: low": low, f"{name}: high": high}
        record.row(arm=arm, **cells)
        for seed, run in runs.items():
            losses = {
                f"{name}: {kind}": run[f"{group}/loss_{kind}"]
                for group, name in GROUPS.items()
                for kind in ("arithmetic", "words")
            }
            record.row(arm_losses=arm, seed=seed, **losses)
            record.row(arm_training=arm, seed=seed, updates=run["updates"], tokens_thousands=run["tokens"] / 1000,
                       loss=losses["new items: arithmetic"])  # fmt: skip


if __name__ == "__main__":
    main()
