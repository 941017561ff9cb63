"""Reward models: they learn preferences, and are used as they were trained."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from rlhf.test_rlhf import DENSE
from small_llama import QUIET

from datamodules import Preferences
from zoo.ling import LingBackbone
from zoo.rlhf import RewardModel, TrainedReward


def pairs(folder: Path) -> Preferences:
    path = folder / "pairs.jsonl"
    rows = [{"prompt": f"{n}", "chosen": f"good {'!' * (n % 4)}", "rejected": f"bad {'.' * (n % 3)}"} for n in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Preferences(path=path, tokenizer="byte", seq_len=64, batch_size=8, val_fraction=0.25)


@pytest.mark.parametrize("loss", ["last", "per_token"])
def test_a_reward_model_learns_and_is_used_as_it_was_trained(loss: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    data = pairs(tmp_path)
    model = RewardModel(LingBackbone(DENSE, scalar_head=True), loss, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = Trainer(max_epochs=6, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, data)
    metrics = trainer.test(model, data, verbose=False)[0]
    assert metrics["test/accuracy"] == 1.0 and metrics["test/loss"] < 0.3 and 0 <= metrics["test/ece"] <= 0.5
    assert model.score_deviation != 1
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    batch = next(iter(data.val_dataloader()))
    ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    with torch.no_grad():
        raw = model.eval().losses(batch).score_BK[:, 0]
    for source in (tmp_path / "run.ckpt", model.save_pretrained(tmp_path / "shared")):
        reward = TrainedReward(str(source))
        reward.check_tokenizer(data.tokenizer)
        found = reward.score(ids, mask, [], [], [])
        torch.testing.assert_close(found, ((raw - model.score_mean) / model.score_deviation).float())
    # The critic begins as the reward model, with its head.
    critic = LingBackbone(checkpoint=str(tmp_path / "run.ckpt"), scalar_head=True)
    torch.testing.assert_close(critic.values(ids, mask), model.backbone.values(ids, mask))


def test_a_reward_model_learns_rankings(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    path = tmp_path / "rankings.jsonl"
    rows = [{"prompt": f"{n}", "ranking": ["good", f"fair {'!' * (n % 4)}", "bad"]} for n in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Preferences(path=path, tokenizer="byte", seq_len=64, batch_size=8, val_fraction=0.25)
    model = RewardModel(LingBackbone(DENSE, scalar_head=True), optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = Trainer(max_epochs=6, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test/accuracy"] == 1.0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scalar_head to true"):
        RewardModel(LingBackbone(DENSE))
    model = RewardModel(LingBackbone(DENSE, scalar_head=True))
    with pytest.raises(ValueError, match="packed: false"):
        model.on_before_batch_transfer({"packed_input_ids": torch.zeros(1, 1)}, 0)
    with pytest.raises(ValueError, match="margin"):
        RewardModel(LingBackbone(DENSE, scalar_head=True), margin=-1.0)
