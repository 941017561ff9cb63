"""Arms of KPOD on GSM-Symbolic: a small student from scratch, by the commands of the card.

``python -m benchmarks.kpod_distill`` times the three commands that learn weights and a student, and types the last once more
with a SIGKILL on the way. Then it types for each arm and seed ``zoo fit`` of ``kpod/sft_gsm_symbolic`` or
``kpod/distill_gsm_symbolic``, and ``zoo test``; data, their order and the number of updates are the same. *Random weights* are
the learned ones, each at the place of another; *first steps first* leaves the last steps out where the curriculum gives the first
ones; *equal tokens* is plain fine-tuning that ends once it has learned from as many tokens as KPOD. Two runs at a time, each with
one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from typing_extensions import override

from benchmarks.commands import column, run, run_with_kill, zoo
from benchmarks.plots import Plot
from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from datamodules import Rationales
from zoo import load
from zoo.kpod import KPOD
from zoo.kpod.artefacts import TokenWeights, read_weights
from zoo.kpod.scorer import wilson_interval

WEIGHTER, SFT, DISTILL = "kpod/weighter_gsm_symbolic", "kpod/sft_gsm_symbolic", "kpod/distill_gsm_symbolic"
SHIPPED = "kpod-gsm-symbolic"
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


def last(folder: Path, prefix: str) -> dict[str, float]:
    """Last values of a run's columns whose names begin so, by the rest of the name."""
    names = (folder / "metrics.csv").read_text().partition("\n")[0].split(",")
    return {name.removeprefix(prefix): column(folder, name)[-1][1] for name in names if name.startswith(prefix)}


def commands(record: Record, folder: Path, small: Sequence[str]) -> Path:
    """The three commands of the card, and the last once more with a SIGKILL; returns the file of weights."""
    weighter, whole, cut = folder / "weighter", folder / "whole", folder / "cut"
    weights = weighter / "predictions" / "token_weights.safetensors"
    fit = ["--model.token_weights", str(weights), "--trainer.log_every_n_steps", "1", *small]
    seconds = run(zoo("fit", WEIGHTER, weighter, *small))
    seconds += run(zoo("predict", WEIGHTER, weighter, *small, "--ckpt_path", "last"))
    seconds += run(zoo("fit", DISTILL, whole, *fit))
    steps = len(column(whole, "train/loss"))
    killed = run_with_kill(zoo("fit", DISTILL, cut, "--ckpt_path", "last", *fit), cut, steps // 2)
    pairs = zip(column(whole, "train/loss"), column(cut, "train/loss"), strict=True)
    difference = max(abs(a - b) if step == other else float("inf") for (step, a), (other, b) in pairs)
    found = last(weighter, "val/")
    record.row(weights_of="default seed", auc=found["auc"], mean_weight=found["mean_weight"],
               **{f"answer_{name}": found[f"answer_loss_{name}"] for name in ("kept", "hard", "masked")})  # fmt: skip
    record.row(commands="fit, predict, fit", minutes=seconds / 60, steps=steps, killed_at=killed, loss_difference=difference)
    record.measure("auc", found["auc"])
    record.measure("minutes", seconds / 60)
    record.measure("difference_after_sigkill", difference)
    return weights


def shipped(record: Record, questions: int) -> None:
    """Accuracy of the shipped student."""
    data = Rationales(tokenizer=SHIPPED, template_fraction=0.09, max_length=256, too_long="skip", num_val=questions)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1, "accelerator": "cpu"}
    tested = Trainer(**quiet).test(load(SHIPPED), data, verbose=False)  # type: ignore[arg-type]
    found = {name.removeprefix("test/"): value for each in tested for name, value in each.items()}
    record.row(arm=f"shipped {SHIPPED}", **accuracies([found], questions))


