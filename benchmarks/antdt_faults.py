"""Random kills over a training run under AntDT: what the final model was trained on, and how long recovery takes.

``python -m benchmarks.antdt_faults`` trains a small `XDeepFM` on real flights with torchrun (gloo, one thread a process), twice:
with group restarts, where torch elastic starts all of two processes again from the last checkpoint, and with hot restarts, where
the survivors of three live on and take a new process in. At random moments, drawn by the seed, a process is ended by SIGKILL:
one of the ranks, or the server that holds the ledger of samples.

What was trained is not asked of that server: each rank writes the indices of its samples to a file before each step, and the
lines are cut where later restarts have begun (`benchmarks.sample_trace`). Counted are the samples that any epoch of the final
trajectory used twice or left out. Shown besides: seconds from the kill to the next step (of a rank: of the new group; of the
server: until another one listens), and optimizer steps that were trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Record
from benchmarks.sample_trace import audit, read_traces
from benchmarks.tables import Table
from datamodules import Flights

GROUP, HOT = "group restart", "hot restart"
SERVER = -1  # in place of a rank


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        ranks: Processes.
        rows: Samples of an epoch.
        batch: Of an optimizer step.
        epochs: Of the run.
        every: Steps between checkpoints.
        kills: How many.
        seed: Of model, data and kills.
    """

    ranks: int
    rows: int
    batch: int
    epochs: int
    every: int
    kills: int
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps of an undisturbed run."""
        return self.epochs * math.ceil(self.rows / self.batch)


@dataclass(frozen=True)
class Kill:
    """One kill: of a rank or the `SERVER`, so many seconds after a step has been seen."""

    target: int
    step: int
    delay: float


def planned_kills(setting: Setting) -> list[Kill]:
    """Whom to kill when: uniform over steps and processes.

    >>> kills = planned_kills(Setting(ranks=2, rows=100, batch=10, epochs=2, every=5, kills=4, seed=0))
    >>> len(kills), all(0 <= kill.step < 20 and -1 <= kill.target < 2 for kill in kills)
    (4, True)
    """
    draw = random.Random(setting.seed)
    steps = sorted(draw.sample(range(setting.steps), setting.kills))
    return [Kill(draw.randrange(-1, setting.ranks), step, draw.uniform(0, 0.1)) for step in steps]


def command(arm: str, setting: Setting, folder: Path) -> list[str]:
    """What a user would type."""
    dims = list(Flights().field_dims)
    options: dict[str, Any] = {
        "model.field_dims": dims, "model.dropout": 0.0, "data.train_rows": setting.rows, "data.batch_size": 64,
        "data.num_workers": 0, "checkpoint.every_n_steps": setting.every, "ckpt_path": "last", "seed_everything": setting.seed,
        "trainer.default_root_dir": folder, "trainer.max_epochs": setting.epochs, "trainer.limit_val_batches": 2,
        "trainer.num_sanity_val_steps": 0, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false", "trainer.strategy": "AntDTStrategy",
        "trainer.strategy.global_batch_size": setting.batch, "trainer.strategy.heartbeat_timeout": 20,
    }  # fmt: skip
    if arm == HOT:
        options |= {"trainer.strategy.restart": "hot", "trainer.strategy.spares": setting.kills}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(setting.ranks), "--max-restarts",
        str(2 * setting.kills), "--monitor-interval", "0.1", "--master-port", str(port), "-m", "zoo", "fit", "-c", "ctr/flights",
        "--trainer.callbacks", "benchmarks.sample_trace.SampleTrace", "--trainer.callbacks.folder", str(folder / "trace"),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]  # fmt: skip


@dataclass
class Tail:
    """Reads what the ranks have written since it was asked last.

    Attributes:
        folder: Of the traces.
        pids: Of the ranks of the newest generation.
        generation: Its number.
        step: Newest step of the newest generation; -1 before its first.
    """

    folder: Path
    pids: dict[int, int] = field(default_factory=dict)
    generation: int = 0
    step: int = -1
    _read: dict[Path, int] = field(default_factory=dict)

    def look(self) -> None:
        """Take in new lines."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                content = file.read()
            whole = content.rfind(b"\n") + 1
            self._read[path] = self._read.get(path, 0) + whole
            for line in map(json.loads, content[:whole].splitlines()):
                self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if line["gen"] > self.generation:
            self.generation, self.step, self.pids = line["gen"], -1, {}
        if line["gen"] == self.generation and line["kind"] == "start":
            self.pids[line["rank"]] = line["pid"]
        elif line["gen"] == self.generation:
            self.step = max(self.step, line["step"])


@dataclass
class Outcome:
    """What a run has shown.

    Attributes:
        killed: Targets and times of the kills.
        lines: Of the traces.
        seconds: The run took.
        servers: Times at which another server listened, one for each kill of it.
    """

    killed: list[tuple[int, float]]
    lines: list[dict[str, Any]]
    seconds: float
    servers: list[float]

    def recoveries(self, server: bool) -> list[float]:
        """Seconds from each kill to the next step of a new group, or to another server."""
        if server:
            times = [when for target, when in self.killed if target == SERVER]
            return [back - when for when, back in zip(times, self.servers, strict=True)]
        first = {line["gen"]: line["t"] for line in reversed(self.lines) if line["kind"] == "step"}
        return [min(t for t in first.values() if t > when) - when for target, when in self.killed if target != SERVER]


