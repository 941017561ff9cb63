"""Questions with stored rationales, to distil chains of thought from; source: Feng et al., ICML 2024 (arXiv 2405.16064).

Shape suffixes: B examples, S places of an example, N ids of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypedDict, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.held_out import divide
from datamodules.base.loader import ResumableLoader
from datamodules.conversations.length_policy import LengthPolicy
from datamodules.conversations.rationale_files import CONNECTOR, NAMED_SOURCES, Rationale, read_rationales, source_path
from datamodules.conversations.steps import StepSplitter
from datamodules.text.prompts import Prompt, PromptBatch, Prompts, read_prompts
from datamodules.text.split_data import SplitData
from datamodules.text.text import check_val_fraction
from datamodules.text.tokenizer import Tokenizer

__all__ = ["Example", "QuestionBatch", "Questions", "RationaleBatch", "RationaleRows", "Rationales", "encode_rationale"]


def question_text(question: str) -> str:
    """The text up to the rationale (section 3.1 of the paper)."""
    return f"Q: {question} A: Let's think step by step"


def whole_text(text: Rationale) -> str:
    """The text of an example; the question's alone where there is no rationale."""
    question = question_text(text.question)
    return f"{question} {text.rationale} {CONNECTOR} {text.answer}" if text.rationale else question


class Example(NamedTuple):
    """An encoded example: question, rationale, answer, eos; a question alone where there is no rationale.

    Attributes:
        text: Its parts as text.
        ids: Its ids, int32 (N,).
        step_ids: The step of each id of the rationale, from 0, and -1 elsewhere, int32 (N,).
        num_question: Number of the question's ids, which come first.
        group: Of a held-out example: ``templates`` if training has nothing of its template, else ``items``.
    """

    text: Rationale
    ids: np.ndarray
    step_ids: np.ndarray
    num_question: int
    group: str = "items"


def encode_rationale(text: Rationale, tokenizer: Tokenizer, splitter: StepSplitter) -> Example:
    """Encode ``Q: question A: Let's think step by step rationale Therefore, the answer is answer`` and an eos.

    It is encoded as one text. A token belongs to the part in which it begins; space between two parts is the latter's, so that
    the question's ids are those of `question_text`, which generation continues.

    Raises:
        ValueError: The tokenizer does not know the characters of its ids, or writes the question otherwise if it stands alone.
    """
    question = question_text(text.question)
    question_ids = tokenizer.encode(question)
    if not text.rationale:
        ids_N = np.array(question_ids, dtype=np.int32)
        return Example(text, ids_N, np.full_like(ids_N, -1), len(ids_N))
    rationale = f" {text.rationale}"
    ids, spans_N2 = tokenizer.encode_with_spans(whole_text(text))
    start, stop = np.searchsorted(spans_N2[:, 0], [len(question), len(question) + len(rationale)])
    if ids[:start] != question_ids:
        raise ValueError(
            f"The tokenizer joins the end of a question with its rationale ({text.question[:60]!r}): take one whose tokens do not"
            " reach over spaces."
        )
    step_N = np.full(len(ids) + 1, -1, dtype=np.int32)
    step_N[start:stop] = splitter.step_ids(rationale, spans_N2[start:stop] - len(question))
    return Example(text, np.array([*ids, tokenizer.eos_id], dtype=np.int32), step_N, int(start))


