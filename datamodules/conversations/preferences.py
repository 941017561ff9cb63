"""Pairs of answers, one preferred to the other, and rankings of several.

Shape suffixes: B pairs, T places in a row, R rows that hold several answers, N ids of an answer with its prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.held_out import divide
from datamodules.base.json_lines import MalformedRow, MalformedRows, encodable, is_finite, read_json_lines
from datamodules.conversations.best_of_n import BestOfN
from datamodules.conversations.format_tokens import FormatTokens
from datamodules.conversations.length_policy import LengthPolicy, TooLong
from datamodules.conversations.rankings import Ranking, Rankings
from datamodules.conversations.sft import pack
from datamodules.text.prompts import encode_prompt
from datamodules.text.split_data import SplitData
from datamodules.text.text import check_seq_len, check_val_fraction

__all__ = ["PackedPairBatch", "PackedPairs", "Pair", "PairBatch", "Pairs", "Preferences"]


class Pair(NamedTuple):
    """A prompt with two answers.

    Attributes:
        key: Decides whether it is for training or validation: the prompt.
        chosen: Ids of prompt and preferred answer.
        rejected: Ids of prompt and other answer.
        chosen_learned: Ids of ``chosen`` that count, bool (N,); none of the prompt's, at least one of the answer's.
        rejected_learned: The same of ``rejected``; where only a format counts, the answer may have nothing of it.
        reference_logps: Log-probabilities (nats) of the answers under a reference model, preferred one first, or ``None``.
    """

    key: str
    chosen: list[int]
    rejected: list[int]
    chosen_learned: np.ndarray
    rejected_learned: np.ndarray
    reference_logps: tuple[float, float] | None

    @property
    def longest(self) -> int:
        """Ids of the longer answer with its prompt."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def differs(self) -> bool:
        """Whether something of the chosen answer counts, and the two are not the same."""
        return bool(self.chosen_learned.any()) and self.chosen != self.rejected

    def cut(self, length: int) -> Pair:
        """The pair with no more than so many ids of each answer with its prompt."""
        return self._replace(
            chosen=self.chosen[:length],
            rejected=self.rejected[:length],
            chosen_learned=self.chosen_learned[:length],
            rejected_learned=self.rejected_learned[:length],
        )


class PairBatch(TypedDict, total=False):
    """A batch of pairs; both answers are padded, on the right, to the longest of all, so that they can be stacked.

    Attributes:
        chosen_input_ids: int64 (B, T).
        chosen_labels: int64 (B, T), the ids of the answer and its eos, or those of them that are format; -100 elsewhere.
        chosen_attention_mask: int64 (B, T).
        rejected_input_ids: int64 (B, T).
        rejected_labels: int64 (B, T).
        rejected_attention_mask: int64 (B, T).
        index: int64 (B,), number of the pair in its data set; -1 for one that does not count, which in evaluation is given to a
            process with one batch fewer than others.
        reference_chosen_logps: float32 (B,), where the file gives them.
        reference_rejected_logps: float32 (B,).
        retried: bool (B,), whether the pair had been put back; in training.
    """

    chosen_input_ids: Tensor
    chosen_labels: Tensor
    chosen_attention_mask: Tensor
    rejected_input_ids: Tensor
    rejected_labels: Tensor
    rejected_attention_mask: Tensor
    index: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    retried: Tensor


class PackedPairBatch(TypedDict, total=False):
    """A batch of pairs whose answers share rows, without seeing one another; padded, on the right, to the fullest row.

    Answers have numbers: pair b's chosen one is b, its rejected one B + b. Each begins with its prompt, and lies in one row.

    Attributes:
        index: int64 (B,), as that of `PairBatch`.
        packed_input_ids: int64 (R, T).
        packed_labels: int64 (R, T), as the labels of `PairBatch`.
        packed_attention_mask: int64 (R, T), 0 for padding.
        packed_position_ids: int64 (R, T), from 0 in each answer; padding continues the last one.
        packed_answer_ids: int64 (R, T), the number of the answer; padding has that of the last one.
        reference_chosen_logps: float32 (B,), where the file gives them.
        reference_rejected_logps: float32 (B,).
        retried: bool (B,), whether the pair had been put back; in training.
    """

    index: Tensor
    packed_input_ids: Tensor
    packed_labels: Tensor
    packed_attention_mask: Tensor
    packed_position_ids: Tensor
    packed_answer_ids: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    retried: Tensor


