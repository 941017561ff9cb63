"""The benchmark of a training step compares equal networks, and takes the small run's figures from its log."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ling_step
from benchmarks.record import Record

CASE = ling_step.smoke_case()
ARMS = [ling_step.OURS, ling_step.MASKED, ling_step.SORTED, ling_step.TRANSFORMERS]


def test_all_arms_are_the_same_network() -> None:
    ids_BT = ling_step.batch_of(CASE, "cpu")
    arms = {name: ling_step.make(name, CASE, "cpu") for name in ARMS}
    sizes = {name: sum(parameter.numel() for parameter in arm.model.parameters()) for name, arm in arms.items()}
    gates = CASE.config.num_hidden_layers * CASE.config.hidden_size  # of the library's shared experts
    assert sizes.pop(ling_step.TRANSFORMERS) - gates == sizes[ling_step.OURS]
    assert len(set(sizes.values())) == 1
    entropies = [float(arm.step(ids_BT)) for arm in arms.values()]
    assert entropies == pytest.approx([entropies[0]] * len(arms), rel=1e-5)


def test_a_step_trains_and_leaves_no_gradient() -> None:
    ids_BT = ling_step.batch_of(CASE, "cpu")
    for name in ARMS:
        arm = ling_step.make(name, CASE, "cpu")
        before = [parameter.detach().clone() for parameter in arm.model.parameters()]
        arm.step(ids_BT)
        moved = [not torch.equal(old, new) for old, new in zip(before, arm.model.parameters(), strict=True)]
        assert all(moved)
        assert all(parameter.grad is None for parameter in arm.model.parameters())


def test_shared_experts_of_several_units_are_compared_too() -> None:
    case = ling_step.Case("two", CASE.config.replace(num_shared_experts=2), 2, 16)
    ids_BT = ling_step.batch_of(case, "cpu")
    entropies = [float(ling_step.make(name, case, "cpu").step(ids_BT)) for name in (ling_step.OURS, ling_step.TRANSFORMERS)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)


def test_an_arm_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    make = ling_step.make

    def another(name: str, case: ling_step.Case, device: str) -> ling_step.Arm:
        arm = make(name, case, device)
        if name == ling_step.SORTED:
            with torch.no_grad():
                arm.model.network.lm_head.weight[0].mul_(30)  # type: ignore[union-attr, operator, index]
        return arm

    monkeypatch.setattr(ling_step, "make", another)
    for timed in (ling_step.time_in_turns, ling_step.time_one_by_one):
        with pytest.raises(RuntimeError, match=r"sorted loop has a cross-entropy of .* nothing is timed"):
            timed(CASE, ARMS, "cpu", 1)


def test_it_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads(ling_step.main(["--smoke"]).read_text())
    assert {row["arm"] for row in result["rows"]} == set(ARMS)
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])


def test_the_small_run_is_compared_with_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 20, dtype=np.uint8)
    ids = np.append(text.astype(np.int64), 257)  # as files of ids hold it, with what ends a document
    corpus = SimpleNamespace(train=SimpleNamespace(tokens=ids), val=SimpleNamespace(tokens=ids[:100]))
    monkeypatch.setattr(ling_step, "data_of", lambda config: SimpleNamespace(corpora=[corpus]))
    monkeypatch.setattr(Record, "save", lambda self: self)

    def fit(folder: Path, seed: int, smoke: bool) -> float:
        (folder / "metrics.csv").write_text("step,train/loss,val/bits_per_byte\n0,5.0,\n9,,0.9\n19,,0.03\n")
        return 2.5 + seed

    monkeypatch.setattr(ling_step, "fit", fit)
    record: Any = ling_step.tiny([0, 1], smoke=True)
    grams = {row["model"]: row["bits_per_byte"] for row in record.rows if "model" in row and "seed" not in row}
    assert len(grams) == 4
    bars = {bar["name"]: bar["value"] for bar in record.certificate()["bars"]}
    assert bars["bits_per_byte_below_3_gram"] == pytest.approx(grams["interpolated 3-gram (Kneser-Ney)"] - 0.03)
    assert bars["fit_minutes"] == 3.5


def test_a_run_that_fails_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,5.0\n")
    with pytest.raises(RuntimeError, match="logged no val/bits_per_byte"):
        ling_step.logged(tmp_path, "val/bits_per_byte")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_named_for_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ling_step.main(["--device", "cuda"])
    assert "torch sees no GPU here" in capsys.readouterr().err