def accuracies(runs: Sequence[Mapping[str, float]], questions: int) -> dict[str, float]:
    """Accuracy and its interval over the questions of some runs, by group."""
    cells: dict[str, float] = {}
    for group, name in GROUPS.items():
        correct = round(sum(run[f"{group}/accuracy"] * questions for run in runs))
        low, high = wilson_interval(correct, questions * len(runs))
        cells |= {f"{name}: accuracy": correct / (questions * len(runs)), f"{name}: low": low, f"{name}: high": high}
    return cells


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

    def train(self, arm: str, seed: int, config: str, more: Sequence[str]) -> dict[str, float]:
        """Train and test, unless that is done; losses, accuracies and the tokens that were learned from."""
        folder = self.folder / f"{arm.replace(' ', '_')}_{seed}"
        tested, checkpoint = folder / "test", folder / "checkpoints" / "last.ckpt"
        if not (tested / "metrics.csv").is_file():
            seeded = ["--seed_everything", str(seed), *self.options, "--trainer.log_every_n_steps", "1"]
            run(zoo("fit", config, folder, *seeded, *more, "--trainer.limit_val_batches", "0"), 1)
            run(zoo("test", config, tested, *self.options, "--ckpt_path", str(checkpoint)), 1)
        tokens = [value for _, value in column(folder, "train/supervised_tokens")]
        return {**last(tested, "test/"), "tokens": sum(tokens), "updates": len(tokens)}

    def of_seed(self, arm: str, seed: int) -> dict[str, float]:
        """An arm."""
        return self.train(arm, seed, *self.arms[arm])

    def equal_tokens(self, seed: int, tokens: float) -> dict[str, float]:
        """Plain fine-tuning on as many tokens as another arm had."""
        learned = accumulate(value for _, value in column(self.folder / f"SFT_{seed}", "train/supervised_tokens"))
        steps = 1 + sum(total < tokens for total in learned)
        return self.train("SFT, equal tokens", seed, SFT, ["--trainer.max_steps", str(steps)])


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kpod_distill", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run; steps are given in the first two")
    parser.add_argument("--questions", type=int, default=200, help="questions of each group of held-out ones")
    parser.add_argument("--folder", type=Path, help="where runs lie, of which tested arms are not run again; a temporary one")
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
            Table("Commands of the card", "commands", ["minutes", "steps", "killed_at", "loss_difference"]),
            Table("Training", "arm_training", ["updates", "tokens_thousands"]),
            Table("Weights of tokens", "weights_of", ["auc", "mean_weight", "answer_kept", "answer_hard", "answer_masked"],
                  digits=3),
        ],
        plots=[Plot("Loss of digits and operators, new items", x="mean_tokens_thousands", y="loss", series="arm_training")],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        small = ["--data.num_train", "32", "--data.num_val", "4"] if options.smoke else []
        weights = commands(record, folder, small)
        shuffled = folder / "shuffled.safetensors"
        learned = read_weights(weights)
        place = torch.randperm(len(learned.values), generator=torch.Generator().manual_seed(0))
        TokenWeights.save(replace(learned, values=learned.values[place]), shuffled)
        epochs = 2 if options.smoke else options.epochs
        questions = [] if options.smoke else ["--data.num_val", str(options.questions)]
        arms = Arms(folder, [*small, *questions, "--trainer.max_epochs", str(epochs)], weights, shuffled)
        with ThreadPoolExecutor(2) as pool:
            runs = {(arm, seed): pool.submit(arms.of_seed, arm, seed) for seed in seeds for arm in arms.arms}
            found = {key: each.result() for key, each in runs.items()}
            equal = {seed: pool.submit(arms.equal_tokens, seed, found["KPOD", seed]["tokens"]) for seed in seeds}
            found |= {("SFT, equal tokens", seed): each.result() for seed, each in equal.items()}
        num_questions = 4 if options.smoke else options.questions
        shipped(record, num_questions)
    report(record, found, num_questions)
    return record.save()


def report(record: Record, found: Mapping[tuple[str, int], dict[str, float]], questions: int) -> None:
    """Rows of the tables."""
    names = list(dict.fromkeys(arm for arm, _ in found))
    for arm in names:
        seeds = {seed: run_of for (name, seed), run_of in found.items() if name == arm}
        record.row(arm=arm, **accuracies(list(seeds.values()), questions))
        mean_tokens = round(sum(values["tokens"] for values in seeds.values()) / len(seeds) / 1000)
        for seed, values in seeds.items():
            losses = {f"{name}: {kind}": values[f"{group}/loss_{kind}"]
                      for group, name in GROUPS.items() for kind in ("arithmetic", "words")}  # fmt: skip
            record.row(arm_losses=arm, seed=seed, **losses)
            record.row(arm_training=arm, seed=seed, updates=values["updates"], tokens_thousands=values["tokens"] / 1000,
                       mean_tokens_thousands=mean_tokens, loss=losses["new items: arithmetic"])  # fmt: skip


if __name__ == "__main__":
    main()
