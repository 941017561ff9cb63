"""The shipped language model is scored as validation scores it, and its curves come from the run's log."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from benchmarks import ling_weights
from datamodules import Text
from zoo.ling import Ling, preset


@pytest.fixture
def data(tmp_path: Path) -> Text:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"text number {number} " * 20)
    return Text(sources={str(folder): 1.0}, seq_len=32, batch_size=4, val_fraction=0.3)


def test_bits_per_byte_are_those_of_validation(data: Text) -> None:
    torch.manual_seed(0)
    model = Ling(preset("ling_tiny").replace(num_hidden_layers=1, num_experts=4))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (metrics,) = trainer.validate(model, data, verbose=False)
    assert ling_weights.evaluate(model.eval(), data.val_dataloader(), None) == pytest.approx(
        metrics["val/bits_per_byte"], rel=1e-5
    )


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Text) -> None:
    data.prepare_data()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ling_weights, "data_of", lambda config: data)
    (tmp_path / "metrics.csv").write_text("step,train/ce,val/bits_per_byte\n9,1.0,\n19,0.5,\n19,,0.9\n")
    result = json.loads(ling_weights.main(["--smoke", "--run", str(tmp_path)]).read_text())
    curves = {(row["curve"], row["step"]): row["curve_bits_per_byte"] for row in result["rows"] if "curve" in row}
    assert curves == {
        ("training, each batch", 10): pytest.approx(1 / math.log(2)),
        ("training, each batch", 20): pytest.approx(0.5 / math.log(2)),
        ("validation", 20): pytest.approx(0.9),
    }
    models = {row["model"] for row in result["rows"] if "model" in row}
    assert models == {"ling-tiny", "interpolated 3-gram (Kneser-Ney)"}
