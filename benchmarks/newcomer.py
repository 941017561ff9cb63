"""What a newcomer meets: ``make demo`` or ``make test`` on a fresh clone, with nothing cached, timed.

``python -m benchmarks.newcomer demo`` clones the committed tree into a temporary folder, makes its environment from
nothing (no package cache, no asset cache), runs the command and judges its outcome. The network must be reachable.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from zoo.base.samples import to_uint8
from zoo.metrics import classifier_agreement
from zoo.module import ZooModule


def run_in_fresh_clone(target: str, folder: Path) -> tuple[float, int, str]:
    """``make <target>`` in a clone below ``folder``; returns minutes, exit status and what it printed."""
    clone = folder / "clone"
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment |= {"LIGHTNING_ZOO_CACHE": str(folder / "assets"), "PIP_NO_CACHE_DIR": "1"}
    begin = time.perf_counter()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    make = subprocess.Popen(
        ["make", target], cwd=clone, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = []
    assert make.stdout is not None
    for line in make.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return (time.perf_counter() - begin) / 60, make.wait(), "".join(lines)


def demo(folder: Path) -> Record:
    """Time ``make demo`` and let the shipped classifier look at the samples of the model that it trained."""
    record = Record(
        "demo",
        seeds=[0],
        tables=[
            Table("make demo on a fresh clone", "command", ["minutes", "digits_seen", "mean_max_probability"]),
            Table("Feature distance after make demo", "sampler", ["distance"], columns="nfe"),
        ],
    )
    minutes, status, _ = run_in_fresh_clone("demo", folder)
    if status:
        raise SystemExit(f"make demo failed with status {status}.")
    run = folder / "clone" / "runs" / "bfn" / "digits"
    model = ZooModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    with torch.inference_mode():
        images = to_uint8(model.sample(torch.arange(100)).images)  # type: ignore[operator]
    seen = classifier_agreement(images, "fd_digits_mlp")
    record.row(command="make demo", minutes=minutes, digits_seen=len(seen.classes),
               mean_max_probability=seen.mean_max_probability)  # fmt: skip
    quality = json.loads((run / "sample_quality.json").read_text())
    for row in quality["rows"]:
        record.row(sampler=row["sampler"], nfe=row["nfe"], distance=row["frechet_distance"])
    for nfe in dict.fromkeys(row["nfe"] for row in quality["rows"]):
        record.row(sampler="real data (floor)", nfe=nfe, distance=quality["floor"]["frechet_distance"])
    record.measure("demo_minutes", minutes)
    record.measure("digits_among_100_samples", len(seen.classes))
    record.measure("mean_maximal_probability", seen.mean_max_probability)
    return record


def count_outcomes(output: str) -> dict[str, int]:
    """Counts of pytest's last line.

    Example:
        >>> count_outcomes("... 1 failed, 20 passed, 2 skipped in 61.20s (0:01:01) ...")
        {'failed': 1, 'passed': 20, 'skipped': 2}
    """
    words = ("failed", "passed", "skipped", "errors", "error", "deselected", "xfailed")
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last) if word in words}


def test_suite(folder: Path) -> Record:
    """Time ``make test``, environment and assets included."""
    columns = ["minutes", "passed", "failed", "skipped"]
    record = Record("test_suite", seeds=[0], tables=[Table("make test on a fresh clone", "command", columns)])
    minutes, status, output = run_in_fresh_clone("test", folder)
    counts = count_outcomes(output)
    failures = counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0)
    record.row(command="make test", minutes=minutes, passed=counts.get("passed", 0), failed=failures,
               skipped=counts.get("skipped", 0))  # fmt: skip
    record.measure("test_minutes", minutes)
    record.measure("test_minutes_second_house", minutes)
    if counts:
        record.measure("test_failures", max(failures, int(status != 0)))
    return record


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.newcomer", description=__doc__)
    parser.add_argument("target", choices=["demo", "test"])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = (demo if options.target == "demo" else test_suite)(Path(folder))
    return record.save()


if __name__ == "__main__":
    main()
