"""Fine-tuning of any causal language model: the library's loss, one denominator, packing, continuation, answers."""

import json
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
from torch.nn.functional import cross_entropy

from datamodules import SFT
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import JSONLWriter, RunCheckpoint
from zoo.lm import CausalLM, HFBackbone
from zoo.lm.generation import Generation


def module(source: Any = LLAMA, **kwargs: Any) -> CausalLM:
    options = {name: kwargs.pop(name) for name in ("tuning", "lora", "last_n") if name in kwargs}
    return CausalLM(HFBackbone(source, **options), optimizer=partial(torch.optim.AdamW, lr=1e-2), **kwargs)


def chats(folder: Path, count: int = 24) -> Path:
    """Questions and answers of unequal lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "ab" * (1 + number % 7)}]
        for number in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def data(path: Path, **options: Any) -> SFT:
    return SFT(**{"path": path, "tokenizer": "byte", "template": "ling", "seq_len": 160, "batch_size": 4, "val_fraction": 0.2,
                  **options})  # fmt: skip


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chunk", [0, 5])
def test_the_loss_and_its_gradients_are_the_library_s(double: None, chunk: int) -> None:
    model = module(loss_chunk=chunk)
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    logits = model.backbone.network(input_ids=ids).logits  # whose own loss is computed in float32
    theirs = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = torch.autograd.grad(theirs, list(model.parameters()))
    losses = model.token_losses({"input_ids": ids, "labels": labels})
    torch.testing.assert_close(losses.loss, theirs)
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(losses.loss_BT.sum() / count, theirs.detach())
    for mine, other in zip(torch.autograd.grad(losses.loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_batch_without_labels_has_no_gradient(double: None) -> None:
    model, ids = module(), torch.zeros(2, 5, dtype=torch.int64)
    loss = model.token_losses({"input_ids": ids, "labels": torch.full_like(ids, -100)}).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_packed_conversations_have_the_losses_of_each_alone(double: None, tmp_path: Path) -> None:
    model, sums = module(), []
    for packing in (False, True):
        source = data(chats(tmp_path), packing=packing, val_fraction=0.0)
        source.setup("fit")
        total = torch.zeros(())
        for batch in source.train_dataloader():
            batch = model.on_before_batch_transfer(batch, 0)
            total = total + model.token_losses(batch).loss_BT.sum()
        sums.append(total)
    torch.testing.assert_close(*sums)


def run(folder: Path, path: Path, tuning: str, accumulate: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    model, world = module(tuning=tuning), get_world_size()
    trainer = Trainer(
        max_steps=4, devices=world, strategy="ddp" if world > 1 else "auto", precision="64-true", gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate, enable_checkpointing=False, default_root_dir=folder, **QUIET,
    )  # fmt: skip
    source = data(path, batch_size=4 // world)
    trainer.fit(model, source)
    (validation,) = trainer.validate(model, source, verbose=False)
    return {name: value.detach().clone() for name, value in LightningModule.state_dict(model).items()}, dict(validation)


def test_two_ranks_with_accumulation_are_one_process(pool: RankPool, tmp_path: Path) -> None:
    path = chats(tmp_path)
    ((weights, validation),) = pool.run(run, tmp_path, path, "lora", 2, world_size=1)
    for rank, seen in pool.run(run, tmp_path, path, "lora", 2):
        assert seen == pytest.approx(validation, rel=1e-9) and {"val/loss", "val/perplexity"} <= seen.keys()
        for name, value in weights.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_an_interrupted_run_continues_and_checkpoints_leave_out_what_is_frozen(tmp_path: Path) -> None:
    HFBackbone(LLAMA, seed=1).save_pretrained(tmp_path / "base")
    path, curves = chats(tmp_path), {}

    def fit(name: str, steps: int, resume: Path | None = None) -> CausalLM:
        seed_everything(3, verbose=False)
        model = module(str(tmp_path / "base"), tuning="lora")
        trainer = Trainer(max_steps=steps, callbacks=[RunCheckpoint(folder=tmp_path / name)], limit_val_batches=0,
                          default_root_dir=tmp_path, **QUIET)  # fmt: skip
        trainer.fit(model, data(path), ckpt_path=resume, weights_only=True)
        curves[name] = {key: value.detach().clone() for key, value in model.state_dict().items()}
        return model

    fit("whole", 6)
    fit("cut", 3)
    last = tmp_path / "cut" / "last.ckpt"
    stored = read_checkpoint(last)["state_dict"]
    assert stored and all("lora_" in name for name in stored)
    fit("continued", 6, last)
    for name, value in curves["whole"].items():
        assert torch.equal(curves["continued"][name], value), name
    rebuilt = CausalLM.load_from_checkpoint(last)
    for name, value in curves["cut"].items():
        assert torch.equal(rebuilt.state_dict()[name], value), name


def test_prompts_are_answered_in_a_file(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"role": "user", "content": "22?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "1?"}, {"prompt": asked}, {"messages": asked})))
    model = module(generation=Generation(max_new_tokens=5))
    trainer = Trainer(callbacks=[JSONLWriter()], default_root_dir=tmp_path, **QUIET)
    rows = trainer.predict(model, data(chats(tmp_path), predict_prompts=prompts))
    assert rows is not None and [text for batch in rows for text in batch["prompt"]]
    (_, two, three), _ = ([value for batch in rows for value in batch[name]] for name in ("prompt", "text"))
    assert two == three and "22?" in two


def test_wrong_models_and_data_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="predicts no next token"):
        CausalLM(HFBackbone({"model_type": "bert", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "intermediate_size": 8}))  # fmt: skip
    with pytest.raises(ValueError, match="loss_chunk=-1"):
        module(loss_chunk=-1)
    with pytest.raises(ValueError, match="vocabulary of 100"):
        Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET).fit(
            module({**LLAMA, "vocab_size": 100, "pad_token_id": 0}), data(chats(tmp_path))
        )
