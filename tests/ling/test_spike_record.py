"""The record of a spike shows the text that was hardest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from datamodules import SFT, Preferences, Text
from zoo.callbacks import SpikeGuard
from zoo.ling import Ling, LingConfig, LingDPO

SMALL = LingConfig(
    vocab_size=259, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=2,
    num_experts_per_tok=1, num_shared_experts=1, moe_intermediate_size=8, pad_token_id=258, eos_token_id=257,
)  # fmt: skip
WORDS = ["eine", "Überraschung", "ist\tdas", "nicht\nwahr"]


class SkipsTheSecond(SpikeGuard):
    """Skips the second step, whatever it is like."""

    def judge(self, loss: float, norm: float, rest: float | None = None) -> Any:
        self.__dict__.setdefault("seen", []).append(loss)
        return "skip" if len(self.seen) == 2 else "apply"


def chat(word: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": word}]}


def data_of(kind: str, path: Path) -> Any:
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": word} for word in WORDS],
        "conversations": [chat(word) for word in WORDS],
        "pairs": [{"prompt": "?", "chosen": word, "rejected": "no"} for word in WORDS],
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
    options: dict[str, Any] = {"seq_len": 64, "val_fraction": 0.0, "batch_size": 2, "num_workers": 0}
    if kind == "text":
        return Text(sources={str(path): 1.0}, packing=False, **options)
    return SFT(path=path, system=None, **options) if kind == "conversations" else Preferences(path=path, **options)


@pytest.mark.parametrize("kind", ["text", "conversations", "pairs"])
def test_the_record_shows_the_text_with_the_largest_loss(tmp_path: Path, kind: str) -> None:
    data, guard = data_of(kind, tmp_path / "rows.jsonl"), SkipsTheSecond(record_path=Path("spikes.tsv"))
    model = (LingDPO if kind == "pairs" else Ling)(config=SMALL, router_warmup_steps=0)
    Trainer(
        accelerator="cpu", max_steps=2, callbacks=[guard], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    ).fit(model, datamodule=data)  # fmt: skip
    (line,) = (tmp_path / "spikes.tsv").read_text().splitlines()
    *_, losses, ids, text = line.split("\t")
    values = torch.tensor([float(value) for value in losses.split(",")])
    worst = int(ids.split(",")[int(values.argmax())])
    assert len(values) == 2 and len(set(values.tolist())) == 2
    said = json.loads(text)
    expected = {
        "text": WORDS[worst],
        "conversations": f"<role>HUMAN</role>?<role>ASSISTANT</role>{WORDS[worst]}",
        "pairs": f"?{WORDS[worst]}\n\n?no",
    }
    assert said == expected[kind]
