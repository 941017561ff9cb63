"""Commands of the zoo, typed by benchmarks, and what their runs have logged."""

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import ROOT

__all__ = ["column", "run", "run_with_kill", "zoo", "zoo_here"]


def zoo(verb: str, config: str, folder: Path, *more: str) -> list[str]:
    """A command of the zoo, whose runs lie in a folder."""
    return [sys.executable, "-m", "zoo", verb, "-c", config, "--trainer.default_root_dir", str(folder),
            "--trainer.enable_progress_bar", "false", *more]  # fmt: skip


def column(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a column of a run's ``metrics.csv``."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def zoo_here(command: list[str]) -> None:
    """Run a command of the zoo in this process, which has read the packages already.

    Raises:
        SystemExit: With the end of its output, if it fails.
    """
    from zoo.__main__ import main as zoo_main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        failed = zoo_main(command[3:])
    if failed:
        raise SystemExit(f"{' '.join(command[2:])}\n{output.getvalue()[-3000:]}")


def run(command: list[str], threads: int | None = None) -> float:
    """Seconds of a command.

    Args:
        command: The command.
        threads: Threads of torch; None: as many as there are cores.

    Raises:
        SystemExit: With the end of its output, if it fails.
    """
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])}\n{done.stdout[-3000:]}")
    return time.perf_counter() - begin


def run_with_kill(command: list[str], folder: Path, step: int) -> int:
    """Kill a command once its log shows a step, and type it again; returns the last step that was logged before."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(found >= step for found, _ in column(folder, "train/loss")):
        if process.poll() is not None:
            raise SystemExit("the training ended before it could be killed: nothing is shown.")
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    died = max(found for found, _ in column(folder, "train/loss"))
    run(command)
    return died