class Pairs(Dataset[PairBatch]):
    """Pairs as batches of one row an answer.

    Args:
        pairs: The pairs.
        pad_id: Fills up on the right.
    """

    def __init__(self, pairs: list[Pair], pad_id: int) -> None:
        self.pairs = pairs
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PairBatch:
        return cast(PairBatch, {name: value[0] for name, value in cast(dict[str, Tensor], self.batch([index])).items()})

    def batch(self, indices: list[int]) -> PairBatch:
        """A whole batch of pairs."""
        pairs = [self.pairs[index] for index in indices]
        width = max(pair.longest for pair in pairs)
        batch: dict[str, Tensor] = {}
        for name in ("chosen", "rejected"):
            ids_BT = torch.full((len(pairs), width), self.pad_id)
            labels_BT, mask_BT = torch.full_like(ids_BT, -100), torch.zeros_like(ids_BT)
            for row, pair in enumerate(pairs):
                ids, labels = _ids_and_labels(pair, name)
                ids_BT[row, : len(ids)], labels_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, labels, 1
            batch |= {f"{name}_input_ids": ids_BT, f"{name}_labels": labels_BT, f"{name}_attention_mask": mask_BT}
        return cast(PairBatch, {**batch, "index": torch.tensor(indices), **_references(pairs)})

    def blank(self) -> PairBatch:
        """A batch in which nothing counts."""
        return {**self.batch([0]), "index": torch.tensor([-1])}


class PackedPairs(Dataset[PackedPairBatch]):
    """Pairs as batches whose answers share rows: as few as a simple rule can (:func:`~datamodules.conversations.sft.pack`).

    A batch is a pure function of its pairs. Since rows belong to a batch, a single pair is a batch of one.

    Args:
        pairs: The pairs; no answer has more than ``seq_len`` ids.
        pad_id: Fills up on the right.
        seq_len: Ids that a row may have.
    """

    def __init__(self, pairs: list[Pair], pad_id: int, seq_len: int) -> None:
        self.pairs = pairs
        self.pad_id = pad_id
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PackedPairBatch:
        return self.batch([index])

    def batch(self, indices: list[int]) -> PackedPairBatch:
        """A whole batch of pairs."""
        pairs = [self.pairs[index] for index in indices]
        answers = [_ids_and_labels(pair, name) for name in ("chosen", "rejected") for pair in pairs]
        rows = pack([len(ids) for ids, _ in answers], self.seq_len)
        width = max(sum(len(answers[number][0]) for number in row) for row in rows)
        ids_RT = torch.full((len(rows), width), self.pad_id)
        labels_RT, mask_RT = torch.full_like(ids_RT, -100), torch.zeros_like(ids_RT)
        position_RT, answer_RT = torch.zeros_like(ids_RT), torch.zeros_like(ids_RT)
        for row, numbers in enumerate(rows):
            begin = 0
            for number in numbers:
                ids, labels = answers[number]
                end = begin + len(ids)
                ids_RT[row, begin:end], labels_RT[row, begin:end], mask_RT[row, begin:end] = ids, labels, 1
                # To the end of the row, where the next answer, if there is one, writes its own.
                position_RT[row, begin:], answer_RT[row, begin:] = torch.arange(width - begin), number
                begin = end
        batch: dict[str, Tensor] = {
            "index": torch.tensor(indices),  # first: who counts the samples of any batch counts its first entry
            "packed_input_ids": ids_RT,
            "packed_labels": labels_RT,
            "packed_attention_mask": mask_RT,
            "packed_position_ids": position_RT,
            "packed_answer_ids": answer_RT,
        }
        return cast(PackedPairBatch, {**batch, **_references(pairs)})

    def blank(self) -> PackedPairBatch:
        """A batch in which nothing counts."""
        return {**self.batch([0]), "index": torch.tensor([-1])}


