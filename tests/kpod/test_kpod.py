"""A student without weights and curriculum is fine-tuned as usual; with them it is resumed exactly and divided over processes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Callback, Trainer, seed_everything
from small_llama import LLAMA, QUIET

from datamodules import Rationales
from zoo.kpod import KPOD, InRationaleCurriculum
from zoo.kpod.artefacts import TokenWeights
from zoo.lm import CausalLM, HFBackbone
from zoo.lm.generation import Generation

T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 264,
      "decoder_start_token_id": 258, "pad_token_id": 258, "eos_token_id": 257, "dropout_rate": 0.0}  # fmt: skip


def source(folder: Path) -> Path:
    path = folder / "sums.jsonl"
    rows = []
    for i in range(44):
        a, b, c = i % 7, i % 5 + 1, i % 3 + 2
        steps = [f"{a} + {b} = {a + b}.", f"{a + b} + {c} = {a + b + c}."][: 1 + i % 2]
        rows.append(
            {"question": f"Sum {i}: {a}, {b}, {c}?", "rationale": " ".join(steps), "answer": str([a + b, a + b + c][i % 2])}
        )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def data_of(folder: Path, **options: Any) -> Rationales:
    return Rationales(str(folder / "sums.jsonl"), **{"val_fraction": 0.1, "tokenizer": "byte", "batch_size": 8, **options})


def student(config: dict[str, Any] = LLAMA, **options: Any) -> KPOD:
    seed_everything(0, verbose=False)
    return KPOD(HFBackbone(dict(config)), optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def fit(module: Any, folder: Path, callbacks: Any = (), data: dict[str, Any] | None = None, **options: Any) -> Trainer:
    settings = {"max_epochs": 3, "limit_val_batches": 0, "num_sanity_val_steps": 0, "default_root_dir": folder, **options}
    trainer = Trainer(**{**QUIET, **settings}, callbacks=list(callbacks))
    trainer.fit(module, data_of(folder, **(data or {})))
    return trainer


def write_weights(folder: Path) -> Path:
    data = data_of(folder)
    rows = {i: [0.1 + 0.8 * (j % 2) for j in range(int((each.step_ids >= 0).sum()))] for i, each in enumerate(data.splits[0])}
    path = folder / "weights.safetensors"
    TokenWeights.of_rows(rows, data.fingerprint).save(path)
    return path


def test_without_weights_and_steps_it_is_fine_tuning(tmp_path: Path) -> None:
    source(tmp_path)
    plain = student()
    seed_everything(0, verbose=False)
    usual = CausalLM(HFBackbone(dict(LLAMA)), optimizer=partial(torch.optim.SGD, lr=0.1))
    fit(plain, tmp_path, max_epochs=1)
    fit(usual, tmp_path, max_epochs=1, data={"ask_questions": False})
    expected = usual.state_dict()
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in plain.state_dict().items())


def test_loss_equals_the_librarys(tmp_path: Path) -> None:
    source(tmp_path)
    module, data = student(), data_of(tmp_path)
    batch = next(iter(data.train_dataloader()))
    logits, labels, weights, _ = module.scored(batch, torch.zeros_like(batch["index"]))
    loss = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).mean()
    theirs = module.backbone.network(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(loss, theirs, atol=1e-6, rtol=0)
    for one, other in zip(*(torch.autograd.grad(each, list(module.parameters())) for each in (loss, theirs)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_curriculum_gives_fewer_steps_and_continues_exactly(tmp_path: Path) -> None:
    source(tmp_path)
    weights = write_weights(tmp_path)

    def run(folder: Path, *callbacks: Callback) -> tuple[KPOD, InRationaleCurriculum]:
        module, curriculum = student(token_weights=weights), InRationaleCurriculum(2, clusters=2)
        fit(module, tmp_path, [curriculum, *callbacks], default_root_dir=folder)
        return module, curriculum

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, curriculum = run(tmp_path / "whole", Save())
    assert curriculum.given is not None and curriculum.given.shape[0] == 3
    assert (curriculum.given[1:] <= curriculum.given[:-1]).all() and int(curriculum.given[0].sum()) > 0
    assert (tmp_path / "whole" / "schedule.png").stat().st_size > 1000
    continued = student(token_weights=weights)
    again = Trainer(**{**QUIET, "max_epochs": 3, "limit_val_batches": 0}, callbacks=[InRationaleCurriculum(2, clusters=2)])
    again.fit(continued, data_of(tmp_path), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in continued.state_dict().items())


def ranks(folder: Path, world: int) -> dict[str, torch.Tensor]:
    module = student(token_weights=folder / "weights.safetensors")
    fit(module, folder, [InRationaleCurriculum(2, clusters=2)], devices=world, strategy="ddp" if world > 1 else "auto",
        data={"batch_size": 8 // world}, use_distributed_sampler=False)  # fmt: skip
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_two_processes_equal_one(pool: RankPool, tmp_path: Path) -> None:
    source(tmp_path)
    write_weights(tmp_path)
    one = ranks(tmp_path, 1)
    for two in pool.run(ranks, tmp_path, 2, world_size=2):
        assert all(torch.allclose(value, two[name], atol=1e-6) for name, value in one.items())


def test_an_encoder_decoder_reads_given_steps(tmp_path: Path) -> None:
    source(tmp_path)
    module = student(T5, generation=Generation(4))
    fit(module, tmp_path, [InRationaleCurriculum(2, clusters=2)], max_epochs=2)
    found = Trainer(**QUIET).validate(module, data_of(tmp_path), verbose=False)[0]
    assert found["val/items/accuracy"] == 0.0 and found["val/items/accuracy_high"] > 0 and found["val/items/loss_words"] > 0


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    source(tmp_path)
    path = write_weights(tmp_path)
    with pytest.raises(ValueError, match=r"stages=4 are more than trainer.max_epochs=3"):
        fit(student(), tmp_path, [InRationaleCurriculum(4)])
    with pytest.raises(ValueError, match=r"another tokenizer|other data"):
        fit(student(token_weights=path), tmp_path, data={"val_fraction": 0.3})
    with pytest.raises(ValueError, match="weight_floor=2"):
        student(weight_floor=2.0)
    with pytest.raises(ValueError, match="predicts answers to questions"):
        Trainer(**QUIET).predict(student(), data_of(tmp_path, predict_on="train"))
