"""The benchmarks of simulated clusters: their bars, and that they run from end to end."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import antdt_replay as replay
from benchmarks import antdt_simulated as simulated
from benchmarks.record import Record
from strategies.antdt.simulation.simulator import ClusterSim, SimCluster


def test_bars_are_the_median_speed_and_the_worst_ratio() -> None:
    record = Record("antdt_simulated", seeds=[0, 1, 2])
    for trace in simulated.TRACES:
        for seed in record.seeds:
            for arm in simulated.EVERYWHERE:
                seconds = {simulated.STATIC: 300.0 + seed, simulated.ND: 100.0, simulated.ND_GROUP: 100.0}.get(arm, 110.0)
                if (trace, arm, seed) == ("noise", simulated.ND_GROUP, 2):
                    seconds = 121.0
                record.row(trace=trace, arm=arm, seed=seed, seconds=seconds)
    simulated.judge(record)
    speed, over = record.certificate()["bars"]
    assert speed["value"] == pytest.approx(3.01) and speed["holds"]
    assert over["value"] == pytest.approx(1.1) and not over["holds"]


@pytest.mark.slow
def test_smoke_run_simulates_every_arm_and_keeps_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = simulated.main(["--smoke"])
    assert path.is_relative_to("runs")
    result = json.loads(path.read_text())
    assert {(row["trace"], row["arm"]) for row in result["rows"]} >= {("shared", arm) for arm in simulated.ARMS}
    assert all(bar["value"] is not None for bar in result["bars"])
    times = {row["arm"]: row["seconds"] for row in result["rows"] if row["trace"] == "mixed devices"}
    assert times[simulated.STATIC] == pytest.approx(60 * 0.1 * 10 * 3)  # a quarter is three times slower


def test_replay_puts_a_job_beside_its_simulation(tmp_path: Path) -> None:
    """A log that the simulator wrote itself agrees with it in everything; one whose steps take longer does not."""
    job = replay.Job(seed=0, steps=120, batch=64, cost=0.01, interval=4)
    trace = tmp_path / "trace.jsonl"
    job.write_trace(trace)
    cluster = SimCluster(workers=4, local_batch=16, steps=120, cost=0.01, fixed=0.02, communication=0.03, shard_steps=4)
    result = ClusterSim(cluster, job.solution(replay.ND), str(trace), decide_every=job.interval).run()
    begins = [0.0, *(end for end, _ in result.timeline)]
    steps: list[dict[str, Any]] = [
        {
            "kind": "step",
            "step": step,
            "t": begin,
            "wall": end - begin,
            "bubble": 0.03,
            "bpt": [0.18] * 4,
            "n": [16] * 4,
            "version": 0,
        }
        for step, (begin, end) in enumerate(itertools.pairwise(begins))
    ]
    found = []
    for factor in (1.0, 1.25):
        log = [*({**step, "t": factor * step["t"]} for step in steps), *result.events]
        record = Record("antdt_replay", seeds=[0])
        row = replay.judge(record, job, replay.ND, log, replay.simulate(job, replay.ND, trace, steps))
        found.append(row)
        assert {cells["line"] for cells in record.rows if "line" in cells} == {"AntDT-ND, run", "AntDT-ND, simulated"}
    assert found[0]["error_percent"] == pytest.approx(0, abs=1e-9) and found[1]["error_percent"] == pytest.approx(-20)
    assert found[0]["decisions"] == found[0]["simulated_decisions"] > 1
    assert found[0]["intervals_apart"] == found[0]["batches_apart_percent"] == 0
