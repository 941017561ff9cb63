"""The language model as a module: losses, warm-up by applied steps, ranks, resuming, checkpoints, preferences, bad input."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sweep import sweep
from torch import Tensor
from torch.distributed import get_world_size
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Dataset

from datamodules import ZooDataModule
from zoo.base.random import SampleRandom
from zoo.callbacks import EMA
from zoo.ling import (
    Generation,
    Ling,
    LingConfig,
    LingDPO,
    LingForCausalLM,
    balance_loss,
    load_hf,
    normalized_weight,
    save_hf,
    z_loss,
)
from zoo.ling.tokenizer import check_special_tokens
from zoo.lm.batches import counted_labels

SMALL = LingConfig(
    vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, rope_theta=1e4, max_position_embeddings=32,
    initializer_range=0.1, pad_token_id=23, eos_token_id=22,
)  # fmt: skip
GLOBAL_BATCH = 8


class Sequences(Dataset[dict[str, Tensor]]):
    """Random tokens that repeat with period 3; every third sequence is padded on the right."""

    def __init__(self, padded: bool = True) -> None:
        self.padded = padded

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(20, (3,), generator=torch.Generator().manual_seed(index)).repeat(4)
        mask = torch.ones_like(ids)
        mask[9 if self.padded and index % 3 == 0 else 12 :] = 0
        ids = ids.masked_fill(mask == 0, 23)
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": torch.tensor(index),
                "num_bytes": mask.sum() - 1}  # fmt: skip


class Periods(ZooDataModule):
    """The sequences."""

    def __init__(self, padded: bool = True, batch_size: int = 8) -> None:
        super().__init__(batch_size=batch_size)
        self.sequences = Sequences(padded)

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.sequences)

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(self.sequences)

    test_dataloader = val_dataloader


class Recording(Ling):
    """Keeps the loss of every micro-batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.__dict__.setdefault("seen", []).append((loss.item(), *(self.last_losses[n].item() for n in ("ce", "aux", "z"))))
        return loss


def trainer(folder: Path, **options: Any) -> Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", **{"devices": 1, "max_steps": 6, **silent, **options})


@dataclass
class Outcome:
    """What one process saw of a run."""

    losses: list[tuple[float, ...]]
    weights: dict[str, Tensor]
    validation: dict[str, float]


def run(folder: Path, dtype: torch.dtype, accumulate: int, checkpointing: bool) -> Outcome:
    """Fit and validate on the ranks of the present group."""
    world_size = get_world_size()
    torch.set_default_dtype(dtype)
    seed_everything(3, verbose=False)
    model = Recording(
        SMALL, router_warmup_steps=4, aux_coef=0.1, z_coef=0.01, aux_scope="global", activation_checkpointing=checkpointing,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )  # fmt: skip
    fitting = trainer(
        folder, devices=world_size, strategy="ddp" if world_size > 1 else "auto", accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0, precision="64-true" if dtype == torch.float64 else "32-true",
    )  # fmt: skip
    data = Periods(padded=False, batch_size=GLOBAL_BATCH // world_size)
    fitting.fit(model, data)
    (validation,) = fitting.validate(model, data, verbose=False)
    weights = {name: value.detach().clone() for name, value in LightningModule.state_dict(model).items()}
    return Outcome(model.seen, weights, dict(validation))


@pytest.mark.parametrize(("accumulate", "recompute"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True)])
def test_two_ranks_equal_one_process(pool: RankPool, tmp_path: Path, accumulate: int, recompute: bool) -> None:
    (one,) = pool.run(run, tmp_path, torch.float64, accumulate, recompute, world_size=1)
    assert_equal(pool.run(run, tmp_path, torch.float64, accumulate, recompute), one, accumulate)


def assert_equal(two: list[Outcome], one: Outcome, accumulate: int) -> None:
    losses = [tuple(sum(pair) / 2 for pair in zip(*both, strict=True)) for both in zip(*(o.losses for o in two), strict=True)]
    assert len(losses) == 6 * accumulate
    for mean, whole in zip(losses, one.losses, strict=True):
        assert mean == pytest.approx(whole, rel=1e-10)
    for outcome in two:
        assert outcome.weights.keys() == one.weights.keys()
        for name, value in outcome.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=1e-9, atol=1e-10)
        for name in ("val/loss", "val/bits_per_byte"):
            assert outcome.validation[name] == pytest.approx(one.validation[name], rel=1e-10)


