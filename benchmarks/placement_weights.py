"""The weights that PPO trains under every placement, by the commands of the card: ``python -m benchmarks.placement_weights``.

``torchrun --nproc-per-node N -m zoo fit -c rlhf/ppo_vader -c strategies/...`` trains six rollouts from the shipped weights on
one, two and four processes; in the last rows a run is saved under one plan after three rollouts and continued under another.
Checkpoints hold whole models, which are compared. Whether rollouts are equal is seen from their logged lengths, ends and scores.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.lm_tuning import column
from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from zoo.base.checkpoint import read_checkpoint

FLAT, INTER, SEP = (f"strategies/{name}" for name in ("flattening", "interleaving", "separation"))
CHUNKS = ["--trainer.strategy.chunks", "4"]
#: Name, processes, words of the command.
ARMS: list[tuple[str, int, list[str]]] = [
    ("one process", 1, []),
    *((f"{name}, {ranks} ranks", ranks, ["-c", config])
      for ranks in (2, 4) for name, config in (("flattening", FLAT), ("interleaving", INTER), ("separation", SEP))),
    ("separation in 4 chunks, 2 ranks", 2, ["-c", SEP, *CHUNKS]),
    ("separation in 4 chunks, 4 ranks", 4, ["-c", SEP, *CHUNKS]),
]  # fmt: skip
#: The same for runs that are continued: the words of both halves.
MOVED = [
    ("flattening on 2, then separation on 4", (2, ["-c", FLAT]), (4, ["-c", SEP])),
    ("separation on 4, then one process", (4, ["-c", SEP]), (1, [])),
]
STEPS = 24


def train(folder: Path, ranks: int, words: Sequence[str], steps: int) -> None:
    """Run, or continue, a training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "zoo", "fit", "-c", "rlhf/ppo_vader", *words, "--trainer.max_steps", str(steps),
               "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def result(folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Trained weights, and what was logged of the rollouts."""
    state = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    logged = [value for name in ("length", "ended", "score") for _, value in column(folder, f"train/{name}")]
    return {name: value for name, value in state.items() if name.startswith(("actor.", "critic."))}, logged


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of two states."""
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def same(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether logged means are equal; those of chunks are added in another order."""
    return len(values) == len(others) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(values, others, strict=True))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement_weights", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two rollouts and few arms; the result is not kept")
    options = parser.parse_args(arguments)
    steps, arms, moved = (8, ARMS[:4], []) if options.smoke else (STEPS, ARMS, MOVED)
    record = Record(
        "placement_weights",
        seeds=[0],
        smoke=options.smoke,
        tables=[
            Table("Weights after six rollouts", "plan", ["from_one_process", "from_flattening", "rollouts_equal"], digits=9),
        ],
    )
    found: dict[str, tuple[dict[str, Tensor], list[float]]] = {}
    inter, others = [0.0], [0.0]
    with tempfile.TemporaryDirectory() as name:
        for arm, ranks, words in arms:
            folder = Path(name) / arm.replace(" ", "_")
            train(folder, ranks, words, steps)
            found[arm] = result(folder)
        for arm, first, second in moved:
            folder = Path(name) / arm.replace(" ", "_")
            train(folder, *first, steps // 2)
            train(folder, *second, steps)
            found[arm] = result(folder)
    one, logged = found["one process"]
    for arm, (weights, values) in found.items():
        flat = found.get(f"flattening,{arm.rpartition(',')[2]}")
        from_flat = None if flat is None else apart(weights, flat[0])
        row = {"plan": arm, "from_one_process": apart(weights, one), "from_flattening": from_flat}
        record.row(**row, rollouts_equal=None if "then" in arm else int(same(values, logged)))
        if from_flat is not None and arm.startswith("interleaving"):
            inter.append(from_flat)
        others.append(apart(weights, one))
    record.measure("interleaving_from_flattening", max(inter))
    record.measure("from_one_process", max(others))
    return record.save()


if __name__ == "__main__":
    main()
