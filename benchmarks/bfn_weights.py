"""What the shipped Bayesian flow networks reach: likelihood of test data, and quality of their own sampler's samples.

``python -m benchmarks.bfn_weights`` loads each of the shipped weights, bounds the likelihood of test samples in continuous
time (bits per element, with the standard error over the samples), and draws with the model's own solver.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

import zoo
from benchmarks.bfn_solvers import FLOOR, HELD_OUT, ImageScores, TextScores, data_of, draw, mean_and_error
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.base.random import SampleRandom

CONFIGS = {
    "bfn-digits": "bfn/digits",
    "bfn-mnist": "bfn/mnist",
    "bfn-fashion": "bfn/fashion_mnist",
    "bfn-text": "bfn/text_small",
}
SAMPLES, BATCH = 500, 50
"""Test samples at most, and images that are drawn (of texts 64); how many at once."""


@torch.inference_mode()
def likelihood(model: Any, data: Any, count: int, seed: int) -> tuple[float, float]:
    """Bound on test samples spread evenly over the test set, bits per element: mean and standard error."""
    test = data.test_dataloader().dataset
    bounds = []
    for index_B in torch.arange(min(count, len(test))).split(BATCH):
        chosen = [test[int(index) * len(test) // min(count, len(test))] for index in index_B]
        x, random = model.encode(default_collate(chosen)), SampleRandom(seed, index_B)
        bounds.append(model.loss(x, random) + model.reconstruction(x, random))
    return mean_and_error(torch.cat(bounds) * next(iter(model.codec.units().values())))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bfn_weights", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few samples; the result is not kept")
    options = parser.parse_args(arguments)
    columns = ["bits_per_element", "standard_error", "sampler", "calls", "figure", "of_samples", "of_real_data"]
    record = Record("bfn_weights", seeds=[options.seed], smoke=options.smoke,
                    tables=[Table("Shipped weights", "weights", columns)])  # fmt: skip
    for name, config in CONFIGS.items():
        model: Any = zoo.load(name)
        data = data_of(config)
        bits, error = likelihood(model, data, 20 if options.smoke else SAMPLES, options.seed)
        text = name == "bfn-text"
        count = 10 if options.smoke else 64 if text else SAMPLES
        scores = TextScores(data, count, 8) if text else ImageScores(model, data, count)
        figure, real = ("spelling_accuracy", HELD_OUT) if text else ("distance", FLOOR)
        sampler = type(model.solver).names[0]
        samples, cost = draw(model, torch.arange(count), options.seed, sampler, model.solver.nfe, BATCH)
        record.row(weights=name, bits_per_element=bits, standard_error=error, sampler=sampler, calls=int(cost["calls"]),
                   figure="words spelled right, %" if text else f"feature distance, {count} samples",
                   of_samples=scores(samples)[figure], of_real_data=scores.baselines(options.seed)[real][figure])  # fmt: skip
    return record.save()


if __name__ == "__main__":
    main()
