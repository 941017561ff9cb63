"""Multiple choice in validation: the share of right answers, the same for every batch size and number of processes."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from zoo.callbacks import ChoiceEval

NUM_QUESTIONS = 11


def write_questions(folder: Path) -> str:
    """Questions i of 2 to 4 options; the first, which is the shortest, is right for those below 4, then the second."""
    rows = []
    for i in range(NUM_QUESTIONS):
        choices = [f"{'ab'[i % 2]}{i}", f"b{i} and more é", *(f"c{i} {n}" for n in range(i % 3))]
        rows.append({"question": f"q{'!' * (7 * i % 5)}{i}", "choices": choices, "answer": int(i >= 4)})
    path = folder / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


class Words:
    """A tokenizer: one id a word."""

    def encode(self, text: str) -> list[int]:
        return [0 for _ in text.split()]


class Data(lightning.LightningDataModule):
    tokenizer = Words()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2)

    val_dataloader = train_dataloader


class Reader(lightning.LightningModule):
    """Every character of a continuation costs 1 nat, an `a` at its start 0: the shortest is most likely, then those with a."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.calls: list[list[tuple[str, str]]] = []

    def loglikelihood(self, pairs: list[tuple[str, str]]) -> list[float]:
        assert not torch.is_grad_enabled() and not self.training
        self.calls.append(pairs)
        return [-float(len(text)) + text.startswith(" a") for _, text in pairs]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder: Path | str, callback: ChoiceEval, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "log_every_n_steps": 1, **options},
    )


def validated(folder: Path, model: Reader | None = None, **options: Any) -> dict[str, float]:
    callback = ChoiceEval(write_questions(folder), **options)
    trainer_of(folder, callback).validate(model or Reader(), Data(), verbose=False)
    assert callback.result is not None
    return callback.result


def test_accuracy_is_the_share_of_right_answers_with_its_error(tmp_path: Path) -> None:
    callback = ChoiceEval(write_questions(tmp_path))
    trainer = trainer_of(tmp_path, callback)
    logged = trainer.validate(Reader(), Data(), verbose=False)[0]
    # The shortest option is chosen, and right for 4 of 11.
    share = 4 / 11
    assert callback.result is not None and callback.result["num_questions"] == 11
    assert callback.result["accuracy"] == pytest.approx(share)
    assert callback.result["accuracy_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 10))
    for name in ("accuracy", "accuracy_stderr", "accuracy_norm", "accuracy_norm_stderr"):
        assert logged[f"val/quiz/{name}"] == pytest.approx(callback.result[name])


def test_normalization_is_by_bytes_or_tokens_of_the_option(tmp_path: Path) -> None:
    assert validated(tmp_path, normalization="bytes")["accuracy_norm"] == pytest.approx(
        sum(by_hand(i, lambda text: len(text.encode())) for i in range(11)) / 11
    )
    assert validated(tmp_path, normalization="tokens")["accuracy_norm"] == pytest.approx(
        sum(by_hand(i, lambda text: len(text.split())) for i in range(11)) / 11
    )
    assert set(validated(tmp_path, normalization="none")) == {"accuracy", "accuracy_stderr", "num_questions"}


def by_hand(i: int, size: Any) -> bool:
    """Whether question i is answered right, if log-likelihoods are divided by `size` of the option."""
    choices = [f"{'ab'[i % 2]}{i}", f"b{i} and more é", *(f"c{i} {n}" for n in range(i % 3))]
    scores = [(-len(text) - 1 + text.startswith("a")) / size(text) for text in choices]
    return scores.index(max(scores)) == int(i >= 4)


def test_options_are_asked_for_as_the_arguments_say(tmp_path: Path) -> None:
    model = Reader()
    found = validated(tmp_path, model, few_shot=2, limit=3, batch_size=2, name="mine")
    assert found["num_questions"] == 3 and [len({context for context, _ in call}) for call in model.calls] == [2, 1]
    contexts = {context.removeprefix("Question: q0\nAnswer: a0\n\nQuestion: q!!1\nAnswer: b1\n\n") for call in model.calls
                for context, _ in call}  # fmt: skip
    assert contexts == {f"Question: q{mark}\nAnswer:" for mark in ("!!!!2", "!3", "!!!4")}
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"question": "x", "choices": ["y", "z"], "answer": "B"}\n')
    model = Reader()
    options = {"few_shot": 1, "few_shot_path": str(examples), "target": "label", "template": "{question}{options}>"}
    found = validated(tmp_path, model, limit=1, separator="", **options)
    assert model.calls == [[("xA. y\nB. z>B\n\nq0A. a0\nB. b0 and more é>", letter) for letter in "AB"]]
    assert found["accuracy"] == 1 and math.isnan(found["accuracy_stderr"])


