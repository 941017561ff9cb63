"""The benchmark of simulated clusters: its bars, and that it runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import antdt_simulated as simulated
from benchmarks.record import Record


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


def test_smoke_run_simulates_every_arm_and_keeps_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = simulated.main(["--smoke"])
    assert path.is_relative_to("runs")
    result = json.loads(path.read_text())
    assert {(row["trace"], row["arm"]) for row in result["rows"]} >= {("shared", arm) for arm in simulated.ARMS}
    assert all(bar["value"] is not None for bar in result["bars"])
    times = {row["arm"]: row["seconds"] for row in result["rows"] if row["trace"] == "mixed devices"}
    assert times[simulated.STATIC] == pytest.approx(60 * 0.1 * 10 * 3)  # a quarter is three times slower
