"""The benchmark of the BFN solvers: equal-quality calls, time inside the network, and a run from end to end."""

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.bfn_solvers import FLOOR, PUBLISHED_GRID, SAMPLERS, NetworkClock, calls_at_distance, main


@given(power=st.floats(0.2, 3.0), scale=st.floats(0.1, 1000.0), calls=st.floats(5.0, 100.0))
def test_interpolation_is_exact_for_a_power_law(power: float, scale: float, calls: float) -> None:
    curve = {nfe: scale * nfe**-power for nfe in (5, 10, 20, 50, 100)}
    assert calls_at_distance(curve, scale * calls**-power) == pytest.approx(calls, rel=1e-9)


def test_nothing_is_extrapolated() -> None:
    curve = {5: 8.0, 10: 4.0, 20: 2.0}
    assert calls_at_distance(curve, 100.0) == 5.0
    assert calls_at_distance(curve, 1.0) is None


def test_first_crossing_counts_where_a_curve_is_not_monotone() -> None:
    assert calls_at_distance({5: 8.0, 10: 2.0, 20: 4.0, 50: 1.0}, 2.0) == pytest.approx(10.0)


def test_clock_counts_the_time_inside_the_network_only() -> None:
    class Busy(nn.Module):
        def forward(self, seconds: float) -> float:
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                pass
            return seconds

    network, outside = Busy(), Busy()
    with NetworkClock().watch([network]) as clock:
        network(0.02)
        outside(0.1)
        network(0.03)
    network(0.1)
    assert clock.calls == 2
    assert 0.05 <= clock.seconds < 0.1


def test_smoke_run_measures_every_sampler_and_keeps_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # restored afterwards: seed_everything sets them for the whole process
    path = main(["--data", "digits", "--smoke"])
    assert path == Path("runs/benchmarks/bfn_solvers_digits.json")
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row.get("distance") is not None]
    published = {f"{sampler}, published grid" for sampler in PUBLISHED_GRID}
    assert {row["sampler"] for row in rows} == {*SAMPLERS, *published, FLOOR}
    assert len({row["distance"] for row in rows}) == 2 * len([*SAMPLERS, *published]) + 1
    assert [bar["name"] for bar in result["bars"] if bar["value"] is None] == ["fewer_calls_at_equal_quality"]
    assert torch.get_default_dtype() == torch.float32
