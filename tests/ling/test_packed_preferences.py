"""Preference training on packed answers is that on padded ones: losses, rewards, metrics, gradients, weights."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Callback, Trainer, seed_everything
from sweep import sweep
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import Preferences
from zoo.ling import Ling, LingConfig, LingDPO
from zoo.lm.dpo_loss import unpack

CONFIG = LingConfig(
    vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, rope_theta=1e4, max_position_embeddings=64,
    initializer_range=0.3, pad_token_id=None, eos_token_id=257,
)  # fmt: skip
SEQ_LEN = 40
NEAR = {"rtol": 1e-10, "atol": 1e-10}


def preferences(folder: Path, packed: bool, references: bool = False, **options: Any) -> Preferences:
    """Pairs of many lengths, with a format in each chosen answer."""
    rows = []
    for n in range(24):
        draws = torch.randint(97, 123, (60,), generator=torch.Generator().manual_seed(n)).tolist()
        text = "".join(map(chr, draws))
        answers = {"chosen": f"<{text[: n % 5]}>{text[5 : 6 + n % 13]}", "rejected": text[20 : 21 + n * 5 % 17] + ">" * (n % 2)}
        logps = {"reference_chosen_logps": -3.0 - n, "reference_rejected_logps": -20.0 + n} if references else {}
        rows.append({"prompt": text[40 : 40 + n % 7], **answers, **logps})
    folder.mkdir(exist_ok=True)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Preferences(
        path=path, packed=packed, **{"val_fraction": 0.0, "seq_len": SEQ_LEN, "batch_size": 8, "seed": 1, **options}
    )


def model_of(**options: Any) -> LingDPO:
    """A model of float64 whose reference, if it has one, is another."""
    seed_everything(5, verbose=False)
    model = LingDPO(config=CONFIG, **options).double()
    other = LingDPO(config=CONFIG).double().network
    if model.reference == "copy":
        model._keep(other)
    return model


def results(model: LingDPO, batch: Any) -> dict[str, Tensor]:
    """Everything that training on a batch gives, the gradients included."""
    model.zero_grad()
    found, _ = model.preferences(batch)
    loss = model.training_step(batch, 0)
    loss.backward()
    assert model.router_stats is not None
    values = {
        **found._asdict(),
        "accuracy": found.accuracy,
        "whole": loss,
        **model.last_losses,
        **model.router_stats._asdict(),
        **{f"gradient of {name}": parameter.grad for name, parameter in model.network.named_parameters()},
    }
    return {name: value.detach() for name, value in values.items()}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize(
    "options",
    sweep([{}, {"format_patterns": ["[<>]"]}, {"references": True}], quick=(0, 2)),
    ids=["all", "format", "precomputed"],
)
@pytest.mark.parametrize("aux_reduction", ["sum", "mean"])
def test_packed_batches_give_the_same_numbers_and_gradients(tmp_path: Path, options: dict[str, Any], aux_reduction: Any) -> None:
    model = model_of(
        reference="precomputed" if "references" in options else "copy", aux_coef=0.5, z_coef=0.25, aux_reduction=aux_reduction
    )
    loaders = [preferences(tmp_path, packed, **options).train_dataloader() for packed in (False, True)]
    for plain, packed in zip(*loaders, strict=True):
        assert len(packed["packed_input_ids"]) < 12, "several answers share rows"
        expected, found = results(model, plain), results(model, packed)
        assert expected["aux"] > 1 and expected["gradient of lm_head.weight"].abs().max() > 1e-4
        assert expected["preference"].item() != pytest.approx(math.log(2), abs=1e-5), "the reference is another"
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **NEAR, msg=name)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_only_the_format_counts_in_both_parts_of_the_loss(tmp_path: Path) -> None:
    (pair,) = [pair for pair in preferences(tmp_path, True, format_patterns=["[<>]"]).splits[0] if pair.key == '""'][:1]
    data = preferences(tmp_path, True, batch_size=1, format_patterns=["[<>]"])
    data.splits = ([pair], [])  # type: ignore[misc]
    (batch,) = data.train_dataloader()
    model = model_of(nll_weight=0.5)
    found, _ = model.preferences(batch)
    log_p = model.network(torch.tensor([pair.chosen])).logits.log_softmax(-1)[0]
    by_hand = [log_p[at - 1, number] for at, number in enumerate(pair.chosen) if chr(number) in "<>"]
    assert len(by_hand) == 2 and found.nll.item() == pytest.approx(-sum(by_hand).item() / 2, abs=1e-10)
    reference = model._reference[0](torch.tensor([pair.chosen])).logits.log_softmax(-1)[0]
    margin = sum(by_hand) - sum(reference[at - 1, number] for at, number in enumerate(pair.chosen) if chr(number) in "<>")
    assert found.chosen_reward_B.item() == pytest.approx(0.1 * margin.item(), abs=1e-10)
    if not pair.rejected_learned.any():
        assert found.rejected_reward_B.item() == 0


class Watch(Callback):
    """Keeps the losses of all steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        precision="64-true",
        callbacks=list(callbacks),
        **{"devices": 1, **silent, **options},
    )