def test_evaluation_is_the_mean_over_tokens_and_bytes(tmp_path: Path) -> None:
    model = Ling(SMALL)
    (values,) = trainer(tmp_path).validate(model, Periods(batch_size=7), verbose=False)
    total = count = 0.0
    for index in range(48):
        sample = Sequences()[index]
        output = model.network(sample["input_ids"][None], labels=sample["labels"][None])
        total, count = total + output.loss_BT.sum().item(), count + int((sample["labels"][1:] != -100).sum())
    assert values["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert values["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert values["val/bits_per_byte"] == pytest.approx(total / count / math.log(2), rel=1e-5)
    assert values["val/max_violation"] >= 0


def test_the_loss_is_cross_entropy_and_router_losses_of_valid_tokens(tmp_path: Path) -> None:
    model = Recording(SMALL, aux_coef=0.1, z_coef=0.01, router_warmup_steps=0, optimizer=torch.optim.SGD)
    batch = torch.utils.data.default_collate([Sequences()[index] for index in range(4)])
    valid = batch["attention_mask"].bool().reshape(-1)
    output = model.network(batch["input_ids"], labels=batch["labels"])
    aux = sum(balance_loss(r.probs_NE[valid], r.ids_Nk[valid]) for r in output.routings)
    z = sum(z_loss(r.logits_NE[valid]) for r in output.routings)
    fitting = trainer(tmp_path, max_steps=1)
    fitting.fit(model, DataLoader([Sequences()[index] for index in range(4)], batch_size=4))
    loss, ce, seen_aux, seen_z = model.seen[0]
    assert (ce, seen_aux, seen_z) == pytest.approx((output.loss.item(), aux.item(), z.item()), rel=1e-5)
    assert loss == pytest.approx(ce + 0.1 * seen_aux + 0.01 * seen_z, rel=1e-6)
    assert model.last_losses["ce_per_sample"].shape == (4,)


def test_the_head_follows_the_weights_that_an_average_takes_the_place_of(tmp_path: Path) -> None:
    heads: list[Tensor] = []

    class Look(Callback):
        @torch.no_grad()
        def look(self, trainer: Any, pl_module: Any) -> None:
            head = pl_module.network.lm_head
            assert torch.equal(head.effective_weight(), normalized_weight(head.weight))
            heads.append(head.effective_weight())

        on_validation_epoch_end = on_validation_end = on_fit_end = look

    options = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    fitting = trainer(tmp_path, callbacks=[EMA(0.5), Look()], **options)
    fitting.fit(Ling(SMALL, optimizer=partial(torch.optim.SGD, lr=1.0)), Periods(batch_size=8))
    assert not torch.equal(heads[0], heads[1])  # the average, then the weights


class Skip(Callback):
    """Leaves out the optimizer's second step, as the spike guard does."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        apply, calls = optimizer.step, []

        def step(closure: Any) -> Any:
            calls.append(None)
            return closure() if len(calls) == 2 else apply(closure)

        optimizer.step = step


def test_warm_up_statistics_follow_applied_steps_alone(tmp_path: Path) -> None:
    seen: list[tuple[int, float, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            gate = pl_module.network.moe_layers[0].gate
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            seen.append((pl_module.applied_steps, gate.running_mean.item(), rate))

    model = Ling(SMALL, router_warmup_steps=3, lr_scheduler=partial(LinearLR, start_factor=0.1, total_iters=10))
    trainer(tmp_path, callbacks=[Skip(), Watch()]).fit(model, Periods(batch_size=8))
    assert [steps for steps, _, _ in seen] == [1, 1, 2, 3, 4, 5]
    assert seen[0][1:] == seen[1][1:]
    assert seen[1][1] != seen[2][1] != seen[3][1] == seen[4][1] == seen[5][1]
    assert seen[1][2] < seen[2][2]


def test_running_moments_are_those_of_the_scores(tmp_path: Path) -> None:
    model = Ling(SMALL, router_warmup_steps=5, optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer(tmp_path, max_steps=1).fit(model, Periods(batch_size=8))
    stats = model.router_stats
    for moe, mean, std in zip(model.network.moe_layers, stats.logit_mean, stats.logit_std, strict=True):
        assert moe.gate.running_mean.item() == pytest.approx(mean.item())
        assert moe.gate.running_std.item() == pytest.approx(std.item())


def test_noise_is_drawn_while_it_warms_up_and_never_in_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    normals = SampleRandom.normals
    monkeypatch.setattr(SampleRandom, "normals", lambda self, *args: drawn.append(1) or normals(self, *args))
    model = Ling(SMALL, router_warmup_steps=2)
    fitting = trainer(tmp_path, max_steps=5)
    fitting.fit(model, Periods(batch_size=8))
    assert len(drawn) == 2
    fitting.validate(Ling(SMALL, router_warmup_steps=2), Periods(batch_size=8), verbose=False)
    assert len(drawn) == 2


def test_learned_weights_are_trained_on_without_a_warm_up(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Routes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((pl_module.last_losses["ce"].item(), pl_module.eval().run_network(batch).loss.item()))
            pl_module.train()

    def fit(model: Ling) -> bool:
        """Whether the first training step routes as evaluation does, with weights that the step leaves."""
        seen.clear()
        trainer(tmp_path, max_steps=1, callbacks=[Routes()]).fit(model, Periods(batch_size=8))
        return seen[0][0] == pytest.approx(seen[0][1], rel=1e-5)

    seen: list[tuple[float, float]] = []
    still = partial(torch.optim.SGD, lr=0.0)
    folder = str(save_hf(LingForCausalLM(SMALL), tmp_path / "released"))
    assert Ling(SMALL).router_warmup_steps == Ling(SMALL).hparams["router_warmup_steps"] == 2000
    model = Ling(checkpoint=folder, optimizer=still)
    assert model.router_warmup_steps == model.hparams["router_warmup_steps"] == 0 and fit(model)
    assert not [warning for warning in recwarn if "has been learned" in str(warning.message)]
    with pytest.warns(match="router_warmup_steps=5 makes the routing of .*released, which has been learned, random at first"):
        wanted = Ling(checkpoint=folder, router_warmup_steps=5, optimizer=still)
    assert not fit(wanted)

    shared = Ling.from_pretrained(wanted.save_pretrained(tmp_path / "begun"))
    assert shared.applied_steps == 1 and not fit(shared)  # the warm-up goes on
    whole = Ling(SMALL, router_warmup_steps=2, optimizer=still)
    trainer(tmp_path, max_steps=2).fit(whole, Periods(batch_size=8))
    assert fit(Ling.from_pretrained(whole.save_pretrained(tmp_path / "learned")))
    entries = json.loads((tmp_path / "learned" / "config.json").read_text())
    del entries["_applied_steps"]  # as earlier versions wrote it
    (tmp_path / "learned" / "config.json").write_text(json.dumps(entries))
    assert fit(Ling.from_pretrained(tmp_path / "learned"))


def test_a_checkpoint_continues_the_warm_up_and_builds_the_module(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(ckpt: str | None = None) -> Ling:
        seed_everything(1, verbose=False)
        model = Ling(SMALL, router_warmup_steps=5, router_dtype="param", aux_reduction="mean")
        trainer(tmp_path, callbacks=[Save()]).fit(model, Periods(batch_size=8), ckpt_path=ckpt, weights_only=True)
        return model

    whole = fit()
    continued = fit(str(tmp_path / "half.ckpt"))
    assert continued.applied_steps == whole.applied_steps == 6
    for name, value in continued.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    again = Ling.load_from_checkpoint(tmp_path / "half.ckpt")
    assert again.config == SMALL and again.applied_steps == 3
    folder = again.save_pretrained(tmp_path / "shared")
    assert json.loads((folder / "config.json").read_text())["config"]["num_experts"] == 4
    shared = Ling.from_pretrained(folder)
    assert all(torch.equal(value, shared.state_dict()[name]) for name, value in again.state_dict().items())


def test_frozen_parameters_stay_and_gains_do_not_decay(tmp_path: Path) -> None:
    model = Ling(SMALL, freeze=["model.word_embeddings.*", "*.gate.weight"])
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    trainer(tmp_path).fit(model, Periods(batch_size=8))
    for name, value in model.network.named_parameters():
        assert torch.equal(value, before[name]) == ("word_embeddings" in name or name.endswith("gate.weight"))
    matrices, gains = model.configure_optimizers().param_groups
    assert all(p.dim() >= 2 for p in matrices["params"]) and matrices["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in gains["params"]) and gains["weight_decay"] == 0
    with pytest.raises(ValueError, match=r"freeze='model\.wte' fits no parameter"):
        Ling(SMALL, freeze=["model.wte"])


@pytest.mark.parametrize("precision", sweep(["bf16-true", "bf16-mixed"]))
def test_it_trains_in_half_precision(tmp_path: Path, precision: str) -> None:
    model = Recording(SMALL, router_warmup_steps=2, loss_chunk=5, optimizer=partial(torch.optim.AdamW, lr=3e-2))
    trainer(tmp_path, precision=precision, max_epochs=3, max_steps=-1).fit(model, Periods(batch_size=8))
    assert model.seen[-1][1] < 0.9 * model.seen[0][1]


def parameter_types(module: Ling) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.network.parameters()}


@pytest.fixture
def small_half(tmp_path: Path) -> Path:
    """A released folder in bfloat16."""
    torch.manual_seed(0)
    return save_hf(LingForCausalLM(SMALL), tmp_path / "half", dtype=torch.bfloat16)


@pytest.mark.parametrize(("precision", "dtype"), [
    ("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16),
])  # fmt: skip
def test_weights_stored_in_half_precision_are_trained_as_the_precision_says(
    tmp_path: Path, small_half: Path, precision: str, dtype: torch.dtype
) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(model: Ling, ckpt: Path | None = None) -> Trainer:
        seed_everything(0, verbose=False)
        fitting = trainer(tmp_path, precision=precision, max_steps=4, callbacks=[Save()])
        fitting.fit(model, Periods(batch_size=8), ckpt_path=ckpt, weights_only=True)
        return fitting

    def made() -> Ling:
        return Ling(checkpoint=str(small_half), router_warmup_steps=0, optimizer=partial(torch.optim.AdamW, lr=1e-3))

    whole = made()
    assert parameter_types(whole) == {torch.bfloat16}
    optimizer = fit(whole).optimizers[0]
    assert parameter_types(whole) == {dtype} == {state["exp_avg"].dtype for state in optimizer.state.values()}
    for model in (Ling.load_from_checkpoint(tmp_path / "half.ckpt"), made()):
        fit(model, tmp_path / "half.ckpt")
        assert parameter_types(model) == {dtype}
        assert all(map(torch.equal, model.network.parameters(), whole.network.parameters()))


def test_averages_are_those_of_training_that_begins_in_float32(tmp_path: Path, small_half: Path) -> None:
    weights = []
    for convert in (False, True):
        seed_everything(0, verbose=False)
        model = Ling(checkpoint=str(small_half), router_warmup_steps=0)
        model = model.float() if convert else model
        trainer(tmp_path, max_steps=3, callbacks=[EMA(0.5)]).fit(model, Periods(batch_size=8))
        weights.append([*model.network.parameters()])
    assert all(map(torch.equal, *weights))


def test_small_updates_are_not_rounded_away(tmp_path: Path, small_half: Path) -> None:
    model = Ling(checkpoint=str(small_half), router_warmup_steps=0, optimizer=partial(torch.optim.AdamW, lr=1e-5))
    before = [parameter.detach().float() for parameter in model.network.parameters()]
    trainer(tmp_path, precision="bf16-mixed", max_steps=1).fit(model, Periods(batch_size=8))
    changed = [(one != other).float().mean().item() for one, other in zip(before, model.network.parameters(), strict=True)]
    assert sum(changed) / len(changed) > 0.9


def test_a_rebuilt_module_has_the_types_that_were_stored(tmp_path: Path, small_half: Path) -> None:
    model = Ling(checkpoint=str(small_half))
    fitting = trainer(tmp_path, precision="bf16-true", max_steps=1)
    fitting.fit(model, Periods(batch_size=8))
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    again = Ling.load_from_checkpoint(tmp_path / "a.ckpt")
    assert parameter_types(again) == {torch.bfloat16} and again.network.moe_layers[0].gate.running_mean.dtype == torch.float32
    shared = Ling.from_pretrained(model.save_pretrained(tmp_path / "shared"))
    assert parameter_types(shared) == {torch.bfloat16}
    assert all(map(torch.equal, shared.network.parameters(), model.network.parameters()))
    exact = Ling(SMALL)
    assert parameter_types(Ling.from_pretrained(exact.save_pretrained(tmp_path / "halved", half=True))) == {torch.float32}


def test_ids_may_be_narrow_integers(tmp_path: Path) -> None:
    seen = []
    for dtype in (torch.int32, torch.int64):
        torch.manual_seed(0)
        model = Recording(SMALL)
        rows = [{"input_ids": Sequences(padded=False)[index]["input_ids"].to(dtype)} for index in range(4)]
        trainer(tmp_path, max_steps=1).fit(model, DataLoader(rows, batch_size=4))
        seen.append(model.seen)
    assert seen[0] == seen[1]


def test_bad_batches_are_refused_before_they_reach_the_network(tmp_path: Path) -> None:
    model = Ling(SMALL)
    with pytest.raises(ValueError, match="id 24, but the vocabulary has 24 entries"):
        trainer(tmp_path).fit(model, DataLoader([{"input_ids": torch.tensor([1, 24])}]))
    with pytest.raises(ValueError, match="id 24, but the vocabulary has 24 entries"):
        trainer(tmp_path).fit(model, DataLoader([{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 24])}]))
    with pytest.raises(ValueError, match="id -1, but"):
        trainer(tmp_path).fit(model, DataLoader([{"input_ids": torch.tensor([1, -1])}]))
    with pytest.raises(ValueError, match="dictionaries with input_ids"):
        trainer(tmp_path).fit(model, DataLoader([torch.tensor([1, 2])]))


def test_a_mask_reaches_attention_only_where_padding_is_on_the_left() -> None:
    model = Ling(SMALL)
    ids = torch.tensor([[1, 2, 3]])
    for mask, kept in (([1, 1, 1], set()), ([1, 1, 0], {"valid_mask"}), ([0, 1, 1], {"attention_mask"})):
        batch = model.on_before_batch_transfer({"input_ids": ids, "attention_mask": torch.tensor([mask])}, 0)
        assert batch.keys() - {"input_ids"} == kept


def test_labels_are_the_ids_that_a_token_of_the_same_document_precedes() -> None:
    model = Ling(SMALL)
    ids = torch.arange(1, 7)[None]
    for mask, positions, counted in (
        (None, None, [1, 2, 3, 4, 5, 6]),
        ([1, 1, 1, 1, 0, 0], None, [1, 2, 3, 4, -100, -100]),
        ([0, 0, 1, 1, 1, 1], None, [-100, -100, -100, 4, 5, 6]),
        (None, [0, 1, 2, 0, 1, 2], [-100, 2, 3, -100, 5, 6]),
        ([1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 2, 3], [-100, 2, -100, 4, 5, -100]),
    ):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        batch = {name: torch.as_tensor(value).view(1, -1) for name, value in given.items() if value is not None}
        assert counted_labels(model.on_before_batch_transfer(batch, 0)).tolist() == [counted]
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6]]  # the batch is as it was


def test_prompts_padded_on_the_right_are_refused_not_continued_after_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ling(SMALL)
    tokenizer = SimpleNamespace(eos_id=22, decode=lambda ids: " ".join(map(str, ids)))
    monkeypatch.setattr(model, "_tokenizer", lambda: tokenizer)

    def predict(rows: list[list[int]]) -> list[str]:
        ids = torch.tensor(rows)
        batch = {"input_ids": ids, "attention_mask": (ids != 23).long(), "index": torch.arange(2), "prompt": ["", ""]}
        return model.predict_step(model.on_before_batch_transfer(batch, 0), 0)["text"]

    assert predict([[1, 2, 3], [23, 23, 4]])[0] == predict([[1, 2, 3], [23, 4, 5]])[0]
    with pytest.raises(ValueError, match="Row 1 of attention_mask has padding after a token"):
        predict([[1, 2, 3], [4, 23, 23]])


def test_sampled_texts_depend_on_the_number_of_the_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ling(SMALL, generation=Generation(max_new_tokens=6, temperature=1.0))
    tokenizer = SimpleNamespace(eos_id=22, decode=lambda ids: " ".join(map(str, ids)))
    monkeypatch.setattr(model, "_tokenizer", lambda: tokenizer)

    def predict(numbers: list[int]) -> list[str]:
        ids = torch.tensor([[1, 2, 3]]).expand(len(numbers), 3)
        batch = {"input_ids": ids, "index": torch.tensor(numbers), "prompt": [""] * len(numbers)}
        return model.predict_step(batch, 0)["text"]

    together = predict([0, 1, 2, 3, 4])
    assert len(set(together)) == 5
    assert predict([4, 2]) == [together[4], together[2]] and predict([3]) == [together[3]]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"aux_coef": -1.0}, "aux_coef=-1.0"), ({"aux_scope": "node"}, "aux_scope='node'"), ({"experts": "fast"}, "experts='fast'"),
     ({"router_momentum": 1.0}, "router_momentum=1.0"), ({"loss_chunk": -2}, "loss_chunk=-2")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Ling(SMALL, **options)


# Preferences


def test_entries_of_an_architecture_can_be_changed_and_are_kept(tmp_path: Path) -> None:
    save_hf(LingForCausalLM(SMALL), tmp_path / "released")
    long = {"rope_theta": 5e4, "max_position_embeddings": 64}
    model = Ling(checkpoint=str(tmp_path / "released"), config_changes=long)
    assert model.config == load_hf(tmp_path / "released").config.replace(**long)
    assert all(map(torch.equal, model.network.parameters(), load_hf(tmp_path / "released").parameters()))
    fitting = trainer(tmp_path, max_steps=1)
    fitting.fit(model, Periods())
    fitting.save_checkpoint(tmp_path / "long.ckpt")
    again = Ling.load_from_checkpoint(tmp_path / "long.ckpt")
    assert again.config == model.config and again.hparams["config_changes"] is None
    assert Ling(SMALL, config_changes=long).config == SMALL.replace(**long)
    with pytest.raises(ValueError, match="LingConfig has no rope_base; it has vocab_size"):
        Ling(checkpoint=str(tmp_path / "released"), config_changes={"rope_base": 5e4})
    with pytest.raises(ValueError, match="do not fit its configuration"):
        Ling(checkpoint=str(tmp_path / "released"), config_changes={"moe_intermediate_size": 4})


class Pairs(Dataset[dict[str, Tensor]]):
    """The answer that repeats the prompt is preferred to another."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chosen = Sequences()[3 * index + 1]["input_ids"]
        rejected = torch.cat([chosen[:6], chosen[6:].flip(0)])
        labels = torch.full_like(chosen, -100)
        pair = {"chosen_input_ids": chosen, "rejected_input_ids": rejected, "index": torch.tensor(index)}
        for side in ("chosen", "rejected"):
            pair[f"{side}_labels"] = torch.cat([labels[:6], pair[f"{side}_input_ids"][6:]])
        return pair


def test_preferences_start_at_ln_2_are_learned_and_keep_their_reference(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    # Without the routers' losses, so that the loss is that of the preferences alone.
    model = LingDPO(config=SMALL, nll_weight=0.0, aux_coef=0.0, z_coef=0.0, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    start = {name: value.clone() for name, value in model.network.state_dict().items()}
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            losses.append(outputs["loss"].item())

    loader = DataLoader(Pairs(), batch_size=8)
    fitting = trainer(tmp_path, max_steps=30, callbacks=[Watch()])
    fitting.fit(model, loader)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    (values,) = fitting.validate(model, loader, verbose=False)
    assert values["val/accuracy"] > 0.9 and values["val/margin"] > 0
    fitting.save_checkpoint(tmp_path / "dpo.ckpt")
    again = LingDPO.load_from_checkpoint(tmp_path / "dpo.ckpt")
    (same,) = trainer(tmp_path).validate(again, loader, verbose=False)
    assert same == pytest.approx(values)
    assert all(torch.equal(value, start[name]) for name, value in again._reference[0].state_dict().items())
    assert not any("reference" in name for name in again.state_dict())


def test_routers_losses_count_in_preference_training_without_padding(tmp_path: Path) -> None:
    batch = next(iter(DataLoader(Pairs(), batch_size=8)))
    masks = {f"{side}_attention_mask": torch.ones_like(batch[f"{side}_labels"]) for side in ("chosen", "rejected")}
    model = LingDPO(config=SMALL, aux_coef=0.5, z_coef=0.25)
    fitting = trainer(tmp_path, max_steps=1)
    seen = []
    model.training_step = lambda *args: seen.append(LingDPO.training_step(model, *args)) or seen[-1]  # type: ignore[method-assign]
    fitting.fit(model, DataLoader([batch | masks], batch_size=None))
    values = fitting.callback_metrics
    parts = values["train/preference"] + 0.05 * values["train/nll"] + 0.5 * values["train/aux"] + 0.25 * values["train/z"]
    assert seen[0].item() == pytest.approx(parts.item()) and values["train/aux"] > 1.5
    assert model.router_stats is not None and model.router_stats.counts.sum() == 2 * 2 * 16 * 12  # layers, k, answers, tokens
    padding = {name: torch.nn.functional.pad(mask, (0, 3)) for name, mask in masks.items()}
    wider = {name: torch.nn.functional.pad(batch[name], (0, 3), value=-100 if "labels" in name else 23) for name in batch
             if name != "index"}  # fmt: skip
    again = LingDPO(config=SMALL, aux_coef=0.5, z_coef=0.25)
    again.network.load_state_dict(model._reference[0].state_dict())  # the weights of before the step
    fitting = trainer(tmp_path, max_steps=1)
    fitting.fit(again, DataLoader([batch | wider | padding], batch_size=None))
    for name in ("train/preference", "train/nll", "train/aux", "train/z"):
        assert fitting.callback_metrics[name].item() == pytest.approx(values[name].item(), abs=1e-6)


def test_preferences_are_judged_by_the_reference_that_is_named_in_every_stage(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    save_hf(LingForCausalLM(SMALL), tmp_path / "reference")
    model = LingDPO(config=SMALL, reference=str(tmp_path / "reference"))
    loader = DataLoader(Pairs(), batch_size=8)
    (values,) = trainer(tmp_path).validate(model, loader, verbose=False)
    (tested,) = trainer(tmp_path).test(LingDPO(config=SMALL, reference=str(tmp_path / "reference")), loader, verbose=False)
    assert abs(values["val/margin"]) > 1e-5 and abs(tested["test/margin"]) > 1e-5  # not by itself, which would be 0
    assert tested.keys() == {"test/loss", "test/accuracy", "test/margin"}
    save_hf(LingForCausalLM(SMALL.replace(vocab_size=30)), tmp_path / "other")
    with pytest.raises(ValueError, match="has a vocabulary of 30, the model one of 24"):
        trainer(tmp_path).fit(LingDPO(config=SMALL, reference=str(tmp_path / "other")), loader)
    with pytest.raises(FileNotFoundError, match="There is no nowhere: give the folder"):
        trainer(tmp_path).fit(LingDPO(config=SMALL, reference="nowhere"), loader)


def test_the_reference_is_what_training_goes_on_from(tmp_path: Path) -> None:
    """A checkpoint of plain training has no reference: its weights are, and not those that it replaced."""
    loader = DataLoader(Pairs(), batch_size=8)
    plain = LingDPO(config=SMALL, reference="precomputed")
    fitting = trainer(tmp_path, max_steps=1)
    logps = [
        sample | {f"reference_{side}_logps": torch.tensor(-9.0) for side in ("chosen", "rejected")}
        for sample in map(Pairs().__getitem__, range(16))
    ]
    fitting.fit(plain, DataLoader(logps, batch_size=8))
    fitting.save_checkpoint(tmp_path / "plain.ckpt")
    model = LingDPO(config=SMALL)
    trainer(tmp_path, max_steps=2).fit(model, loader, ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    known = plain.network.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in model._reference[0].state_dict().items())


def test_preferences_need_their_entries(tmp_path: Path) -> None:
    model = LingDPO(config=SMALL, reference="precomputed")
    with pytest.raises(ValueError, match=r"lacks reference_chosen_logps, reference_rejected_logps, which .* the data file gives"):
        trainer(tmp_path).fit(model, DataLoader(Pairs(), batch_size=8))
    with pytest.raises(ValueError, match="as the DataModule Preferences gives them: set data: Preferences"):
        trainer(tmp_path).fit(LingDPO(config=SMALL), DataLoader(Sequences(), batch_size=8))
    narrow = [{**sample, "chosen_input_ids": sample["chosen_input_ids"][:-1]} for sample in map(Pairs().__getitem__, range(16))]
    with pytest.raises(ValueError, match="pad all answers of a batch to one width"):
        trainer(tmp_path).fit(LingDPO(config=SMALL), DataLoader(narrow, batch_size=8))
    with pytest.raises(ValueError, match=r"with input_ids, .* not a dictionary with chosen_input_ids, rejected_input_ids"):
        trainer(tmp_path).fit(Ling(SMALL), DataLoader(Pairs(), batch_size=8))
    with pytest.raises(ValueError, match="beta=0"):
        LingDPO(config=SMALL, beta=0)


def test_means_of_an_evaluation_are_exact_in_half_precision() -> None:
    metrics = Ling(SMALL).bfloat16().val_metrics
    for number in range(600):
        metrics.loss.update(torch.tensor(2.35 + number % 2), torch.tensor(1 + number % 3))
    metrics.loss.update(torch.tensor(math.nan), torch.tensor(0))  # of a batch in which nothing counts
    assert metrics.compute()["loss"].item() == pytest.approx(2.85, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_in_mixed_bfloat16_whatever_the_optimizer(tmp_path: Path, fused: bool) -> None:
    model = Ling(SMALL, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=fused))
    norms: list[float] = []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.extend([torch.nn.utils.get_total_norm(grads).item()] if grads else [])

    trainer = Trainer(
        accelerator="cpu", precision="bf16-mixed", gradient_clip_val=0.01, max_steps=2, callbacks=[Watch()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, Periods())
    assert norms and max(norms) == pytest.approx(0.01, rel=1e-3)
    assert "clip_gradients" not in vars(trainer.precision_plugin)


@pytest.mark.parametrize(
    ("eos", "pad", "fits"), [(22, 23, True), (22, 22, False), (0, 23, False), (22, 1, False), (23, 23, False)]
)
def test_marks_of_another_tokenizer_are_refused_before_training(eos: int, pad: int, fits: bool) -> None:
    model = Ling(SMALL)
    if fits:
        check_special_tokens(model.config, eos, pad)
    else:
        with pytest.raises(ValueError, match=f"--model.config.eos_token_id {eos} --model.config.pad_token_id {pad}"):
            check_special_tokens(model.config, eos, pad)
    check_special_tokens(SMALL.replace(pad_token_id=eos, eos_token_id=[3, eos]), eos, pad)
    check_special_tokens(SMALL.replace(pad_token_id=None, eos_token_id=None), eos, pad)


def test_small_updates_of_true_half_precision_are_warned_of(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", precision="bf16-true", max_steps=1, logger=False, enable_checkpointing=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="adds its updates to bfloat16 weights"):
        trainer.fit(Ling(SMALL), Periods())