class RationaleBatch(TypedDict, total=False):
    """A batch of examples, padded on the right to the longest.

    Attributes:
        input_ids: int64 (B, S).
        attention_mask: int64 (B, S), 0 for padding.
        labels: int64 (B, S), the ids of rationale, answer and eos, not shifted; -100 elsewhere.
        step_ids: int64 (B, S), the step of each id of the rationale, from 0; -1 elsewhere.
        index: int64 (B,), number of the example in its split; -1 for one that does not count, which in evaluation is given to a
            process with one batch fewer than others.
        new_template: bool (B,), whether training has nothing of the example's template.
        retried: bool (B,), whether the example had been put back; in training.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    step_ids: Tensor
    index: Tensor
    new_template: Tensor
    retried: Tensor


class RationaleRows(Dataset[Any]):
    """Examples as rows of batches.

    Args:
        examples: The examples; those of training in the order of the file.
        pad_id: Fills up on the right.
    """

    def __init__(self, examples: Sequence[Example], pad_id: int) -> None:
        self.examples = examples
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in cast(dict[str, Tensor], self.batch([index])).items()}

    def batch(self, indices: list[int]) -> RationaleBatch:
        """A whole batch."""
        chosen = [self.examples[index] for index in indices]
        shape = (len(chosen), max(len(example.ids) for example in chosen))
        ids_BS, mask_BS = torch.full(shape, self.pad_id), torch.zeros(shape, dtype=torch.int64)
        labels_BS, step_BS = torch.full(shape, -100), torch.full(shape, -1)
        for row, example in enumerate(chosen):
            length = len(example.ids)
            ids_BS[row, :length] = torch.from_numpy(example.ids)
            mask_BS[row, :length] = 1
            labels_BS[row, example.num_question : length] = ids_BS[row, example.num_question : length]
            step_BS[row, :length] = torch.from_numpy(example.step_ids)
        return {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "labels": labels_BS,
            "step_ids": step_BS,
            "index": torch.tensor(indices),
            "new_template": torch.tensor([example.group == "templates" for example in chosen]),
        }

    def blank(self) -> RationaleBatch:
        """A batch in which nothing counts."""
        batch = self.batch([0])
        return {
            **batch,
            "labels": torch.full_like(batch["labels"], -100),
            "step_ids": torch.full_like(batch["step_ids"], -1),
            "index": torch.tensor([-1]),
        }


class QuestionBatch(PromptBatch):
    """Batch of questions to answer; ``prompt`` is the question with the words around it.

    Attributes:
        question: B questions.
        answer: B true answers; empty where none is known.
        group: B groups, ``items`` or ``templates``, as those of `Example`; empty where there is no question.
    """

    question: list[str]
    answer: list[str]
    group: list[str]


class Questions(Prompts):
    """Questions of examples in their order; rationales that follow one another with the same question give one.

    Args:
        examples: The examples.
        pad_id: Fills up on the left.
    """

    def __init__(self, examples: Sequence[Example], pad_id: int) -> None:
        again = [bool(one.text.rationale) and one.text.question == two.text.question for one, two in pairwise(examples)]
        self.examples = [example for example, known in zip(examples, [False, *again], strict=True) if not known]
        prompts = [Prompt(question_text(each.text.question), each.ids[: each.num_question].tolist()) for each in self.examples]
        super().__init__(prompts, pad_id)

    @override
    def batch(self, indices: list[int]) -> QuestionBatch:
        chosen = [self.examples[index] for index in indices]
        return {
            **super().batch(indices),
            "question": [example.text.question for example in chosen],
            "answer": [example.text.answer for example in chosen],
            "group": [example.group for example in chosen],
        }

    @override
    def blank(self) -> QuestionBatch:
        return {**super().blank(), "question": [""], "answer": [""], "group": [""]}


class Rationales(SplitData):
    """Questions with a teacher's rationales and answers, and the steps of the rationales.

    Training batches are those of `RationaleBatch`. Validation and test have two loaders: held-out examples in such batches, and
    their questions to be answered (`QuestionBatch`); sources without rationales have the second alone. ``predict`` asks the
    held-out questions, or all if none is held out; ``predict_prompts`` is a ``.txt`` with a question a line, or any file that
    ``source`` may be.

    Args:
        source: ``gsm-symbolic`` (8,500 rationales of 85 templates, shipped); ``asdiv`` or ``commonsenseqa`` (2,305 and 1,221
            questions without rationales, to evaluate on; fetched once, 20 MB); or a file
            (:mod:`datamodules.conversations.rationale_files`).
        val_source: Another source for validation. ``null``: parts of ``source``.
        val_fraction: Share of the questions that is held out, by a fixed hash of the question: new items of templates that are
            trained on. 0: none. Without effect if ``val_source`` is given.
        template_fraction: Share of the templates that is held out whole, by a fixed hash of the template. 0: none. Without effect
            if ``val_source`` is given.
        num_train: Examples to train on, evenly spaced in the file. ``null``: all that are not held out.
        num_val: Held-out examples of each group, new items and new templates, evenly spaced in the file. ``null``: all.
        ask_questions: Whether validation and test have the loader of questions.
        step_split: End of a step: ``period`` (a sentence or a line), ``line``, or a regular expression.
        filter_wrong: Whether rationales that do not reach the answer are left out; their number is logged.
        max_length: Ids that an example may have, its eos among them.
        too_long: Treatment of longer examples: an error (``raise``), or they are left out (``skip``); none is cut.
        predict_on: Subject of ``predict``: ``questions`` to answer, or the examples of ``train`` with their rationales, in order.
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: A number out of range, or ``step_split`` is no regular expression.
    """

    sample_name = "example"

    def __init__(
        self,
        source: str = "gsm-symbolic",
        val_source: str | None = None,
        val_fraction: float = 0.05,
        template_fraction: float = 0.0,
        num_train: int | None = None,
        num_val: int | None = None,
        ask_questions: bool = True,
        step_split: str = "period",
        filter_wrong: bool = True,
        max_length: int = 512,
        too_long: Literal["raise", "skip"] = "raise",
        predict_on: Literal["questions", "train"] = "questions",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_val_fraction(val_fraction)
        if not 0 <= template_fraction < 1:
            raise ValueError(f"template_fraction={template_fraction} must be from 0 to less than 1.")
        for name, value in (("num_train", num_train), ("num_val", num_val), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.source_name = source
        self.val_source = val_source
        self.val_fraction = val_fraction
        self.template_fraction = template_fraction
        self.num_train = num_train
        self.num_val = num_val
        self.ask_questions = ask_questions
        self.splitter = StepSplitter(step_split)
        self.filter_wrong = filter_wrong
        self.max_length = max_length
        self.too_long = too_long
        self.predict_on = predict_on

    @override
    def prepare_data(self) -> None:
        """Fetch the sources that are not here."""
        for source in {self.source_name, self.val_source} & NAMED_SOURCES.keys():
            source_path(str(source))

    @property
    @override
    def source(self) -> str:
        """The name or the file."""
        return self.source_name

    @cached_property
    @override
    def splits(self) -> tuple[list[Example], list[Example]]:
        """The examples for training, and those held out: new items, then new templates."""
        rows = read_rationales(source_path(self.source_name), self.on_error, self.filter_wrong)
        without = sum(not row.rationale for row in rows)
        if 0 < without < len(rows):
            raise ValueError(
                f"{without} of {len(rows)} rows of {self.source} have no rationale: give one to each, or to none for a source to"
                " evaluate on."
            )
        items: list[Rationale] = rows if without else []
        templates: list[Rationale] = []
        if self.val_source is not None:
            items = read_rationales(source_path(self.val_source), self.on_error, self.filter_wrong)
        elif not without:
            if self.template_fraction and not all(row.template for row in rows):
                raise ValueError(f"{self.source} names no templates, which template_fraction would hold out: set it to 0.")
            rows, templates = divide(rows, self.template_fraction, lambda row: row.template)
            rows, items = divide(rows, self.val_fraction, lambda row: row.question)
        train = [] if without else self.encode(rows, self.source, self.num_train)
        val = [
            example._replace(group=group)
            for group, held_out in (("items", items), ("templates", templates))
            for example in (self.encode(held_out, self.val_source or self.source, self.num_val) if held_out else [])
        ]
        rank_zero_info(
            f"{len(train):,} examples of {self.source} for training, with {sum(len(example.ids) for example in train):,} ids and"
            f" {sum(int(example.step_ids.max()) + 1 for example in train):,} steps; {len(val):,} for validation."
        )
        return train, val

    def encode(self, rows: Sequence[Rationale], source: str, number: int | None = None) -> list[Example]:
        """Encode rows of a source; those that are too long are left out, if that is no error.

        Args:
            rows: The rows.
            source: Name for an error.
            number: Examples that are taken of the rest, evenly spaced. ``None``: all.

        Raises:
            ValueError: One is too long, where that is an error, or all are.
        """
        policy = LengthPolicy("skip", self.max_length, "max_length")
        lengths = (len(ids) for ids in self.tokenizer.encode_many([whole_text(row) for row in rows]))  # without eos
        kept = [
            row for row, length in zip(rows, lengths, strict=True) if policy.keeps(length + bool(row.rationale), remains=False)
        ]
        if policy.left_out and (self.too_long == "raise" or not kept):
            raise ValueError(
                f"{policy.left_out} of {policy.total} examples of {source} have more than max_length={self.max_length} ids, the"
                f" longest {policy.longest}: raise max_length"
                + (", or leave such out with too_long: skip." if self.too_long == "raise" else ".")
            )
        policy.report(source, "examples")
        return [encode_rationale(row, self.tokenizer, self.splitter) for row in _spread(kept, number)]

    @property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256, in hexadecimal, of ``data`` (ids and steps of the training examples, in order) and of the ``tokenizer``."""
        digest = hashlib.sha256()
        for example in self.splits[0]:
            digest.update(np.array([len(example.ids), example.num_question], dtype="<i4").tobytes())
            digest.update(np.stack([example.ids, example.step_ids]).astype("<i4").tobytes())
        return {"data": digest.hexdigest(), "tokenizer": hashlib.sha256(self.tokenizer.fingerprint.encode()).hexdigest()}

    @property
    def train_questions(self) -> list[str]:
        """The questions of the training examples, in order."""
        return [example.text.question for example in self.splits[0]]

    def ordered_train_dataloader(self) -> ResumableLoader[Any]:
        """The training examples in order, each once, on one of the processes."""
        self._check_rationales()
        return self.eval_loader(self.batches(self.splits[0]))

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        self._check_rationales()
        return super().train_dataloader()

    @override
    def val_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        val = self.splits[1]
        whole = [example for example in val if example.text.rationale]
        loaders = [self.eval_loader(self.batches(whole))] if whole else []
        return [*loaders, self.eval_loader(Questions(val, self.tokenizer.pad_id))] if val and self.ask_questions else loaders

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of questions, or of training examples."""
        return self.ordered_train_dataloader() if self.predict_on == "train" else super().predict_dataloader()

    @override
    def _read_prompts(self) -> Questions:
        path = self.predict_prompts
        if path is None:
            train, val = self.splits
            return Questions(val or train, self.tokenizer.pad_id)
        if path.suffix == ".txt":
            prompts = read_prompts(path, self.tokenizer, self.template, self.on_error)
            rows = [Rationale(prompt.text.strip(), "", "") for prompt in prompts if prompt.text.strip()]
        else:
            rows = read_rationales(path, self.on_error, filter_wrong=False)
        if not rows:
            raise ValueError(f"{path} holds no question.")
        return Questions(self.encode(rows, str(path)), self.tokenizer.pad_id)

    @override
    def batches(self, samples: list[Example], training: bool = False) -> RationaleRows:
        return RationaleRows(samples, self.tokenizer.pad_id)

    def _check_rationales(self) -> None:
        if not self.splits[0]:
            raise ValueError(
                f"No example of {self.source} is left to train on: lower val_fraction, or, if it has no rationales, give it as"
                " val_source."
            )


def _spread(rows: list[Rationale], number: int | None) -> list[Rationale]:
    """So many of the rows, evenly spaced."""
    if number is None or number >= len(rows):
        return rows
    return [rows[place * len(rows) // number] for place in range(number)]