def test_batch_size_changes_nothing_and_passes_are_of_like_length(tmp_path: Path) -> None:
    results = []
    for batch_size in (1, 4, 100):
        model = Reader()
        results.append(validated(tmp_path, model, batch_size=batch_size))
        lengths = [len(context) for call in model.calls for context, _ in call]
        assert lengths == sorted(lengths, reverse=True)
        assert len(model.calls) == math.ceil(11 / batch_size)
    assert results[0] == results[1] == results[2]


def _validated_on_ranks(path: str, folder: str, batch_size: int) -> tuple[list[list[tuple[str, str]]], Any, Any]:
    model, callback = Reader(), ChoiceEval(path, batch_size=batch_size)
    trainer = trainer_of(folder, callback, devices=2, strategy="ddp")
    logged = trainer.validate(model, Data(), verbose=False)[0]
    return model.calls, callback.result, logged


def test_two_ranks_answer_each_question_once_and_find_the_same(tmp_path: Path, pool) -> None:
    path = write_questions(tmp_path)
    (calls_0, result_0, logged_0), (calls_1, result_1, logged_1) = pool.run(
        _validated_on_ranks, path, str(tmp_path), batch_size=4, world_size=2
    )
    assert [len({context for context, _ in call}) for call in calls_0] == [4, 2]
    assert len(calls_1) == 2  # equally many passes
    asked = [context for calls in (calls_0, calls_1) for call in calls for context in dict.fromkeys(c for c, _ in call)]
    # 11 questions on 2 ranks: the last one fills the second rank up, and is not counted twice.
    assert len(asked) == 12 and len(set(asked)) == 11
    assert result_0 == result_1 == validated(tmp_path) and logged_0 == logged_1


def test_every_validation_inside_fit_is_logged_but_the_sanity_check(tmp_path: Path) -> None:
    callback = ChoiceEval(write_questions(tmp_path), name="mine")
    logger = CSVLogger(tmp_path, name="", version="")
    model = Reader()
    trainer_of(tmp_path, callback, logger=logger, max_epochs=2, num_sanity_val_steps=1).fit(model, Data())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        values = [row["val/mine/accuracy"] for row in csv.DictReader(file) if row["val/mine/accuracy"]]
    assert list(map(float, values)) == pytest.approx([4 / 11, 4 / 11])
    assert len(model.calls) == 2


def test_mistakes_are_found_before_the_run_starts(tmp_path: Path) -> None:
    path = write_questions(tmp_path)
    for options, message in (
        ({"few_shot": -1}, "few_shot=-1"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"normalization": "words"}, "normalization='words' must be one of none, bytes, tokens"),
        ({"target": "letter"}, "ChoiceEval: target='letter'"),
    ):
        with pytest.raises(ValueError, match=message):
            ChoiceEval(path, **options)

    class Silent(Reader):
        loglikelihood = None  # type: ignore[assignment]

    class NoValidation(Data):
        val_dataloader = lightning.LightningDataModule.val_dataloader  # type: ignore[assignment]

    class NoTokenizer(Data):
        tokenizer = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"Silent has no method loglikelihood\(pairs\)"):
        trainer_of(tmp_path, ChoiceEval(path)).validate(Silent(), Data())
    with pytest.raises(ValueError, match="this run has none"):
        trainer_of(tmp_path, ChoiceEval(path), max_epochs=1).fit(Reader(), NoValidation())
    with pytest.raises(TypeError, match="needs a DataModule with a tokenizer"):
        trainer_of(tmp_path, ChoiceEval(path, normalization="tokens")).validate(Reader(), NoTokenizer())
    with pytest.raises(FileNotFoundError, match="no file of questions"):
        trainer_of(tmp_path, ChoiceEval(str(tmp_path / "none.jsonl"))).validate(Reader(), Data())
    with pytest.raises(ValueError, match=r"few_shot=11 examples and a question are more than .*quiz.jsonl holds \(11\)"):
        trainer_of(tmp_path, ChoiceEval(path, few_shot=11)).validate(Reader(), Data())
