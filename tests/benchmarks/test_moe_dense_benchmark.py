"""The benchmark of experts against dense layers: what is equal between its arms, and a run from end to end."""

import json
from pathlib import Path

import pytest

from benchmarks.moe_dense import DENSE, EXPERTS, WIDE, arms, main


def test_arms_are_of_equal_active_width_or_equal_size() -> None:
    configs = arms(smoke=False)
    experts = configs[EXPERTS]
    assert (experts.num_experts, experts.num_experts_per_tok, experts.num_shared_experts) == (16, 3, 1)
    assert (experts.hidden_size, experts.num_hidden_layers) == (128, 4)
    routers = experts.num_hidden_layers * experts.num_experts * experts.hidden_size
    assert configs[DENSE].num_parameters() == experts.num_parameters(active=True) - routers
    assert configs[WIDE].num_parameters() == experts.num_parameters() - routers
    assert configs[DENSE].flops_per_token(256) == experts.flops_per_token(256) - 6 * routers
    assert configs[WIDE].flops_per_token(256) > 2 * experts.flops_per_token(256)


@pytest.mark.slow
def test_smoke_run_trains_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = main(["--smoke"])
    assert path == Path("runs/benchmarks/moe_dense.json") and path.with_suffix(".png").exists()
    rows = [row for row in json.loads(path.read_text())["rows"] if "arm" in row]
    assert [row["arm"] for row in rows] == [EXPERTS, DENSE, WIDE]
    assert all(2 < row["bits_per_byte"] < 8.2 and row["tokens_per_second"] > 0 for row in rows)
