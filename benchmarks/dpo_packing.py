"""A step of preference training on packed pairs against the same pairs padded.

``python -m benchmarks.dpo_packing`` draws pairs whose prompts and answers have log-normal lengths in bytes (medians 32 and 96,
cut at 511), as answers of language models have roughly; for several spreads, since padding is what packing saves. The
`ling_tiny` network and another as its reference take training steps (both forward passes and the backward pass, without the
optimizer) on batches of 8 pairs that the DataModule `Preferences` makes, packed and padded in turns. The benchmark stops if the
losses differ, which is judged in float64: in float32 a router now and then breaks a near tie the other way. The figures are the
median over batches of the paired ratio of times, and the share of places that hold padding. Without spread nothing is saved,
and what remains is the price of longer rows: attention over all of a row, most of it masked, which weighs much in a network as
narrow as this.

Claim: 3.7 times faster (arXiv 2503.05139, section 4.2), for lengths and rows that are not given.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bfn_solvers import now
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Preferences
from zoo.ling import LingDPO, preset

SPREADS = (0.0, 0.5, 1.0)
MEDIANS = {"prompt": 32, "chosen": 96, "rejected": 96}
SEQ_LEN, PAIRS = 512, 8
TOLERANCE = 1e-10
PADDED, PACKED = "padded", "packed"


def rows_of(count: int, spread: float, seed: int = 0) -> list[dict[str, str]]:
    """Rows of random letters.

    Args:
        count: How many.
        spread: Standard deviation of the logarithm of lengths.
        seed: Of lengths and letters.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        row = {}
        for name, median in MEDIANS.items():
            length = round(median * math.exp(spread * float(torch.randn((), generator=generator))))
            length = min(max(length, 8), SEQ_LEN // 4 if name == "prompt" else SEQ_LEN * 3 // 4 - 1)
            row[name] = bytes(torch.randint(97, 123, (length,), generator=generator).tolist()).decode()
        rows.append(row)
    return rows


def batches_of(folder: Path, rows: list[dict[str, str]], packed: bool, pairs: int) -> list[dict[str, Tensor]]:
    """The rows as batches, in the same order packed and padded."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Preferences(path=path, val_fraction=0.0, seq_len=SEQ_LEN, batch_size=pairs, seed=0, packed=packed)
    return list(data.train_dataloader())


def padding_of(batches: Sequence[dict[str, Tensor]]) -> float:
    """Share of places without an id."""
    masks = [value for batch in batches for name, value in batch.items() if name.endswith("attention_mask")]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def step(model: LingDPO, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Seconds and loss of forward and backward."""
    model.zero_grad()
    begin = now()
    loss: Any = model.training_step(batch, 0)
    loss.backward()
    return now() - begin, float(loss.detach())


def measure(record: Record, model: LingDPO, exact: LingDPO, folder: Path, spread: float, count: int, pairs: int) -> None:
    """Add the rows of one spread of lengths.

    Args:
        record: For the rows.
        model: That is timed.
        exact: The same in float64.
        folder: For the data.
        spread: Standard deviation of the logarithm of lengths.
        count: Batches.
        pairs: Of a batch.

    Raises:
        RuntimeError: The losses differ.
    """
    rows = rows_of(count * pairs, spread)
    arms = {name: batches_of(folder, rows, name == PACKED, pairs) for name in (PADDED, PACKED)}
    case = f"spread {spread:g}"
    for batches in arms.values():
        step(model, batches[0])  # allocates
    for name, batches in arms.items():
        record.row(layout=name, layout_case=case, padding=padding_of(batches))
    for number in range(count):
        losses = {name: step(exact, batches[number])[1] for name, batches in arms.items()}
        if not math.isclose(losses[PACKED], losses[PADDED], rel_tol=TOLERANCE):
            raise RuntimeError(f"The losses are {losses}: nothing is compared.")
        taken = {}
        for name in (PADDED, PACKED) if number % 2 == 0 else (PACKED, PADDED):
            taken[name], _ = step(model, arms[name][number])
        record.row(case=case, batch=number, padded_over_packed=taken[PADDED] / taken[PACKED],
                   padded_ms=1000 * taken[PADDED], packed_ms=1000 * taken[PACKED])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpo_packing", description=__doc__)
    parser.add_argument("--batches", type=int, default=9, help="batches of each spread")
    parser.add_argument("--smoke", action="store_true", help="few batches; the result is not kept")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    record = Record(
        "dpo_packing",
        seeds=[0],
        smoke=options.smoke,
        tables=[
            Table("Preference training, 8 pairs a step: time padded over packed", "case",
                  ["padded_over_packed", "padded_ms", "packed_ms"]),
            Table("Share of padding", "layout_case", ["padding"], columns="layout"),
        ],
    )  # fmt: skip
    torch.manual_seed(0)
    config = preset("ling_tiny").replace(initializer_range=0.1)  # so that different answers have different losses
    model = LingDPO(config=config)
    model._keep(LingDPO(config=config).network)
    exact = copy.deepcopy(model).double()
    exact._keep(copy.deepcopy(model._reference[0]).double())
    with tempfile.TemporaryDirectory() as folder:
        for spread in SPREADS[-1:] if options.smoke else SPREADS:
            count, pairs = (2, 2) if options.smoke else (options.batches, PAIRS)
            measure(record, model, exact, Path(folder), spread, count, pairs)
    return record.save()


if __name__ == "__main__":
    main()
