"""The benchmarks of PaRO: what they compare with, how they judge the advisor, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ho_ring, paro, paro_memory, slow_link
from benchmarks.record import Record
from strategies.paro import CODES


def test_bytes_that_leave_a_group_have_their_formula() -> None:
    size = 16 * 2**20
    assert ho_ring.formula(ho_ring.OVERLAPPED, "all_gather", 2, 2, size) == size / 2
    assert ho_ring.formula(ho_ring.TWO_PHASE, "reduce_scatter", 4, 2, size) == size * 3 / 4
    assert ho_ring.formula(ho_ring.FLAT, "all_gather", 2, 2, size) == size * 3 / 4
    assert ho_ring.formula(ho_ring.FLAT, "all_reduce", 2, 4, size) == 2 * size * 7 / 8
    assert ho_ring.formula(ho_ring.GLOO, "all_gather", 2, 2, size) is None


def test_modelled_times_are_those_bytes_over_the_link() -> None:
    size, megabits = 16 * 2**20, 200.0
    for num_groups, group_size in (*ho_ring.GRIDS, *ho_ring.MODELLED):
        seconds = ho_ring.modelled(num_groups, group_size, size, megabits)
        for arm, value in seconds.items():
            leaving = ho_ring.formula(arm, "all_gather", num_groups, group_size, size)
            assert leaving is not None
            assert value == pytest.approx(leaving * 8 / megabits / 1e6, rel=1e-3)


def test_only_pairs_that_are_apart_judge_the_advisor() -> None:
    seconds = {"NNN": [1.0, 1.1], "IIG": [2.0, 2.2], "III": [2.1, 2.3], "GGG": [9.0, 9.5]}
    right = {"NNN": 0.5, "IIG": 1.5, "III": 1.2, "GGG": 3.0}
    assert paro.pairs_right(seconds, right) == (5, 5)  # IIG and III tie, whatever is said of them
    wrong = {"NNN": 0.5, "IIG": 1.5, "III": 1.5, "GGG": 1.0}
    assert paro.pairs_right(seconds, wrong) == (3, 5)


def test_the_advisor_is_told_what_the_engine_moves() -> None:
    job = paro.job_of(0.5, smoke=False)
    assert job.units == paro.CONFIG.num_hidden_layers + 2  # the layers; what else decays; all gains
    assert job.micro_batches == paro.MICRO_BATCHES
    assert job.parameters == paro.CONFIG.num_parameters()
    assert job.root == 2 * 264 * 256 + 256 + 2 * 256 * paro.CONFIG.num_hidden_layers


@pytest.mark.slow
def test_memory_of_every_code_is_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads(paro_memory.main([]).read_text())
    rows = {row["code"]: row for row in result["rows"]}
    assert set(rows) == set(CODES)
    for code, row in rows.items():
        assert row["off_formula"] == pytest.approx(0, abs=1e-3), code


def test_what_cannot_be_measured_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert slow_link.unavailable() == "network namespaces need root"
    monkeypatch.setattr(Record, "save", lambda self: self)
    for module in (ho_ring, paro):
        record: Any = module.main([])
        assert record.rows == [{"not_measured": "network namespaces need root"}]
        assert all(bar["value"] is None for bar in record.certificate()["bars"])


@pytest.mark.slow
@pytest.mark.parametrize("module", [ho_ring, paro])
def test_they_run_over_slow_links(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := slow_link.unavailable():
        pytest.skip(f"not measured: {reason}")
    monkeypatch.chdir(tmp_path)
    result = json.loads(module.main(["--smoke"]).read_text())
    assert len(result["rows"]) > 10
