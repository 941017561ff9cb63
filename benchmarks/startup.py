"""Start-up time of ``zoo``: beside a bare LightningCLI with the same classes, and of the verbs that need no torch.

``python -m benchmarks.startup`` runs each command in a process of its own. ``zoo fit --print_config`` and the bare command line
alternate, so that a busy moment meets both; the bar is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from zoo.base.hyperparameters import read_config

BARE = """
from lightning.pytorch.cli import LightningCLI
from datamodules import Digits
from zoo.bfn import BFN
LightningCLI(BFN, Digits, subclass_mode_model=True, subclass_mode_data=True, auto_configure_optimizers=False)
"""
LIGHT = ("--help", "--version", "list")


def seconds_of(command: Sequence[str], folder: Path) -> float:
    """Wall time of a command that must succeed, in seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(pairs: int, record: Record) -> None:
    """Run each command ``pairs`` times, after one run that fills the caches of files and of byte code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digits = read_config(ROOT / "configs" / "bfn" / "digits.yaml")
        (folder / "pair.yaml").write_text(yaml.safe_dump({section: digits[section] for section in ("model", "data")}))
        words = ["fit", "-c", "pair.yaml", "--print_config"]
        zoo = [sys.executable, "-m", "zoo"]
        commands = {"zoo fit --print_config": [*zoo, *words], "bare LightningCLI": [sys.executable, "-c", BARE, *words]}
        ratios = []
        for pair in range(-1, pairs):
            order = list(commands) if pair % 2 else list(reversed(commands))
            times = {name: seconds_of(commands[name], folder) for name in order}
            if pair >= 0:
                ratios.append(times["zoo fit --print_config"] / times["bare LightningCLI"])
                for name, seconds in times.items():
                    record.row(command=name, pair=pair, seconds=seconds)
        for option in LIGHT:
            for pair in range(pairs):
                record.row(command=f"zoo {option}", pair=pair, seconds=seconds_of([*zoo, option], folder))
    record.measure("print_config_over_bare", statistics.median(ratios))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write ``results/startup.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=11, help="runs of each command")
    parser.add_argument("--smoke", action="store_true", help="one pair; nothing is written among the results")
    options = parser.parse_args(argv)
    record = Record("startup", seeds=[0], tables=[Table("Start-up", "command", ["seconds"])], smoke=options.smoke)
    measure(1 if options.smoke else options.pairs, record)
    record.save()


if __name__ == "__main__":
    main()
