"""zoo simulate: solutions compared on a simulated cluster, from a YAML file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from strategies.antdt.control.solutions import AntDTND
from zoo.__main__ import main
from zoo.cli.configs import packaged_configs
from zoo.cli.simulate import Arm

SMALL = """
cluster: {workers: 20, local_batch: 10, steps: 100, cost: 0.1}
slowness: {persistent_share: 0.1, transient_rate: 0}
arms:
  BSP: {solution: {class_path: StaticBSP}}
  balanced: {solution: {class_path: AntDTND, init_args: {window_transient: 10, min_steps: 1}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "simulate.yaml"
    path.write_text(SMALL)
    return path


def lines(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in cells}


def test_arms_are_compared_and_drawn(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "-c", str(file), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    rows = lines(text)
    assert "SIMULATED: 20 workers" in text
    assert rows["BSP"][1] == "1.00x" and float(rows["balanced"][1].removesuffix("x")) > 2
    for picture in ("completion.png", "timeline.png"):
        assert Image.open(tmp_path / "out" / picture).size[0] > 400
    decisions = [json.loads(line) for line in (tmp_path / "out" / "balanced.jsonl").read_text().splitlines()]
    assert decisions and sum(decisions[0]["payload"]["batch"]) == 200


def test_a_recorded_trace_takes_the_place_of_the_model(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,node,slowdown\n0,worker:3,2.0\n")
    assert main(["simulate", "-c", str(file), "--trace", str(trace)]) == 0
    assert lines(capsys.readouterr().out)["BSP"][0] == "200"  # a hundred steps of two seconds


def test_typed_options_win_over_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["simulate", "-c", str(file), "--cluster.steps", "7", "--slowness.persistent_share", "0", "--seeds", "[0, 1]"]) == 0
    )
    text = capsys.readouterr().out
    assert "7 steps of 200 samples; medians of 2 seeds" in text and lines(text)["BSP"][0] == "7"


def test_the_packaged_comparison_runs_at_a_smaller_size(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--cluster.workers", "60", "--cluster.servers", "4", "--cluster.steps", "20"]
    assert main(["simulate", "-c", "antdt/simulate_1000", *small]) == 0
    names = yaml.safe_load(packaged_configs()["antdt/simulate_1000"].read_text())["arms"]
    assert list(lines(capsys.readouterr().out)) == list(names)


OWN = """
from strategies.antdt.control.solutions import AntDTND

class Mine(AntDTND):
    def decide(self, view, now):
        return []
"""


def test_own_solutions_are_found_in_the_current_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_solution.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file.write_text(SMALL.replace("AntDTND", "my_solution.Mine"))
    assert main(["simulate", "-c", str(file)]) == 0
    rows = lines(capsys.readouterr().out)
    assert rows["balanced"][0] == rows["BSP"][0]


def test_each_run_has_a_solution_of_its_own() -> None:
    arm = Arm(AntDTND(lambda_transient=1.3))
    first, second = arm.make(), arm.make()
    assert first is not second and isinstance(first, AntDTND) and first.lambda_transient == 1.3


def test_unknown_solutions_are_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SMALL.replace("AntDTND", "AntDTDN"))
    with pytest.raises(SystemExit):
        main(["simulate", "-c", str(file)])
    assert "AntDTDN" in capsys.readouterr().err


def test_nothing_to_compare_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--cluster.workers", "4"]) == 2
    assert "give arms" in capsys.readouterr().err


def test_numbers_out_of_range_are_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "-c", str(file), "--cluster.workers", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
