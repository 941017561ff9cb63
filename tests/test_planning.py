"""zoo plan: predicted cost of partitions from a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from zoo.__main__ import main
from zoo.cli.plan_paro import JobPlan, ModelPlan

PAPER = """
cluster: {num_groups: 4, group_size: 8, inter_gbps: 80, intra_gbps: 2000, memory_gb: 80}
model: {parameters: 7.0e9}
job: {micro_batches: 10, collectives: flat}
"""


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PAPER)
    return path


def test_all_partitions_are_ranked_and_drawn(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paro", "-c", str(plan_file), "--plot", str(tmp_path / "plan.png")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert [row[0] for row in cells[:5]] == ["NNI", "NII", "INI", "IIG", "III"]
    assert len(cells) == 14
    assert cells[-1][0] == "NNN" and cells[-1][-1] == "no"  # 112 GB
    assert dict(zip([row[0] for row in cells], [row[1] for row in cells], strict=True))["GGG"] == "40.69"
    assert Image.open(tmp_path / "plan.png").size[0] > 400


def test_typed_options_win_over_the_file(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paro", "-c", str(plan_file), "--cluster.memory_gb", "3"]) == 0
    assert "None fits into 3 GB" in capsys.readouterr().out


def test_a_module_is_counted_without_being_built() -> None:
    job = JobPlan(micro_batches=2).build(ModelPlan(module={"class_path": "Ling", "init_args": {"config": "ling_plus"}}))
    assert 2.8e11 < job.parameters < 3e11
    assert job.num_trainable == job.parameters
    assert job.units == 88 + 2  # the layers, what else decays, and all gains
    assert job.root == 2 * 126464 * 5376 + (2 * 88 + 1) * 5376  # embedding and head, gains


def test_both_or_neither_of_numbers_and_module_are_refused() -> None:
    for model in (ModelPlan(), ModelPlan(parameters=1e6, module={"class_path": "Ling"})):
        with pytest.raises(ValueError, match=r"either model\.parameters, or model\.module"):
            JobPlan().build(model)


@pytest.mark.parametrize("words", [["plan"], ["plan", "everything"]])
def test_what_can_be_planned_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "zoo plan paro -c plan.yaml" in capsys.readouterr().err


def test_a_group_that_does_not_fit_is_no_cluster(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paro", "-c", str(plan_file), "--cluster.inter_gbps", "0"]) == 2
    assert "bandwidth=0.0 must be positive" in capsys.readouterr().err
