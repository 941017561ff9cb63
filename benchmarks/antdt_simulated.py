"""Straggler mitigation on a thousand workers that exist only as numbers: all of this is SIMULATED.

``python -m benchmarks.antdt_simulated`` drives the real controller, solvers and ledger of AntDT with modelled times: 1,000
workers take 1,500 steps of 100,000 samples, a second each if nobody is slow. Traces, whose intensities are ours, for the paper's
could not be obtained:

* ``shared``: each worker is 1.5 to 4 times slower for a minute every ten minutes, and 3 % are 3 to 6 times slower until they are
  restarted; so are 2 % of 100 parameter servers, each of which adds 0.2 s to a step. This stands for the paper's cluster.
* ``shared, no servers``, ``transient only``, ``persistent only``: parts of it;
* ``long transient``: episodes of five minutes, which look persistent and are not;
* ``mixed devices``: a quarter of the workers has devices that are three times slower, which no restart changes;
* ``noise``: nobody is slow, each step of each worker varies by 5 %.

In an arm without restarts, in lockstep, AntDT-ND is balancing alone, and LB-BSP is the published rule for that. ``own restarts``
stop the worker that is restarted (parameter servers), ``group restarts`` stop everybody (torchrun); a restart takes 60 s.
Both windows of AntDT-ND and that of LB-BSP are 10 s, as is the time between decisions. ASP has no steps, so that its samples are
worth less; it is shown for its time alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from strategies.antdt.control.solutions import LBBSP, AntDTND, BackupWorkersSolution, Oracle, Solution, StaticBSP
from strategies.antdt.simulation.simulator import ClusterSim, Mode, SimCluster
from strategies.antdt.simulation.slowness import SlownessModel

CALM = SlownessModel(transient_rate=0.0, persistent_share=0.0)
FULL, SMOKE = (
    SimCluster(workers=1000, local_batch=100, steps=1500, cost=0.01),
    SimCluster(workers=20, local_batch=10, steps=60, cost=0.1),
)


@dataclass(frozen=True)
class Trace:
    """How slow nodes are.

    Attributes:
        slowness: Of the workers.
        servers: Parameter servers for each worker.
        server_slowness: Of the servers.
        noise: Of a step's seconds.
    """

    slowness: SlownessModel
    servers: float = 0.0
    server_slowness: SlownessModel = CALM
    noise: float = 0.0


@dataclass(frozen=True)
class Arm:
    """A way to run the job.

    Attributes:
        make: A solution for a number of workers.
        mode: Lockstep or not.
        group_restart: Whether a restart stops everybody.
        decide_every: Seconds between decisions.
    """

    make: Callable[[int], Solution]
    mode: Mode = "bsp"
    group_restart: bool = False
    decide_every: float = 10.0


def nd(**options: Any) -> AntDTND:
    """AntDT-ND with a short window of ten seconds."""
    return AntDTND(window_transient=10.0, min_steps=1, **options)


TRACES = {
    "shared": Trace(SlownessModel(), 0.1, SlownessModel(persistent_share=0.02)),
    "shared, no servers": Trace(SlownessModel()),
    "transient only": Trace(SlownessModel(persistent_share=0.0)),
    "persistent only": Trace(SlownessModel(transient_rate=0.0, persistent_onset=600.0)),
    "long transient": Trace(SlownessModel(transient_rate=1 / 3000, transient_seconds=300.0, persistent_share=0.0)),
    "mixed devices": Trace(SlownessModel(transient_rate=0.0, persistent_share=0.0, slow_devices=0.25, device_factor=3.0)),
    "noise": Trace(CALM, noise=0.05),
}
STATIC, LB, ALONE = "BSP, static", "LB-BSP", "AntDT-ND without restarts"
ND, ND_GROUP = "AntDT-ND", "AntDT-ND, group restarts"
ARMS = {
    STATIC: Arm(lambda workers: StaticBSP(), decide_every=300.0),
    "backup workers, 5 %": Arm(lambda workers: BackupWorkersSolution(workers // 20)),
    LB: Arm(lambda workers: LBBSP(window=10.0)),
    ALONE: Arm(lambda workers: nd(kill_restart=False)),
    ND: Arm(lambda workers: nd()),
    ND_GROUP: Arm(lambda workers: nd(), group_restart=True),
    "AntDT-ND, group restarts, no gate": Arm(lambda workers: nd(cost_gate=False), group_restart=True),
    "oracle, each step": Arm(lambda workers: Oracle([1.0] * workers), decide_every=1e-9),
    "ASP, static shards": Arm(lambda workers: StaticBSP(), mode="asp_static", decide_every=300.0),
    "ASP, dynamic shards": Arm(lambda workers: AntDTND(), mode="asp"),
}
EVERYWHERE = (STATIC, LB, ALONE, ND, ND_GROUP)


def run(trace: str, arm: str, seed: int, cluster: SimCluster) -> dict[str, Any]:
    """The row of one simulation."""
    what, how = TRACES[trace], ARMS[arm]
    cluster = replace(cluster, servers=round(what.servers * cluster.workers), noise=what.noise)
    result = ClusterSim(
        cluster,
        how.make(cluster.workers),
        what.slowness,
        seed,
        mode=how.mode,
        server_slowness=what.server_slowness,
        group_restart=how.group_restart,
        decide_every=how.decide_every,
    ).run()
    assert result.ledger["done"] == cluster.steps * cluster.global_batch
    return {
        "trace": trace,
        "arm": arm,
        "seed": seed,
        "seconds": result.seconds,
        "steps": result.steps,
        "restarts": result.restarts,
        "of_use": result.helpful,
        "dropped_percent": 100 * result.dropped / result.ledger["done"],
        "waiting_percent": 100 * result.bubble,
        "decisions": result.decisions,
    }


def judge(record: Record) -> None:
    """Give the bars their values."""
    seconds = {(row["trace"], row["arm"], row["seed"]): float(row["seconds"]) for row in record.rows}  # type: ignore[arg-type]
    record.measure(
        "speed_over_static_bsp", statistics.median(seconds["shared", STATIC, s] / seconds["shared", ND, s] for s in record.seeds)
    )
    over = [
        seconds[trace, arm, seed] / seconds[trace, alone, seed]
        for trace in TRACES
        for seed in record.seeds
        for arm in (ND, ND_GROUP)
        for alone in (ALONE, LB)
    ]
    record.measure("nd_over_balancing_alone", max(over))


def main(argv: Sequence[str] | None = None) -> Path:
    """Simulate, print the tables, write the result; returns its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true", help="20 workers, one seed; the result is not kept")
    options = parser.parse_args(argv)
    seeds, cluster = ([0], SMOKE) if options.smoke else (options.seeds, FULL)
    record = Record(
        "antdt_simulated",
        seeds=seeds,
        smoke=options.smoke,
        tables=[
            Table("Simulated seconds to completion, 1,000 workers", index="arm", columns="trace", values=["seconds"], digits=0),
            Table("Simulated, the shared cluster", index="shared_arm", digits=1,
                  values=["seconds", "restarts", "of_use", "dropped_percent", "waiting_percent", "decisions"]),
        ],
        plots=[Plot("Simulated seconds to completion, 1,000 workers", x="trace_number", y="seconds", series="arm", log="y")],
    )  # fmt: skip
    jobs = [
        (trace, arm, seed)
        for trace in TRACES
        for arm in ARMS
        for seed in seeds
        if trace.startswith("shared") or arm in EVERYWHERE
    ]
    if options.smoke:
        rows = [run(*job, cluster) for job in jobs]
    else:
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            rows = list(pool.map(run, *zip(*jobs, strict=True), [cluster] * len(jobs)))
    for row in rows:
        record.row(
            **row,
            trace_number=list(TRACES).index(row["trace"]),
            **({"shared_arm": row["arm"]} if row["trace"] == "shared" else {}),
        )
    judge(record)
    return record.save()


if __name__ == "__main__":
    main()
