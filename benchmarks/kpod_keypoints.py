"""Masks find the tokens that an answer needs: a planted keypoint, and sums of two steps among words that say nothing.

``python -m benchmarks.kpod_keypoints`` trains `zoo.kpod.token_weighter.MaskLearner` on examples that never repeat, without a
question but for the numbers of the sums, and reads the weights of new examples. *Planted keypoint:* ten random tokens, one of
which stands for the answer, one of eight; relaxed masks, and straight-through masks beside them. *Sums of two steps:*
``a + b = c`` and ``c + d = e`` (mod 10) with random words before, between and behind them; the question holds ``a b d``.
The bars take the worst seed of the planted keypoint, and the default seed of the sums, all of whose seeds are in the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.base.random import SampleRandom
from zoo.kpod.token_weighter import MaskLearner, area_under_curve, divide_rows
from zoo.lm import HFBackbone

EVERY = 100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """Examples and the training on them.

    Attributes:
        draw: Makes a batch of examples from their numbers and a seed, with ``kinds`` (B, S), the kind of each token.
        kinds: Names of the kinds.
        vocabulary: Number of ids.
        width: Of the predictor.
        layers: Of the predictor.
        warmup: Steps without masks.
        ramp: Steps over which alpha grows.
        steps: All steps.
        alpha: Price of a kept token.
        lr: Of the predictor.
        head_lr: Of the weights.
    """

    draw: Callable[[Tensor, int], Batch]
    kinds: tuple[str, ...]
    vocabulary: int
    width: int
    layers: int
    warmup: int
    ramp: int
    steps: int
    alpha: float
    lr: float
    head_lr: float


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
    kinds = torch.tensor([5, 5, 0, 1, 2, 3, 4, 5, 5, 0, 1, 2, 3, 4, 5, 5]).expand(len(index), -1)
    return rows(torch.stack([a, one, b, two, d], 1), torch.stack(parts, 1), e[:, None], kinds)


TASKS = {
    "planted": Task(planted, ("key", "filler"), 32, 32, 1, 200, 200, 1200, 0.5, 3e-3, 1e-3),
    "sums": Task(sums, ("left", "operator", "right", "equals", "result", "filler"), 32, 48, 2, 700, 0, 1200, 0.1, 1e-3, 1e-3),
}


def train(task: Task, seed: int, hard: bool, report: Callable[[int, dict[str, float]], None]) -> dict[str, float]:
    """Train masks; mean weights by kind of token, on 512 examples that training has not seen."""
    config = {"model_type": "llama", "vocab_size": task.vocabulary, "hidden_size": task.width,
              "intermediate_size": 4 * task.width, "num_hidden_layers": task.layers, "num_attention_heads": 4,
              "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1}  # fmt: skip
    torch.manual_seed(seed)
    student = HFBackbone(config, seed=seed)
    learner = MaskLearner(student, hard=hard)
    head = [learner.mask_embedding, *learner.head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": list(learner.predictor.parameters())}, {"params": head, "lr": task.head_lr}], lr=task.lr, weight_decay=0.0
    )
    held_out = task.draw(torch.arange(512), -1 - seed)

    def measured() -> dict[str, float]:
        divided = divide_rows(held_out)
        with torch.no_grad():
            found = learner(divided, SampleRandom(seed, torch.arange(512), epoch=-1), "all", masked=False)
        kinds, weight = held_out["kinds"][:, : found.weight_BP.shape[1]], found.weight_BP
        means = {name: float(weight[kinds == number].mean()) for number, name in enumerate(task.kinds)}
        return {**means, "answer": float(found.answer_B.mean())}

    for step in range(task.steps):
        if step % EVERY == 0:
            report(step, measured())
        index = torch.arange(32 * step, 32 * step + 32)
        ramp = max(0.0, min(1.0, (step - task.warmup + 1) / max(1, task.ramp)))
        found = learner(divide_rows(task.draw(index, seed)), SampleRandom(seed, index), 1, masked=step >= task.warmup)
        (found.answer_B + task.alpha * ramp * found.kept_B).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return measured()