def run(arm: str, setting: Setting, folder: Path, timeout: float) -> Outcome:
    """Train to the end, with kills.

    Raises:
        RuntimeError: Training has failed, or ended before all kills; the end of what it wrote is in the message.
        TimeoutError: It takes too long.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    tail, killed, servers = Tail(folder / "trace"), [], []
    begin = time.time()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command(arm, setting, folder),
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for kill in planned_kills(setting):
            while tail.step < kill.step or len(tail.pids) < setting.ranks:
                _check(process, folder, begin, timeout)
                time.sleep(0.01)
                tail.look()
            time.sleep(kill.delay)
            pid = _server(folder) if kill.target == SERVER else tail.pids[kill.target]
            os.kill(pid, signal.SIGKILL)
            killed.append((kill.target, time.time()))
            generation = tail.generation
            if kill.target == SERVER:
                while _server(folder) == pid:
                    _check(process, folder, begin, timeout)
                    time.sleep(0.01)
                servers.append(time.time())
            else:
                while tail.generation == generation:
                    _check(process, folder, begin, timeout)
                    time.sleep(0.01)
                    tail.look()
            print(f"{arm}: {len(killed)} kills, step {tail.step}, {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
        while process.poll() is None:
            _check(process, folder, begin, timeout)
            time.sleep(0.1)
        if process.returncode:
            raise RuntimeError(f"{arm}: torchrun ended with status {process.returncode}:\n{_end(folder)}")
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.wait(60)
    return Outcome(killed, read_traces(folder / "trace"), time.time() - begin, servers)


def _server(folder: Path) -> int:
    """Process of the server; that of the former one while there is none."""
    return int(json.loads((folder / "antdt" / "server.json").read_text())["pid"])


def _check(process: subprocess.Popen[bytes], folder: Path, begin: float, timeout: float) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"torchrun ended early, with status {process.returncode}:\n{_end(folder)}")
    if time.time() - begin > timeout:
        raise TimeoutError(f"the run takes more than {timeout:g} s:\n{_end(folder)}")


def _end(folder: Path) -> str:
    return (folder / "log.txt").read_text(errors="replace")[-3000:]


def row(arm: str, setting: Setting, outcome: Outcome) -> dict[str, Any]:
    """The result of a run."""
    found = audit(outcome.lines, setting.rows, setting.epochs)
    of_ranks, of_server = outcome.recoveries(server=False), outcome.recoveries(server=True)
    return {
        "arm": arm, "seed": setting.seed, "ranks": setting.ranks, "kills": len(outcome.killed), "of_ranks": len(of_ranks),
        "of_server": len(of_server),
        "duplicates": found.duplicates, "missing": found.missing, "steps": found.steps, "steps_expected": setting.steps,
        "recovery_seconds": statistics.median(of_ranks) if of_ranks else None, "slowest": max(of_ranks, default=None),
        "server_seconds": statistics.median(of_server) if of_server else None, "steps_redone": found.redone,
        "seconds": outcome.seconds,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.antdt_faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=[GROUP, HOT], default=[GROUP, HOT])
    parser.add_argument("--keep", type=Path, help="a folder for logs and traces, to look at")
    parser.add_argument("--smoke", action="store_true", help="two kills of two processes; the result is not kept")
    options = parser.parse_args(arguments)
    setting = Setting(ranks=2, rows=12_000, batch=256, epochs=30, every=20, kills=options.kills, seed=options.seed)
    if options.smoke:
        setting = Setting(ranks=2, rows=4_000, batch=256, epochs=8, every=10, kills=2, seed=options.seed)
    settings = {GROUP: setting, HOT: setting if options.smoke else replace(setting, ranks=3)}
    counts = ["ranks", "kills", "of_ranks", "of_server", "duplicates", "missing", "steps", "steps_redone"]
    times = ["recovery_seconds", "slowest", "server_seconds", "seconds"]
    title = f"Random kills of ranks and the server in {setting.steps} steps"
    tables = [Table(title, "arm", counts, digits=0), Table("Seconds to recover", "arm", times, digits=2)]
    record = Record("antdt_faults", seeds=[setting.seed], tables=tables, smoke=options.smoke)
    for arm in options.arms:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) if options.keep is None else options.keep / arm.partition(" ")[0]
            place.mkdir(parents=True, exist_ok=True)
            record.row(**row(arm, settings[arm], run(arm, settings[arm], place, timeout=1800.0)))
    rows = record.rows
    record.measure("random_kills", min(int(row["kills"] or 0) for row in rows))
    record.measure("duplicates", sum(int(row["duplicates"] or 0) for row in rows))
    record.measure("missing", sum(int(row["missing"] or 0) for row in rows))
    return record.save()


if __name__ == "__main__":
    main()
