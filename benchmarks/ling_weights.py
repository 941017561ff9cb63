"""What the shipped language model reaches: bits per byte of held-out text beside counting, and the curves of its training.

``python -m benchmarks.ling_weights --run runs/ling/tiny_long`` evaluates ``ling-tiny`` on the held-out text of each of its
sources (``configs/ling/tiny_long.yaml``: Python's standard library, and reference prose in English), sets interpolated Kneser-Ney
byte n-grams of the same training text beside it (:mod:`benchmarks.byte_ngram`), and draws the training and validation loss that
the run which made the weights has logged.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoo
from benchmarks.bfn_solvers import data_of
from benchmarks.byte_ngram import bits_per_byte
from benchmarks.ling_step import ORDERS, logged, text_of
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table

WEIGHTS, CONFIG = "ling-tiny", "ling/tiny_long"


@torch.inference_mode()
def evaluate(model: Any, loader: Any, batches: int | None) -> float:
    """Bits per byte of the windows of a loader, or of its first batches."""
    bits = num_bytes = 0.0
    for number, batch in enumerate(loader):
        if number == batches:
            break
        output = model.run_network(model.on_before_batch_transfer(batch, 0))
        bits += float(output.loss_BT.sum()) / math.log(2)
        num_bytes += float(batch["num_bytes"].sum())
    return bits / num_bytes


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ling_weights", description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of the run that made the weights, for the curves")
    parser.add_argument("--smoke", action="store_true", help="few batches and orders; the result is not kept")
    options = parser.parse_args(arguments)
    record = Record(
        "ling_weights",
        seeds=[0],
        smoke=options.smoke,
        tables=[Table("Bits per byte of held-out text", "model", ["bits_per_byte"], columns="source", digits=3)],
        plots=[Plot("Training of ling-tiny", "step", "curve_bits_per_byte", "curve", log="y")],
    )
    model = zoo.load(WEIGHTS).eval()
    data = data_of(CONFIG)
    data.validate_per_source = True
    orders = ORDERS[:1] if options.smoke else ORDERS
    train = np.concatenate([text_of(corpus.train) for corpus in data.corpora])
    for corpus, loader in zip(data.corpora, data.val_dataloader(), strict=True):
        bits = evaluate(model, loader, 2 if options.smoke else None)
        record.row(model=WEIGHTS, source=corpus.name, bits_per_byte=bits)
        for order, counted in bits_per_byte(train, text_of(corpus.val), orders).items():
            record.row(model=f"interpolated {order}-gram (Kneser-Ney)", source=corpus.name, bits_per_byte=counted)
        print(f"{corpus.name}: {bits:.3f} bits per byte", flush=True)
    if options.run is not None:
        for step, nats in logged(options.run, "train/ce"):
            record.row(curve="training, each batch", step=step + 1, curve_bits_per_byte=nats / math.log(2))
        for step, bits in logged(options.run, "val/bits_per_byte"):
            record.row(curve="validation", step=step + 1, curve_bits_per_byte=bits)
    return record.save()


if __name__ == "__main__":
    main()
