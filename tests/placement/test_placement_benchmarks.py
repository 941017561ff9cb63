"""The benchmarks of placements: their formulas, how the planner is judged, what is one function with what, and that they run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import placement, rollout, slow_link
from benchmarks.decode import check_equal
from benchmarks.placement import CONFIG, SEP
from benchmarks.record import Record
from zoo.ling import LingForCausalLM


def span(stage: str, begin: float, end: float, role: str = "actor") -> dict[str, Any]:
    return {"role": role, "stage": stage, "begin": begin, "end": end}


def ranks() -> list[dict[str, Any]]:
    """Two steps that begin at 10 and 20, of a rank that trains and one that generates and scores."""
    train = [span("train", 15, 16), span("chunk", 16, 17, "wait"), span("train", 17, 18), span("train", 25, 29)]
    infer = [span("generate", 10, 12), span("score", 13, 14), span("generate", 20, 22), span("score", 23, 25)]
    return [{"spans": spans, "begins": [10, 20]} for spans in (train, infer)]


def test_the_closed_formula_is_both_sides_and_the_bytes_over_the_link() -> None:
    # 3 or 4 seconds to train and 4 or 5 to generate and score, with the waits between.
    formula, compute = placement.closed_formula({"ranks": ranks()}, link_bytes=25e6)
    assert compute == 3.5 + 4.5 and formula == compute + 1
    assert placement.of_stages(ranks(), ("train",), steps=2) == 3


def test_bytes_of_a_rollout_are_those_of_its_numbers_and_of_what_is_trained() -> None:
    with torch.device("meta"):
        actor = LingForCausalLM(CONFIG)
    weights = sum(weight.numel() for weight in actor.parameters())
    head = CONFIG.vocab_size * CONFIG.hidden_size
    found = placement.expected_bytes(16, CONFIG, 4 * (2 * weights + CONFIG.hidden_size))
    assert found["broadcast"] == 2 * 4 * (2 * weights + CONFIG.hidden_size - head)
    assert found["all_to_all"] == 16 * (48 * 20 + 4) and found["send"] == 2 * found["all_to_all"] + found["broadcast"] / 2


def test_only_pairs_that_are_apart_judge_the_planner() -> None:
    seconds = {"a": [1.0, 1.1], "b": [2.0, 2.2], "c": [2.1, 2.3]}
    assert placement.pairs_right(seconds, {"a": 1, "b": 3, "c": 2}) == 1  # b and c tie, whatever is said of them
    assert placement.pairs_right(seconds, {"a": 2.5, "b": 3, "c": 2}) == 0.5
    assert placement.ratio({"a": [1, 2, 9], "b": [2, 2, 3]}, "a", "b") == 1


def test_the_timeline_is_drawn(tmp_path: Path) -> None:
    runs = [{"arm": SEP, "seconds": [9.0, 9.0], "ranks": ranks()}]
    assert placement.draw(runs, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_both_sides_of_generation_are_one_function() -> None:
    torch.manual_seed(0)
    ours = LingForCausalLM(placement.SMOKE.replace(eos_token_id=None)).eval()
    assert check_equal(ours, rollout.library_model(ours), torch.arange(12).view(2, 6)) < 1e-5


def test_what_cannot_be_measured_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(Record, "save", lambda self: self)
    record: Any = placement.main(["--scene", "2x2_200"])
    assert record.rows == [{"not_measured": "network namespaces need root"}]
    assert all(bar["value"] is None for bar in record.certificate()["bars"])


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--scene", "2x2_200"]])
def test_placements_are_measured(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words and (reason := slow_link.unavailable()):
        pytest.skip(f"not measured: {reason}")
    monkeypatch.chdir(tmp_path)
    path = placement.main(["--smoke", *words])
    bars = {bar["name"]: bar["value"] for bar in json.loads(path.read_text())["bars"]}
    assert bars.get("interleaving_difference", 0) == 0 and bars.get("separation_difference", 0) < 1e-6
    assert bars.get("bytes_off_the_formula", 0) == 0 and path.with_name(f"{path.stem}_timeline.png").exists()


@pytest.mark.slow
def test_rollouts_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bars = json.loads(rollout.main(["--smoke"]).read_text())["bars"]
    assert len(bars) == 3 and all(bar["value"] > 0 for bar in bars)
