"""The layer's benchmark: all arms are one function, a wrong one is not timed, and bars come from the right rows."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import moe_layer
from benchmarks.record import Record

CASE = moe_layer.SMOKE[0]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BTD, seed_BTD = (torch.randn(1, CASE.tokens, CASE.hidden, generator=generator) for _ in range(2))
    return x_BTD.requires_grad_(), seed_BTD


def test_all_arms_give_the_same_output_and_gradients() -> None:
    arms = moe_layer.layers(CASE, "cpu")
    sizes = {name: sum(parameter.numel() for parameter in arm.parameters()) for name, arm in arms.items()}
    assert len(set(sizes.values())) == 1
    apart = moe_layer.agree(CASE, arms, *inputs())
    assert set(apart) == {moe_layer.OURS, moe_layer.MASKED, moe_layer.SORTED, moe_layer.TRANSFORMERS}
    assert all(value < 1e-5 for value in apart.values())
    assert all(parameter.grad is None for arm in arms.values() for parameter in arm.parameters())


@pytest.mark.parametrize("arm", [moe_layer.MASKED, moe_layer.TRANSFORMERS])
def test_an_arm_that_differs_is_not_timed(arm: str) -> None:
    arms = moe_layer.layers(CASE, "cpu")
    parameter = next(parameter for name, parameter in arms[arm].named_parameters() if "down_proj" in name)
    with torch.no_grad():
        parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match=f"{arm} differs from ours by .* nothing is timed"):
        moe_layer.agree(CASE, arms, *inputs())


def test_floating_point_operations_are_those_of_the_parameters_that_a_token_uses() -> None:
    arms = moe_layer.layers(CASE, "cpu")
    used = 0.0
    for name, parameter in arms[moe_layer.OURS].named_parameters():
        share = CASE.chosen / CASE.experts if "moe.experts" in name else 1
        used += share * parameter.numel()
    assert CASE.flops == pytest.approx(6 * CASE.tokens * used)


def test_bars_are_the_least_gain_over_the_sizes_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gains = {
        64: {moe_layer.MASKED: 0.5, moe_layer.TRANSFORMERS: 1.1},
        512: {moe_layer.MASKED: 3.0, moe_layer.TRANSFORMERS: 1.3},
        2048: {moe_layer.MASKED: 2.0, moe_layer.TRANSFORMERS: 1.2},
        1024: {moe_layer.MASKED: 4.0, moe_layer.TRANSFORMERS: 1.4},
    }
    monkeypatch.setattr(moe_layer, "measure", lambda record, case, *_: gains[case.tokens])
    monkeypatch.setattr(Record, "save", lambda self: self)
    record = moe_layer.main([])
    assert {bar["name"]: bar["value"] for bar in record.certificate()["bars"]} == {  # type: ignore[attr-defined]
        "over_masked_loop": 2.0,
        "over_transformers": 1.1,
    }


def test_it_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads(moe_layer.main(["--smoke"]).read_text())
    assert all(bar["value"] > 0 for bar in result["bars"])
    assert {row["arm"] for row in result["rows"] if "arm" in row} == {
        moe_layer.OURS, moe_layer.MASKED, moe_layer.SORTED, moe_layer.TRANSFORMERS
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        moe_layer.main(["--device", "cuda"])
    assert "torch sees no GPU here" in capsys.readouterr().err
