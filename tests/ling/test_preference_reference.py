"""The reference of preference training: its log-likelihoods as the data give them, its arithmetic that of the model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from datamodules import Preferences
from zoo.ling import Ling, LingConfig, LingDPO

CONFIG = LingConfig(
    vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=16,
    num_experts_per_tok=4, num_shared_experts=1, moe_intermediate_size=8, initializer_range=0.3, pad_token_id=None,
    eos_token_id=257,
)  # fmt: skip


def preferences(folder: Path, references: bool = False) -> Preferences:
    rows: list[dict[str, Any]] = [
        {"prompt": f"question {n}", "chosen": "yes sir " * (n + 3), "rejected": "no way " * (7 - n)} for n in range(4)
    ]
    if references:
        rows = [row | {"reference_chosen_logps": -523.4 - n, "reference_rejected_logps": -521.7} for n, row in enumerate(rows)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Preferences(path=path, val_path=path, batch_size=4)


def trainer(folder: Path, precision: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_steps=1, precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


class Seeing(LingDPO):
    """Keeps the log-likelihoods of the reference, in the order of the file."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch["index"].argsort()
        self.seen = {side: batch[f"reference_{side}_logps"][order] for side in ("chosen", "rejected")}
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_log_likelihoods_of_the_file_are_not_rounded(tmp_path: Path, precision: str) -> None:
    model = Seeing(config=CONFIG, reference="precomputed")
    trainer(tmp_path, precision).fit(model, preferences(tmp_path, references=True))
    assert torch.equal(model.seen["chosen"], torch.tensor([-523.4, -524.4, -525.4, -526.4]))
    assert torch.equal(model.seen["rejected"], torch.tensor([-521.7] * 4))


@pytest.mark.parametrize("router_dtype", ["float32", "param"])
def test_a_folder_with_the_models_own_weights_is_the_model(tmp_path: Path, router_dtype: Any) -> None:
    seed_everything(0, verbose=False)
    Ling(CONFIG).to_hf(tmp_path / "model")
    folder = str(tmp_path / "model")
    model = LingDPO(checkpoint=folder, reference=folder, router_dtype=router_dtype, experts="loop", nll_weight=0.0)
    fitting = trainer(tmp_path, "bf16-true")
    (metrics,) = fitting.validate(model, preferences(tmp_path), verbose=False)
    assert metrics["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["val/margin"] == 0
    (reference,) = model._reference
    assert {moe.experts.backend for moe in reference.moe_layers} == {"loop"}
