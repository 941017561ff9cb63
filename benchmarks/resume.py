"""Kill a training run with SIGKILL in the middle of an epoch, type the command again, and compare with an undisturbed run.

``python -m benchmarks.resume`` trains the default digits configuration for a few epochs, once undisturbed and once killed at
random moments, and draws both loss curves for the guide on checkpoints.
"""

from __future__ import annotations

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from zoo.base.checkpoint import read_checkpoint

PICTURE = ROOT / "docs" / "pictures" / "resume.png"


def command(folder: Path, steps: int) -> list[str]:
    """The command that is typed, and typed again."""
    return [sys.executable, "-m", "zoo", "fit", "-c", "bfn/digits", "--ckpt_path", "last", "--data.num_workers", "2",
            "--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "7",
            "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(folder)]  # fmt: skip


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and their training losses, row by row of ``metrics.csv``."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row["train_loss"])) for row in csv.DictReader(file) if row.get("train_loss")]


def last_step(folder: Path) -> int:
    """The last step that the log shows; -1 if none."""
    return max((step for step, _ in losses(folder)), default=-1)


def run(folder: Path, steps: int, kills: Sequence[int]) -> list[int]:
    """Type the command until it is done; kill it once the log shows each of the given steps. Returns where it died."""
    died = []
    for kill in [*kills, None]:
        process = subprocess.Popen(command(folder, steps), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if kill is not None and last_step(folder) >= kill:
                process.send_signal(signal.SIGKILL)
                process.wait()
                died.append(last_step(folder))
            else:
                time.sleep(0.01)
        if kill is None and process.returncode:
            raise SystemExit(f"the training command failed with status {process.returncode}.")
    if len(died) < len(kills):
        raise SystemExit(f"the run ended by itself after {len(died)} of {len(kills)} kills: nothing is shown; take more steps.")
    return died


def weights(folder: Path) -> torch.Tensor:
    """All numbers of the last checkpoint: weights, averages."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    states = (checkpoint["state_dict"], checkpoint.get("current_model_state", {}))
    return torch.cat([tensor.double().flatten() for state in states for tensor in state.values()])


def compare(undisturbed: list[tuple[int, float]], resumed: list[tuple[int, float]], steps: int) -> float:
    """Largest difference between two logs of the steps 0 to ``steps`` - 1, each of which must stand there once and in order."""
    for name, log in (("undisturbed", undisturbed), ("resumed", resumed)):
        if [step for step, _ in log] != list(range(steps)):
            raise SystemExit(f"the {name} run did not log each of {steps} steps once: {[step for step, _ in log]}.")
    return max(abs(a - b) for (_, a), (_, b) in zip(undisturbed, resumed, strict=True))


def draw(undisturbed: list[tuple[int, float]], resumed: list[tuple[int, float]], died: list[int]) -> None:
    """Both curves on each other, and where the run was killed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*undisturbed, strict=True), color="0.75", linewidth=5, label="never interrupted")
    axes.plot(*zip(*resumed, strict=True), color="C0", linewidth=1.2, label="killed, and continued by the same command")
    for step in died:
        axes.axvline(step, color="C3", linestyle=":", label="kill -9" if step == died[0] else None)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--kills", type=int, default=2, help="how often the run is killed")
    parser.add_argument("--smoke", action="store_true", help="a short trial that leaves the results alone")
    options = parser.parse_args(arguments)
    steps = 20 if options.smoke else options.steps
    columns = ["kills", "steps", "largest_loss_difference", "largest_weight_difference"]
    table = Table("Killed by SIGKILL and continued, against never interrupted", "run", columns, digits=1)
    record = Record("resume", seeds=[0], tables=[table], smoke=options.smoke)
    kills = sorted(random.Random(0).sample(range(8, steps - 4), 1 if options.smoke else options.kills))
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        run(whole, steps, [])
        died = run(cut, steps, kills)
        undisturbed, resumed = losses(whole), losses(cut)
        difference = compare(undisturbed, resumed, steps)
        record.row(run=f"killed at steps {', '.join(map(str, died))}", kills=len(died), steps=steps,
                   largest_loss_difference=difference,
                   largest_weight_difference=(weights(whole) - weights(cut)).abs().max().item())  # fmt: skip
        record.measure("largest_loss_difference", difference)
        if not options.smoke:
            draw(undisturbed, resumed, died)
    return record.save()


if __name__ == "__main__":
    main()