def _ids_and_labels(pair: Pair, name: str) -> tuple[Tensor, Tensor]:
    """The ids of an answer with its prompt, and its labels, int64 (N,)."""
    ids_N = torch.tensor(getattr(pair, name))
    return ids_N, ids_N.where(torch.from_numpy(getattr(pair, f"{name}_learned")), -100)


def _references(pairs: list[Pair]) -> dict[str, Tensor]:
    if pairs[0].reference_logps is None:
        return {}
    logps_B2 = torch.tensor([pair.reference_logps for pair in pairs])
    return {"reference_chosen_logps": logps_B2[:, 0], "reference_rejected_logps": logps_B2[:, 1]}


class Preferences(SplitData):
    """Pairs of answers for preference learning: a ``.jsonl`` with ``prompt``, ``chosen`` and ``rejected`` in each row.

    The three are strings, which are put together as they are, with special tokens such as ``<role>`` in the prompt, as for
    ``predict``, and none in the answers; or lists of messages (:mod:`datamodules.text.chat_template`), the answers one message of
    the assistant's each. An eos ends each answer, and counts. Other columns, such as the ``response`` of rm-static, are not read.
    Rows may give ``reference_chosen_logps`` and ``reference_rejected_logps``, the answers' log-probabilities (nats) under a
    reference model: all rows, or none.

    A row may have ``answers`` instead, a list of two or more such answers, and ``scores``, a number for each: the pair is the
    best against the worst then, the first of each where scores are equal; a prompt whose answers all have one score gives none,
    which is said. The reference's log-probabilities are ``reference_logps`` there, one for each answer.

    For reward models, rows may have a ``ranking`` instead: a list of two or more such answers, the best one first. All rows
    have one then, of equally many answers. Batches are `RankedBatch`; ``packed``, ``format_patterns`` and ``solve_rates`` are
    for pairs alone.

    Args:
        path: The file.
        val_path: Another file of the same kind for validation. ``null``: ``val_fraction`` of ``path``.
        val_fraction: Share of the pairs that is held out, by a fixed hash of the prompt, so that a prompt is on one side only; 0:
            no validation. Without effect if ``val_path`` is given.
        seq_len: Ids that a prompt with an answer may have.
        too_long: Treatment of pairs of which one has more: an error (``raise``); they are left out (``skip``); the answers
            lose their ends (``truncate``), and pairs are left out only if nothing that counts remains of the chosen one or the
            two are the same then. Log-probabilities of a reference are left out with a warning where answers lose their ends,
            since they are those of whole answers.
        packed: Whether answers of a batch share rows of up to ``seq_len`` ids, without seeing one another, instead of having a
            padded row each: the batch is a `PackedPairBatch` then, which gives the same losses with less padding. It still has
            ``batch_size`` pairs; how many rows that takes differs from batch to batch.
        format_patterns: Regular expressions (:mod:`re`) of what is format in an answer, such as ``(?m)^#+ ``: only tokens that
            overlap a match count, in all of the loss. ``null``: all tokens of the answers count. They are searched for in each
            answer as it is written, without its prompt and, unless the tokenizer's own template writes it, without the eos,
            which does not count then. A pair whose chosen answer has no such token is a malformed row (``on_error``); a
            rejected answer may lack the format. Log-probabilities of a reference are left out here, too.
        solve_rates: Least and greatest share of a prompt's ``answers`` that solve it, both included: prompts that are easier or
            harder are left out, which is said, and all rows need ``scores``. ``null``: any.
        solved_score: Score from which on an answer counts as solving its prompt.
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: ``seq_len`` < 2, ``val_fraction`` not in [0, 1), ``solve_rates`` that are no two shares in order, or
            ``format_patterns`` has none, or one that is no regular expression.
    """

    sample_name = "pair"

    def __init__(
        self,
        path: Path,
        val_path: Path | None = None,
        val_fraction: float = 0.05,
        seq_len: int = 2048,
        too_long: TooLong = "raise",
        packed: bool = False,
        format_patterns: list[str] | None = None,
        solve_rates: tuple[float, float] | None = None,
        solved_score: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_seq_len(seq_len)
        check_val_fraction(val_fraction)
        self.path = Path(path)
        self.val_path = None if val_path is None else Path(val_path)
        self.val_fraction = val_fraction
        self.seq_len = seq_len
        self.too_long: TooLong = too_long
        self.packed = packed
        self.solve_rates = solve_rates
        self.solved_score = solved_score
        BestOfN(solve_rates, solved_score)  # refuses what is none
        self.format_tokens = None if format_patterns is None else FormatTokens(format_patterns)

    @property
    @override
    def source(self) -> str:
        """The file."""
        return str(self.path)

    @cached_property
    @override
    def splits(self) -> tuple[list[Any], list[Any]]:
        """The pairs, or rankings, for training and for validation."""
        whole: list[Any] = self.read(self.path)
        if self.val_path is not None:
            train, val = whole, self.read(self.val_path)
        else:
            train, val = divide(whole, self.val_fraction, lambda pair: pair.key)
        rank_zero_info(f"{len(train):,} rows of {self.path} for training, {len(val):,} for validation.")
        return train, val

    def read(self, path: Path) -> list[Pair] | list[Ranking]:
        """Read a file of pairs, or of rankings.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It holds nothing that can be used; a malformed row; one that is too long, where that is an error; only
                some rows have log-probabilities of a reference; rankings beside pairs, of different numbers of answers, or with
                options that are for pairs.
        """
        policy, best_of_n = LengthPolicy(self.too_long, self.seq_len), BestOfN(self.solve_rates, self.solved_score)

        def parse(row: dict[str, Any]) -> Pair | Ranking | None:
            if "ranking" in row:
                return self._parse_ranking(row)
            paired = best_of_n.pair(row)
            return None if paired is None else self._parse(paired)

        samples: list[Any] = []
        for whole in read_json_lines(path, parse, MalformedRows(self.on_error)):
            if whole is None:
                continue
            sample = whole.cut(self.seq_len)
            if policy.keeps(whole.longest, sample.differs):
                samples.append(sample)
        policy.report(path, "rows")
        best_of_n.report(path)
        if not samples:
            raise ValueError(f"{path} holds no pair that can be used.")
        if any(isinstance(sample, Ranking) for sample in samples):
            kinds = sorted({f"rankings of {len(each.answers)}" if isinstance(each, Ranking) else "pairs" for each in samples})
            if len(kinds) > 1:
                raise ValueError(
                    f"The rows of {path} are {' and '.join(kinds[:2])}: rank equally many answers in each, 2 for a pair."
                )
            return samples
        return self._with_whole_references(samples, path, bool(policy.cut))

    def _with_whole_references(self, pairs: list[Pair], path: Path, cut: bool) -> list[Pair]:
        """The pairs with log-probabilities of a reference only if these are of what counts."""
        given = sum(pair.reference_logps is not None for pair in pairs)
        if 0 < given < len(pairs):
            raise ValueError(
                f"{given} of {len(pairs)} pairs of {path} have reference_chosen_logps and reference_rejected_logps: give them "
                f"for all, or for none."
            )
        if given and (cut or self.format_tokens is not None):
            where = "answers lose their ends (too_long: truncate)" if cut else "format_patterns decides what counts"
            rank_zero_warn(
                f"The reference_chosen_logps and reference_rejected_logps of {path} are those of whole answers, and are left out "
                f"where {where}: the model needs another reference than precomputed."
            )
            pairs = [pair._replace(reference_logps=None) for pair in pairs]
        return pairs

    def _parse(self, row: Mapping[str, Any]) -> Pair:
        parts = [row.get(name) for name in ("prompt", "chosen", "rejected")]
        prompt, answers = self._encode(parts[0], parts[1:], row.get("tools"))
        chosen, rejected = ([*prompt, *ids] for ids, _ in answers)
        if chosen == rejected:
            raise MalformedRow("chosen and rejected are the same")
        if not answers[0][1].any():
            raise MalformedRow("no token of the chosen answer is format, as format_patterns says")
        first, second = (np.concatenate([np.zeros(len(prompt), dtype=bool), learned]) for _, learned in answers)
        logps = [row.get(f"reference_{name}_logps") for name in ("chosen", "rejected")]
        if logps != [None, None] and not all(map(is_finite, logps)):
            raise MalformedRow(f"its log-probabilities of a reference are {logps[0]} and {logps[1]}, and should be two numbers")
        reference = None if logps[0] is None else (float(logps[0]), float(logps[1]))  # type: ignore[arg-type]
        return Pair(json.dumps(parts[0]), chosen, rejected, first, second, reference)

    def _parse_ranking(self, row: Mapping[str, Any]) -> Ranking:
        options = {"packed": self.packed, "format_patterns": self.format_tokens, "solve_rates": self.solve_rates}
        if given := [name for name, value in options.items() if value]:
            raise MalformedRow(f"it has a ranking, for which {' and '.join(given)} must be left out")
        if twice := sorted({"chosen", "rejected", "answers"} & row.keys()):
            raise MalformedRow(f"it has a ranking, and {' and '.join(twice)} as well")
        if not isinstance(row["ranking"], list) or len(row["ranking"]) < 2:
            raise MalformedRow("its ranking is no list of 2 answers or more")
        prompt, answers = self._encode(row.get("prompt"), row["ranking"], row.get("tools"))
        ranking = Ranking(json.dumps(row["prompt"]), len(prompt), [[*prompt, *ids] for ids, _ in answers])
        if not ranking.differs:
            raise MalformedRow("two answers of its ranking are the same")
        return ranking

    def _encode(self, prompt: Any, answers: Sequence[Any], tools: Any) -> tuple[list[int], list[tuple[list[int], np.ndarray]]]:
        """The ids of a prompt; those of each answer with what ends it, and which of these count."""
        if all(isinstance(part, str) for part in (prompt, *answers)):
            ids = encode_prompt(encodable(prompt), self.tokenizer).ids
            return ids, [self._text(encodable(answer)) for answer in answers]
        if all(isinstance(part, list) for part in (prompt, *answers)):
            ids, _ = self.template.encode_prompt(prompt, tools)
            return ids, [self._message(prompt, answer, tools, ids) for answer in answers]
        raise MalformedRow("prompt and answers (chosen and rejected) are neither all strings nor all lists of messages")

    def _text(self, answer: str) -> tuple[list[int], np.ndarray]:
        """The ids of an answer with its eos, and which of them count."""
        if self.format_tokens is None:
            ids = [*self.tokenizer.encode(answer), self.tokenizer.eos_id]
            return ids, np.ones(len(ids), dtype=bool)
        ids, spans_N2 = self.tokenizer.encode_with_spans(answer)
        return [*ids, self.tokenizer.eos_id], np.append(self.format_tokens.marks(answer, spans_N2), False)

    def _message(self, prompt: Any, answer: Any, tools: Any, prompt_ids: list[int]) -> tuple[list[int], np.ndarray]:
        """The ids of an answer with what ends it, and which of them count."""
        if len(answer) != 1 or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            raise MalformedRow("an answer is not one message of the assistant's")
        whole, _ = self.template.encode([*prompt, *answer], tools)
        if whole[: len(prompt_ids)] != prompt_ids:
            raise MalformedRow("the template writes the prompt differently with an answer behind it")
        ids = whole[len(prompt_ids) :]
        if self.format_tokens is None:
            return ids, np.ones(len(ids), dtype=bool)
        return ids, self.format_tokens.marks(*self.template.encode_answer([*prompt, *answer], tools))

    @override
    def batches(self, samples: list[Any], training: bool = False) -> Pairs | PackedPairs | Rankings:
        pad_id = self.tokenizer.pad_id
        if isinstance(samples[0], Ranking):
            return Rankings(samples, pad_id)
        return PackedPairs(samples, pad_id, self.seq_len) if self.packed else Pairs(samples, pad_id)
