"""Masks find the tokens that an answer needs: a planted keypoint, and two sums in a row among words that say nothing.

``python -m benchmarks.kpod_keypoints`` trains `zoo.kpod.token_weighter.MaskLearner` on examples of which hardly any repeats, and
reads the weights of 512 new ones. *Planted keypoint:* no question, and ten random tokens, one of which stands for the answer, one
of eight; relaxed masks, and straight-through masks beside them. *Two sums:* ``a + b = c`` and ``c + d = e`` modulo ten, each
with ``+``, ``-`` or ``*``, and random words before, between and behind them; the question is ``a + b + d`` with its operators,
the answer ``e``. The bars take the worst seed of the planted keypoint and the default seed of the sums, all of whose seeds are
in the table. Two processes share the runs, each with one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.base.random import SampleRandom
from zoo.kpod.token_weighter import MaskLearner, PrefixSamples, divide_rows
from zoo.lm import HFBackbone

EVERY, BATCH, HEAD_LR = 100, 32, 1e-3
NUMBERS = ("left", "right", "result")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """Examples and the training on them.

    Attributes:
        draw: Makes a batch of examples from their numbers and a seed, with ``kinds`` (B, S), the kind of each token.
        kinds: Names of the kinds.
        width: Of the predictor.
        layers: Of the predictor.
        warmup: Steps without masks.
        ramp: Steps over which alpha grows.
        steps: All steps.
        alpha: Price of a kept token.
        lr: Of the predictor.
        prefixes: Prefixes of an example and step.
    """

    draw: Callable[[Tensor, int], Batch]
    kinds: tuple[str, ...]
    width: int
    layers: int
    warmup: int
    ramp: int
    steps: int
    alpha: float
    lr: float
    prefixes: PrefixSamples


def rows(question: Tensor, rationale: Tensor, answer: Tensor, kinds: Tensor) -> Batch:
    """A batch as the DataModule Rationales gives it, from parts of equal lengths."""
    ids = torch.cat([question, rationale, answer], 1)
    labels = ids.clone()
    labels[:, : question.shape[1]] = -100
    steps, kind = torch.full_like(ids, -1), torch.full_like(ids, -1)
    middle = slice(question.shape[1], question.shape[1] + rationale.shape[1])
    steps[:, middle], kind[:, middle] = 0, kinds
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "step_ids": steps, "kinds": kind}


def planted(index: Tensor, seed: int) -> Batch:
    """Ten tokens, ids 16 to 31, one of which is a key of 8 to 15 that stands for the answer of 0 to 7."""
    random = SampleRandom(seed, index, epoch=-2)
    answer, place = random.integers("answer", 8), random.integers("place", 10)
    kinds = torch.nn.functional.one_hot(place, 10)
    rationale = torch.where(kinds.bool(), 8 + answer[:, None], 16 + random.integers("filler", 16, (10,)))
    return rows(rationale[:, :0], rationale, answer[:, None], 1 - kinds)


def sums(index: Tensor, seed: int) -> Batch:
    """Two sums, differences or products modulo ten: digits are ids 0 to 9, operators 10 to 12, ``=`` 13, words 14 to 31."""
    random = SampleRandom(seed, index, epoch=-2)
    a, b, d = random.integers("numbers", 10, (3,)).unbind(1)
    one, two = random.integers("operators", 3, (2,)).unbind(1)
    c = torch.stack([a + b, a - b, a * b]).gather(0, one[None])[0] % 10
    e = torch.stack([c + d, c - d, c * d]).gather(0, two[None])[0] % 10
    words = 14 + random.integers("words", 18, (6,))
    one, two, equals = 10 + one, 10 + two, torch.full_like(a, 13)
    parts = [words[:, 0], words[:, 1], a, one, b, equals, c, words[:, 2], words[:, 3], c, two, d, equals, e,
             words[:, 4], words[:, 5]]  # fmt: skip
    kinds = torch.tensor([5, 5, 0, 3, 1, 4, 2, 5, 5, 0, 3, 1, 4, 2, 5, 5]).expand(len(index), -1)
    return rows(torch.stack([a, one, b, two, d], 1), torch.stack(parts, 1), e[:, None], kinds)


TASKS = {
    "planted": Task(planted, ("key", "filler"), 32, 1, warmup=200, ramp=200, steps=1200, alpha=0.5, lr=3e-3, prefixes=1),
    "sums": Task(sums, (*NUMBERS, "operator", "equals", "filler"), 48, 2, warmup=700, ramp=1, steps=1200, alpha=0.1, lr=1e-3,
                 prefixes="all"),
}  # fmt: skip


def train(name: str, seed: int, hard: bool, steps: int | None) -> list[dict[str, float]]:
    """Train masks on a task; mean weights by kind of token every hundred steps and at the end, ``answer`` (nats), ``step``.

    Args:
        name: Of the task.
        seed: Of weights and examples.
        hard: Whether masks are straight-through.
        steps: Another number of steps; None: the task's.
    """
    torch.set_num_threads(1)
    task = TASKS[name]
    config = {"model_type": "llama", "vocab_size": 32, "hidden_size": task.width, "intermediate_size": 4 * task.width,
              "num_hidden_layers": task.layers, "num_attention_heads": 4, "num_key_value_heads": 4,
              "max_position_embeddings": 64, "initializer_range": 0.1}  # fmt: skip
    torch.manual_seed(seed)
    learner = MaskLearner(HFBackbone(config, seed=seed), hard=hard)
    groups = [
        {"params": list(learner.predictor.parameters()), "lr": task.lr},
        {"params": [learner.mask_embedding, *learner.head.parameters()], "lr": HEAD_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    held_out, found = task.draw(torch.arange(512), -1 - seed), []
    num_steps = steps or task.steps
    for step in range(num_steps + 1):
        if step % EVERY == 0 or step == num_steps:
            found.append({"step": step, **measured(learner, held_out, task.kinds)})
        if step < num_steps:
            index = torch.arange(BATCH * step, BATCH * (step + 1))
            alpha = task.alpha * max(0.0, min(1.0, (step - task.warmup + 1) / max(1, task.ramp)))
            rows, random = divide_rows(task.draw(index, seed)), SampleRandom(seed, index)
            loss = learner(rows, random, task.prefixes, masked=step >= task.warmup)
            (loss.answer_B + alpha * loss.kept_B).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


@torch.no_grad()
def measured(learner: MaskLearner, batch: Batch, kinds: Sequence[str]) -> dict[str, float]:
    """Mean weights by kind of token, and the cross-entropy of answers when nothing is masked."""
    rows = divide_rows(batch)
    found = learner(rows, SampleRandom(0, torch.arange(len(rows.ids_BP)), epoch=-1), "all", masked=False)
    kind_BP = batch["kinds"][:, : found.weight_BP.shape[1]]
    weights = {name: float(found.weight_BP[kind_BP == number].mean()) for number, name in enumerate(kinds)}
    return {**weights, "answer": float(found.answer_B.mean())}


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kpod_keypoints", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--smoke", action="store_true", help="a few steps; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = range(1 if options.smoke else options.seeds)
    record = Record(
        "kpod_keypoints",
        seeds=seeds,
        smoke=options.smoke,
        tables=[
            Table("Planted keypoint: mean weights", "masks", ["key", "filler", "answer"], digits=3),
            Table("Two sums: mean weights", "seed_of_sums", [*TASKS["sums"].kinds, "numbers_over_fillers", "answer"], digits=3),
        ],
        plots=[Plot("Mean weights of tokens while masks are learned", x="step", y="weight", series="kind")],
    )
    begin = time.perf_counter()
    arms = [(name, seed, hard) for name, hard in (("sums", False), ("planted", False), ("planted", True)) for seed in seeds]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        runs = {arm: pool.submit(train, *arm, 4 if options.smoke else None) for arm in arms}
        ends = {arm: run.result()[-1] for arm, run in runs.items()}
    for (name, seed, hard), end in ends.items():
        masks = "straight-through" if hard else "relaxed"
        for found in runs[name, seed, hard].result():
            for kind in TASKS[name].kinds:
                shown = f"planted, {masks}: {kind}" if name == "planted" else f"sums: {kind}"
                record.row(step=found["step"], weight=round(found[kind], 4), kind=shown, seed=seed)
        if name == "planted":
            record.row(masks=masks, seed=seed, **{key: end[key] for key in ("key", "filler", "answer")})
        else:
            end["numbers_over_fillers"] = sum(end[kind] for kind in NUMBERS) / len(NUMBERS) / end["filler"]
            record.row(seed_of_sums=seed, **{key: value for key, value in end.items() if key != "step"})
    relaxed = [ends["planted", seed, False] for seed in seeds]
    record.measure("planted_key", min(end["key"] for end in relaxed))
    record.measure("planted_filler", max(end["filler"] for end in relaxed))
    record.measure("numbers_over_fillers", ends["sums", 0, False]["numbers_over_fillers"])
    record.measure("minutes", (time.perf_counter() - begin) / 60)
    return record.save()


if __name__ == "__main__":
    main()
