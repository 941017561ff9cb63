"""Ranks that have unequally many samples evaluate as one process does, also where each forward pass waits for all ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Trainer, seed_everything
from torch import distributed

from datamodules import SFT, Preferences, Text, ZooDataModule
from zoo.ling import Ling, LingConfig, LingDPO

CONFIG = LingConfig(
    vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, initializer_range=0.3, pad_token_id=None,
    eos_token_id=257,
)  # fmt: skip


class Waiting:
    """Waits for all ranks in every step of an evaluation, as a model whose parameters are sharded does."""

    def validation_step(self, *args: Any, **kwargs: Any) -> None:
        if distributed.is_initialized():
            distributed.all_reduce(torch.ones(1))
        super().validation_step(*args, **kwargs)  # type: ignore[misc]


class WaitingLing(Waiting, Ling):
    pass


class WaitingDPO(Waiting, LingDPO):
    pass


def data_of(kind: str, folder: Path) -> ZooDataModule:
    """Seven samples to evaluate, of unequal lengths."""
    words = ["".join(map(chr, range(97 + n, 100 + 3 * n))) for n in range(7)]
    pairs = [{"prompt": f"{n}", "chosen": word, "rejected": word[::-1]} for n, word in enumerate(words)]
    roles = ("user", "assistant", "user", "assistant")
    chats = [{"messages": [{"role": role, "content": word} for role in roles]} for word in words]
    options: dict[str, Any] = {"batch_size": 1, "on_error": "raise"}
    folder.mkdir(exist_ok=True)
    rows = pairs if "pairs" in kind else chats
    path, texts = folder / "rows.jsonl", folder / "texts"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts.mkdir(exist_ok=True)
    for n, word in enumerate(words):
        (texts / f"{n}.txt").write_text(word)
    if kind == "text":
        return Text(sources={str(texts): 1.0}, val_fraction=0.75, packing=False, seq_len=33, **options)
    if kind == "chats":
        return SFT(path=path, val_path=path, system=None, **options)
    return Preferences(path=path, val_path=path, packed="packed" in kind, seq_len=64, **options)


def validate(kind: str, folder: Path, world_size: int) -> tuple[dict[str, float], int]:
    """The metrics, and the batches of this process."""
    seed_everything(3, verbose=False)
    model: Ling = WaitingDPO(config=CONFIG, nll_weight=0.3) if "pairs" in kind else WaitingLing(CONFIG)
    if isinstance(model, LingDPO):
        seed_everything(4, verbose=False)
        model._keep(LingDPO(config=CONFIG).network)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (metrics,) = trainer.validate(model, data_of(kind, folder), verbose=False)
    return {name: float(value) for name, value in metrics.items()}, sum(trainer.num_val_batches)


@pytest.mark.parametrize("kind", ["text", "chats", "pairs", "packed pairs"])
def test_metrics_are_those_of_one_process_and_no_rank_waits_for_ever(
    pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))
    expected, samples = validate(kind, tmp_path / "data", 1)
    assert samples % 2, "one rank has a sample more"
    for found, batches in pool.run(validate, kind, tmp_path / "data", 2, world_size=2, timeout=60.0):
        assert batches == (samples + 1) // 2
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    wanted = {"accuracy", "margin", "loss"} if "pairs" in kind else {"loss", "bits_per_byte", "perplexity", "max_violation"}
    assert {f"val/{name}" for name in wanted} == expected.keys()