def fit(folder: Path, packed: bool, batch_size: int = 4, **options: Any) -> tuple[list[float], dict[str, Any], dict[str, Tensor]]:
    """Losses of 8 steps over two epochs, metrics of validation and test, weights."""
    torch.set_default_dtype(torch.float64)
    try:
        watch = Watch()
        fitting = trainer(folder, watch, max_steps=8, **options)
        plain = {"aux_coef": 0.0, "z_coef": 0.0} if options else {}  # each process has a balance of its own
        model = model_of(optimizer=partial(torch.optim.SGD, lr=0.5), **plain)
        data = preferences(folder, packed, batch_size=batch_size, val_fraction=0.3)
        fitting.fit(model, data)
        metrics = {name: float(value) for name, value in fitting.callback_metrics.items()}
        (tested,) = fitting.test(model, data, verbose=False)
        return watch.losses, {**metrics, **tested}, {name: value.clone() for name, value in model.network.state_dict().items()}
    finally:
        torch.set_default_dtype(torch.float32)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **NEAR, msg=name)


def test_a_packed_run_is_the_padded_one(tmp_path: Path) -> None:
    (plain_losses, plain_metrics, plain), (losses, metrics, weights) = (
        fit(tmp_path / str(packed), packed) for packed in (False, True)
    )  # fmt: skip
    assert len(plain_losses) == 8 and abs(plain_losses[0] - plain_losses[-1]) > 1e-3
    assert losses == pytest.approx(plain_losses, abs=1e-10)
    assert {"train/accuracy", "train/aux", "val/margin", "val/accuracy", "test/loss"} <= metrics.keys()
    assert metrics == pytest.approx(plain_metrics, abs=1e-10)
    equal(plain, weights)


def fit_on_ranks(folder: Path) -> dict[str, Tensor]:
    return fit(folder, packed=True, batch_size=2, devices=2, strategy="ddp", use_distributed_sampler=False)[2]


def test_packed_pairs_on_two_processes_are_the_padded_ones_on_one(pool: RankPool, tmp_path: Path) -> None:
    _, _, plain = fit(tmp_path / "one", packed=False, devices=1)
    for weights in pool.run(fit_on_ranks, tmp_path / "two", world_size=2):
        equal(plain, weights)


def test_unpacking_is_the_inverse_of_packing_and_hands_gradients_back() -> None:
    value = torch.arange(8.0).view(2, 4).requires_grad_()
    answer = torch.tensor([[2, 2, 0, 0], [1, 1, 1, 1]])
    position = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    rows = unpack(value, answer, position, 3, fill=-100)
    assert rows.tolist() == [[2, 3, -100, -100], [4, 5, 6, 7], [0, 1, -100, -100]]
    weights = torch.arange(12.0).view(3, 4)
    (rows * weights).sum().backward()
    assert torch.equal(value.grad, weights[answer, position])  # type: ignore[arg-type]


def broken(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    batch = {key: value.clone() for key, value in batch.items()}
    second = int((batch["packed_position_ids"][0] == 0).nonzero()[1])
    if name == "lost":
        batch["index"] = batch["index"][:-1]
    elif name == "torn":
        batch["packed_answer_ids"][0, second] = batch["packed_answer_ids"][0, 0]
    elif name == "uncounted":
        batch["packed_position_ids"][0, second + 1] = 5
    elif name == "twice":
        batch["packed_answer_ids"][batch["packed_answer_ids"] == 1] = 0
    elif name == "asked":
        batch["packed_labels"][0, second] = 7
    elif name == "unknown":
        batch["packed_input_ids"][0, 0] = 999
    elif name == "narrow":
        batch["packed_labels"] = batch["packed_labels"][:, 1:]
    else:
        del batch[name]
    return batch


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost", "number the 6 answers of 3 pairs"),
        ("torn", "number the 8 answers of 4 pairs, each in one piece"),
        ("uncounted", r"packed_position_ids count 0, 1, 2, \.\.\. in each"),
        ("twice", "number the 8 answers of 4 pairs"),
        ("asked", "nothing precedes the first token of a packed answer: its label must be -100"),
        ("unknown", "holds id 999, but the vocabulary has 259"),
        ("narrow", r"pad all answers of a batch to one width \(packed_input_ids"),
        ("index", "the batch lacks index"),
        ("packed_answer_ids", "the batch lacks packed_answer_ids"),
    ],
)
def test_batches_that_are_packed_otherwise_are_refused(tmp_path: Path, name: str, message: str) -> None:
    batch = next(iter(preferences(tmp_path, True, batch_size=4).train_dataloader()))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(model_of(), DataLoader([broken(batch, name)], batch_size=None))


def test_plain_training_does_not_take_packed_pairs_for_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dictionaries with input_ids, .* not a dictionary with index, packed_input_ids"):
        trainer(tmp_path, max_steps=1).fit(Ling(CONFIG), preferences(tmp_path, True))
    with pytest.raises(ValueError, match=r"lacks reference_chosen_logps, reference_rejected_logps, which .* the data file gives"):
        trainer(tmp_path, max_steps=1).fit(model_of(reference="precomputed"), preferences(tmp_path, True))
