"""PPO and its kin in one process: definitions at the first step, learning, continuation, bad input."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from small_llama import LLAMA, QUIET
from sweep import sweep
from torch import Tensor

from datamodules import RolloutPrompts
from datamodules.text.tokenizer import ByteTokenizer
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA, BatchSizeWarmup, RunCheckpoint, SpikeGuard
from zoo.ling import LingBackbone, LingConfig
from zoo.lm import HFBackbone
from zoo.lm.tuning import LoRA
from zoo.rlhf import GRPO, PPO, RLHF, RLOO, KLPenalty, ReinforcePP, Rollout, Verifier

DENSE = LingConfig(vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=1, first_k_dense_replace=1,
                   num_attention_heads=2, num_key_value_heads=1, pad_token_id=258, bos_token_id=256, eos_token_id=257,
                   initializer_range=0.2)  # fmt: skip


class Low(Verifier):
    """Likes characters before ``a``."""

    def verify(self, prompts: Any, answers: Any, rows: Any) -> list[float]:
        return [sum(character < "a" for character in answer) / 8 for answer in answers]


def prompts(folder: Path, **options: Any) -> RolloutPrompts:
    path = folder / "prompts.txt"
    path.write_text("".join(f"say {number}\n" for number in range(40)))
    return RolloutPrompts(**{"path": path, "tokenizer": "byte", "batch_size": 8, "val_fraction": 0.2, **options})


def module(**options: Any) -> RLHF:
    seed_everything(0, verbose=False)
    algorithm = options.setdefault("algorithm", PPO())
    if algorithm.needs_critic:
        options.setdefault("critic", LingBackbone(DENSE, scalar_head=True))
    options.setdefault("actor", LingBackbone(DENSE))
    options.setdefault("rollout", Rollout(max_new_tokens=8, minibatches=2, unit=2))
    fast = partial(torch.optim.AdamW, lr=1e-2)
    return RLHF(reward=Low(), optimizer=fast, critic_optimizer=fast, **options)


def fit(model: RLHF, folder: Path, rollouts: int, data: Any = None, ckpt_path: Any = None, **options: Any) -> Trainer:
    kept = RunCheckpoint(every_n_steps=2, minutes=None, folder=folder)
    arguments = {**QUIET, "callbacks": [kept], "limit_val_batches": 0, **options}
    trainer = Trainer(max_steps=2 * rollouts, default_root_dir=folder, log_every_n_steps=1, **arguments)
    trainer.fit(model, data or prompts(folder), ckpt_path=ckpt_path)
    return trainer


def weights(model: RLHF) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_first_step_is_the_definition(tmp_path: Path) -> None:
    model = module(rollout=Rollout(max_new_tokens=8, minibatches=1, unit=2))
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, limit_val_batches=0, **QUIET)
    trainer.fit(model, prompts(tmp_path))
    found = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    # The actor is its reference and the policy of the rollout: no KL, ratio 1, nothing clipped, loss = -mean(A) = 0.
    assert found["kl"] == found["clipped"] == 0
    assert abs(found["ratio"] - 1) < 1e-5 and abs(found["loss"]) < 1e-5
    assert found["reward"] == pytest.approx(found["score"], abs=1e-6)


@pytest.mark.parametrize(
    "algorithm",
    sweep([PPO(), ReinforcePP(baseline=True, kl=KLPenalty(0.0)), GRPO(), RLOO()], quick=(0, 2)),
    ids=lambda each: type(each).__name__,
)
def test_every_algorithm_learns_what_is_rewarded(algorithm: Any, tmp_path: Path) -> None:
    samples = 1 if algorithm.needs_critic else 4
    rollout = Rollout(samples_per_prompt=samples, max_new_tokens=8, minibatches=2, unit=8, epochs=4)
    model = module(algorithm=algorithm, rollout=rollout)
    model.optimizer = model.critic_optimizer = partial(torch.optim.AdamW, lr=3e-2)
    scores: list[float] = []
    log = model._log
    model._log = lambda values: (scores.append(values["score"]), log(values))[1]  # type: ignore[method-assign]
    fit(model, tmp_path, 24 * 4, prompts(tmp_path, batch_size=16 // samples))
    assert sum(scores[-6:]) / 6 > sum(scores[:2]) / 2 + 0.1


def test_without_a_penalty_no_reference_is_kept(tmp_path: Path) -> None:
    model = module(algorithm=PPO(kl=KLPenalty(0.0)))
    fit(model, tmp_path, 1)
    assert not model._reference and "reference" not in model.roles()


def test_the_average_of_the_actor_is_the_closed_form(tmp_path: Path) -> None:
    model = module(ema_decay=0.5)
    path: list[Tensor] = [model.actor.network.lm_head.weight.detach().clone()]
    average = model.average_actor
    model.average_actor = lambda: (path.append(model.actor.network.lm_head.weight.detach().clone()), average())[1]  # type: ignore
    fit(model, tmp_path, 2)
    expected = 0.5**4 * path[0] + sum(0.5 ** (5 - step) * path[step] for step in range(1, 5))
    found = read_checkpoint(tmp_path / "last.ckpt")["rlhf"]["ema"]["network.lm_head.weight"]
    torch.testing.assert_close(found, expected)
    # Who loads the actor of the run gets the average.
    loaded = LingBackbone(checkpoint=str(tmp_path / "last.ckpt"))
    torch.testing.assert_close(loaded.network.lm_head.weight, expected)


def test_texts_that_are_not_to_be_forgotten_are_learned_beside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "text": "abcabc" * (1 + n % 3)}) + "\n" for n in range(40)))
    losses: list[float] = []
    model = module(algorithm=PPO(kl=KLPenalty(0.0)), ptx_weight=27.8, max_grad_norm=0.0)
    log = model._log
    model._log = lambda values: (losses.append(values["text_loss"]), log(values))[1]  # type: ignore[method-assign]
    fit(model, tmp_path, 12, prompts(tmp_path, path=path))
    text = torch.tensor([[*b"abcabc", 257]])
    with torch.no_grad():
        logp = model.actor.logits(model.actor(text))[0, :-1].log_softmax(-1).gather(1, text[0, 1:, None])
    assert losses[-1] < losses[0] - 1 and float(-logp.mean()) < losses[0] - 1
    with pytest.raises(ValueError, match="column text"):
        fit(module(ptx_weight=1.0), tmp_path, 1)


def test_a_run_that_is_cut_continues_bit_for_bit(tmp_path: Path) -> None:
    adaptive = {"algorithm": PPO(kl=KLPenalty(0.1, target=1.0, horizon=50)), "ema_decay": 0.9}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    undisturbed = module(**adaptive)
    fit(undisturbed, whole, 4)
    fit(module(**adaptive), cut, 2)
    continued = module(**adaptive)
    with torch.no_grad():
        continued.actor.network.lm_head.weight.add_(1.0)  # also the reference must be that of the checkpoint
    fit(continued, cut, 4, ckpt_path=cut / "last.ckpt")
    assert continued.rollouts == 4 and continued.kl_controller.coefficient == undisturbed.kl_controller.coefficient
    for name, value in weights(undisturbed).items():
        assert torch.equal(value, continued.state_dict()[name]), name
    for name, value in undisturbed._ema.items():
        assert torch.equal(value, continued._ema[name]), name


def test_adapters_are_trained_against_the_model_without_them(tmp_path: Path) -> None:
    source = HFBackbone({**LLAMA, "vocab_size": 264}, seed=1).save_pretrained(tmp_path / "base")
    actor = HFBackbone(str(source), tuning="lora", lora=LoRA(rank=2))
    model = module(actor=actor, algorithm=GRPO(), rollout=Rollout(samples_per_prompt=2, max_new_tokens=4, minibatches=2, unit=2))
    trainer = fit(model, tmp_path, 3)
    assert not model._reference and float(trainer.callback_metrics["train/kl"]) != 0
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert all("lora_" in name for name in saved["state_dict"] if name.startswith("actor."))


def test_validate_and_predict(tmp_path: Path) -> None:
    model, data = module(), prompts(tmp_path)
    trainer = Trainer(default_root_dir=tmp_path, **QUIET)
    metrics = trainer.validate(model, data, verbose=False)[0]
    assert set(metrics) == {"val/score", "val/kl", "val/length", "val/ended"} and metrics["val/kl"] == 0
    answers = trainer.predict(model, data)
    assert answers is not None
    columns = [[each for part in answers for each in part[name]] for name in ("index", "text", "score")]
    rows = list(zip(*columns, strict=True))
    assert len(rows) == len({int(row[0]) for row in rows}) == len(data.splits[1])
    assert all(score == pytest.approx(sum(c < "a" for c in text) / 8) for _, text, score in rows)


def test_bad_input_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, call: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert len(str(caught.value)) <= 300

    refused("has no critic: leave critic out", lambda: module(algorithm=GRPO(), critic=LingBackbone(DENSE, scalar_head=True)))
    refused("needs a critic", lambda: module(critic=LingBackbone(DENSE)))
    refused("samples_per_prompt to 2", lambda: module(algorithm=RLOO()))
    refused("causal model", lambda: module(actor=HFBackbone({**LLAMA, "vocab_size": 264}, kind="encoder")))
    refused("both must have one tokenizer", lambda: module(actor=HFBackbone({**LLAMA, "vocab_size": 300})))
    refused("does not divide into 2 minibatches", lambda: fit(module(), tmp_path, 1, prompts(tmp_path, batch_size=7)))
    refused("gradient of each model", lambda: fit(module(), tmp_path, 1, gradient_clip_val=1.0))
    for callback in (EMA(), SpikeGuard(), BatchSizeWarmup(2, 4, 10)):
        with pytest.raises((ValueError, TypeError), match=type(callback).__name__):
            fit(module(), tmp_path, 1, callbacks=[callback])
    monkeypatch.setattr(ByteTokenizer, "pad_id", ByteTokenizer().eos_id)
    refused("pads with its eos", lambda: fit(module(), tmp_path, 1))
