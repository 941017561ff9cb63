"""Preference training of any causal model: the definition, what a reference shares and keeps, packing, continuation."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import LightningModule, Trainer, seed_everything
from small_llama import LLAMA, QUIET
from torch import Tensor
from torch.distributed import get_world_size

from datamodules import Preferences
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import RunCheckpoint
from zoo.lm import DPO, HFBackbone


def pairs(folder: Path, count: int = 24) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"{number}?", "chosen": "ab" * (1 + number % 5), "rejected": "ba" * (1 + number % 3)}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(path: Path, **options: Any) -> Preferences:
    return Preferences(**{"path": path, "tokenizer": "byte", "seq_len": 64, "batch_size": 4, "val_fraction": 0.2, **options})


def module(source: Any = LLAMA, tuning: Any = "full", **options: Any) -> DPO:
    return DPO(backbone=HFBackbone(source, tuning=tuning), optimizer=partial(torch.optim.AdamW, lr=1e-2), **options)


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    saved = RunCheckpoint(every_n_steps=2, minutes=None, folder=folder)
    return Trainer(max_steps=steps, default_root_dir=folder, callbacks=[saved], **{**QUIET, **options})


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder with random weights."""
    return HFBackbone(LLAMA, seed=1).save_pretrained(tmp_path / "released")


def test_the_loss_is_the_definition_and_begins_at_ln_2(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model, source = module(), data(pairs(tmp_path), val_fraction=0.0)
    trainer(tmp_path, 3).fit(model, source)
    batch = next(iter(source.train_dataloader()))
    logps = {}
    for name, network in (("policy", model.backbone), ("reference", model._reference[0])):
        for side in ("chosen", "rejected"):
            logp_BTV = network.network(input_ids=batch[f"{side}_input_ids"]).logits.log_softmax(-1)
            labels_BT = batch[f"{side}_labels"][:, 1:]
            picked_BT = logp_BTV[:, :-1].gather(2, labels_BT.clamp(min=0)[..., None]).squeeze(2)
            logps[name, side] = (picked_BT * (labels_BT != -100)).sum(1)
    margin_B = 0.1 * (
        logps["policy", "chosen"] - logps["reference", "chosen"] - logps["policy", "rejected"] + logps["reference", "rejected"]
    )
    result, _ = model.preferences(batch)
    torch.testing.assert_close(result.loss, -torch.nn.functional.logsigmoid(margin_B).mean(), rtol=1e-4, atol=1e-5)
    assert result.loss < math.log(2) - 0.01
    model._keep(model.copied_policy())
    torch.testing.assert_close(model.preferences(batch)[0].loss, torch.tensor(math.log(2)))


def test_packed_answers_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, found = module(nll_weight=0.3), []
        model._keep(HFBackbone({**LLAMA, "rms_norm_eps": 1e-4}))
        for packed in (False, True):
            source = data(pairs(tmp_path), packed=packed, val_fraction=0.0)
            source.setup("fit")
            result, _ = model.preferences(next(iter(source.train_dataloader())))
            found.append([result.loss, *torch.autograd.grad(result.loss, list(model.backbone.parameters()))])
    finally:
        torch.set_default_dtype(torch.float32)
    for padded, together in zip(*found, strict=True):
        torch.testing.assert_close(together, padded, rtol=1e-5, atol=1e-9)


def test_a_reference_shares_what_is_frozen_and_a_cut_run_continues_exactly(tmp_path: Path, released: Path) -> None:
    whole, cut, resumed = (module(str(released), "lora") for _ in range(3))
    for model, name, steps, start in ((whole, "whole", 4, None), (cut, "cut", 2, None), (resumed, "cut", 4, "cut/last.ckpt")):
        seed_everything(0, verbose=False)
        trainer(tmp_path / name, steps).fit(model, data(pairs(tmp_path)), ckpt_path=start and tmp_path / start)
    owned = {id(parameter) for parameter in whole.backbone.parameters()}
    own = [name for name, parameter in whole._reference[0].named_parameters() if id(parameter) not in owned]
    assert own and all("lora_" in name for name in own)
    stored = read_checkpoint(tmp_path / "cut/last.ckpt")
    assert all("lora_" in name for name in (*stored["reference"], *stored["state_dict"]) if name.startswith("network."))
    for name, value in LightningModule.state_dict(whole).items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, value in whole._reference[0].state_dict().items():
        assert torch.equal(value, resumed._reference[0].state_dict()[name]), name


def run(folder: Path, path: Path) -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    model, world = module(), get_world_size()
    options = {"devices": world, "strategy": "ddp" if world > 1 else "auto", "precision": "64-true"}
    trainer(folder, 3, **options).fit(model, data(path, batch_size=4 // world))
    return {name: value.detach().clone() for name, value in LightningModule.state_dict(model).items()}


def test_two_ranks_are_one_process(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(run, tmp_path / "one", pairs(tmp_path), world_size=1)
    for rank in pool.run(run, tmp_path / "two", pairs(tmp_path)):
        for name, value in rank.items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-8, msg=name)


def test_references_and_data_that_do_not_fit_are_one_sentence(tmp_path: Path, released: Path) -> None:
    other = HFBackbone({**LLAMA, "vocab_size": 300}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has a vocabulary of 300, the model one of 264: take a reference"):
        trainer(tmp_path, 1).fit(module(reference=str(other)), data(pairs(tmp_path)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trainer(tmp_path, 1).fit(module(reference="./nowhere"), data(pairs(tmp_path)))
    with pytest.raises(ValueError, match=r"set data: Preferences, or take CausalLM for other data\."):
        model = module()
        model._trainer = trainer(tmp_path, 1)
        model.on_before_batch_transfer({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, 0)
    with pytest.raises(ValueError, match=r"DPO: beta=0 must be positive"):
        module(beta=0)
