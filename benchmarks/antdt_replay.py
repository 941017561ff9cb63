"""Whether the simulator tells the truth: jobs that were run, and the same jobs simulated from their traces of slowness.

``python -m benchmarks.antdt_replay`` draws traces (time, process, slowdown) and trains a small `XDeepFM` on real flights with
four processes (gloo), which the traces slow down by sleep (an emulation, see `benchmarks.antdt`), with equal batches and with
AntDT-ND. `ClusterSim` then replays each job: the same trace, solution and decision interval. Of the real job it is told what
a step costs beside the emulated seconds (of a worker, and of communication), as measured in the calm beginning of the job, and
how many steps lie between a decision and the first step by it.

Shown are the completion times, and for AntDT-ND how the decisions agree: the job's and the simulation's are put side by side in
their order, and the farthest two are apart by so many decision intervals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from benchmarks.antdt import ND, RANKS, data_and_model
from benchmarks.antdt_timeline import read_events, steps_of
from benchmarks.gloo_processes import run_group
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from strategies import AntDTStrategy
from strategies.antdt import AntDTND, Solution, StaticBSP
from strategies.antdt.control.actions import AdjustBatch
from strategies.antdt.simulation.inject import TraceInjector
from strategies.antdt.simulation.simulator import ClusterSim, SimCluster, SimResult

STATIC = "equal batches"
SKIPPED = 5  # first steps, which are slower


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        seed: Of the trace, of weights and of the order.
        steps: Optimizer steps.
        batch: Samples of a step on all processes.
        cost: Seconds of a sample on a process that is not slow.
        interval: Steps between two decisions.
        calm: Seconds until the first may be slow.
        episode: Mean seconds for which one is slow.
        pause: Mean seconds for which it is not.
    """

    seed: int
    steps: int
    batch: int
    cost: float
    interval: int
    calm: float = 3.0
    episode: float = 5.0
    pause: float = 10.0

    def solution(self, arm: str) -> Solution:
        """The solution of an arm."""
        if arm == STATIC:
            return StaticBSP()
        return AntDTND(window_transient=8, window_persistent=64, unit="steps", min_steps=6, kill_restart=False)

    def write_trace(self, path: Path) -> None:
        """Draw when which process is slow: times between episodes and their lengths exponential, factors uniform."""
        lines = []
        for rank in range(RANKS):
            drawn = torch.Generator().manual_seed(1000 * self.seed + rank)
            time = self.calm
            while time < 600:
                pause, length = torch.empty(2).exponential_(generator=drawn).tolist()
                time += self.pause * pause
                factor = 2 + 3 * torch.rand((), generator=drawn).item()
                lines.append({"time": round(time, 3), "node": f"worker:{rank}", "slowdown": round(factor, 3)})
                time += self.episode * length
                lines.append({"time": round(time, 3), "node": f"worker:{rank}", "slowdown": 1.0})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(folder: str, of: dict[str, Any], arm: str, trace: str) -> list[dict[str, Any]]:
    """Train on this process as one of the group; returns the log on rank 0."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    job = Job(**of)
    data, model = data_and_model(job.seed, job.batch, job.steps)
    strategy = AntDTStrategy(
        job.solution(arm), server="inprocess", decide_every=job.interval, report_every=2,
        injector=TraceInjector(trace, job.cost), shard_steps=4,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    dist.barrier()
    trainer.fit(model, datamodule=data)
    return [] if dist.get_rank() else read_events(Path(folder) / "antdt" / "events.jsonl")


def simulate(job: Job, arm: str, trace: Path, log: Sequence[dict[str, Any]]) -> SimResult:
    """The same job, simulated.

    Args:
        job: The job.
        arm: Its arm.
        trace: How slow its processes were.
        log: Of the job.
    """
    real, first = steps_of(log), {}
    for step in real:
        first.setdefault(step["version"], step["step"])
    lags = [first[line["version"]] - line["step"] for line in log if line.get("action") and line["version"] in first]
    lag = round(statistics.median(lags)) if lags else 0
    calm = [step for step in real[SKIPPED:] if step["t"] + step["wall"] < real[0]["t"] + job.calm]
    if not calm:
        raise RuntimeError(f"No step of the job lies in its calm {job.calm} s after the first {SKIPPED}.")
    fixed = statistics.median(t - job.cost * n for step in calm for t, n in zip(step["bpt"], step["n"], strict=True))
    cluster = SimCluster(
        workers=RANKS, local_batch=job.batch // RANKS, steps=job.steps, cost=job.cost, fixed=max(0.0, fixed),
        communication=statistics.median(step["bubble"] for step in calm), shard_steps=4, lag=lag,
    )  # fmt: skip
    return ClusterSim(cluster, job.solution(arm), str(trace), decide_every=job.interval).run()


def decisions_in(log: Sequence[dict[str, Any]]) -> list[tuple[int, list[int]]]:
    """Steps at which batches were decided, and which."""
    return [(line["step"], line["payload"]["batch"]) for line in log if line.get("action") == AdjustBatch.kind]


def judge(record: Record, job: Job, arm: str, log: Sequence[dict[str, Any]], simulated: SimResult) -> dict[str, Any]:
    """A row, and for the first seed the steps for the picture; returns the row."""
    real = steps_of(log)
    seconds = real[-1]["t"] - real[0]["t"]  # until the last step that is logged begins
    expected = simulated.timeline[real[-1]["step"] - 1][0]
    theirs, ours = decisions_in(log), decisions_in(simulated.events)
    pairs = list(zip(theirs, ours, strict=False))
    moved = [sum(abs(n - m) for n, m in zip(one, other, strict=True)) / 2 for (_, one), (_, other) in pairs]
    row: dict[str, Any] = {
        "case": arm, "seed": job.seed, "seconds": seconds, "simulated_seconds": expected,
        "error_percent": 100 * (expected / seconds - 1), "decisions": len(theirs), "simulated_decisions": len(ours),
        "intervals_apart": max((abs(one - other) / job.interval for (one, _), (other, _) in pairs), default=None),
        "batches_apart_percent": 100 * max(moved) / job.batch if moved else None,
    }  # fmt: skip
    record.row(**row)
    if job.seed == min(record.seeds):
        ends = [0.0, *(end for end, _ in simulated.timeline)]
        for step, (begin, end) in enumerate(itertools.pairwise(ends)):
            record.row(step=step, line=f"{arm}, simulated", milliseconds=1e3 * (end - begin))
        for line in real[SKIPPED:-1]:
            record.row(step=line["step"], line=f"{arm}, run", milliseconds=1e3 * line["wall"])
    return row


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.antdt_replay", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=256, help="samples of a step on all processes")
    parser.add_argument("--cost", type=float, default=0.5e-3, help="seconds of a sample")
    parser.add_argument("--interval", type=int, default=4, help="steps between two decisions")
    parser.add_argument("--smoke", action="store_true", help="a few steps of one job; the result is not kept")
    options = parser.parse_args(arguments)
    seeds, steps = ([0], 40) if options.smoke else (list(range(options.seeds)), options.steps)
    record = Record(
        "antdt_replay", seeds=seeds, smoke=options.smoke,
        tables=[
            Table(
                f"Jobs of {steps} steps on four processes, run (emulated) and simulated", "case",
                ["seconds", "simulated_seconds", "error_percent", "decisions", "simulated_decisions", "intervals_apart",
                 "batches_apart_percent"], digits=2,
            )
        ],
        plots=[Plot("Time of a step, in the job and simulated", "step", "milliseconds", "line")],
    )  # fmt: skip
    rows = []
    for seed, arm in itertools.product(seeds, (STATIC, ND)):
        job = Job(seed, steps, options.batch, options.cost, options.interval)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.jsonl"
            job.write_trace(trace)
            log = run_group(RANKS, run, asdict(job), arm, str(trace))
            rows.append(judge(record, job, arm, log, simulate(job, arm, trace, log)))
        print(f"seed {seed}, {arm}: {rows[-1]}", file=sys.stderr, flush=True)
    record.measure("replay_error", max(abs(row["error_percent"]) for row in rows) / 100)
    balanced = [row for row in rows if row["case"] == ND]
    record.measure("replay_decisions_apart", max((row["intervals_apart"] or 0.0 for row in balanced), default=None))
    record.measure("replay_decisions_unlike", sum(abs(row["decisions"] - row["simulated_decisions"]) for row in balanced))
    return record.save()


if __name__ == "__main__":
    main()
