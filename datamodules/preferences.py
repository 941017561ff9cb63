"""Pairs of answers, one preferred to the other.

Shape suffixes: B pairs, T places in a row.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.held_out import held_out
from datamodules.json_lines import MalformedRow, MalformedRows, encodable, read_json_lines
from datamodules.language import LanguageData, check_seq_len, check_val_fraction
from datamodules.length_policy import LengthPolicy, TooLong
from datamodules.loader import ResumableLoader

__all__ = ["Pair", "PairBatch", "Pairs", "Preferences"]


class Pair(NamedTuple):
    """A prompt with two answers.

    Attributes:
        key: Decides whether it is for training or validation: the prompt.
        chosen: Ids of prompt and preferred answer.
        rejected: Ids of prompt and other answer.
        prompt_length: How many of them, in both, are the prompt's.
        reference_logps: Log-probabilities (nats) of the answers under a reference model, preferred one first, or ``None``.
    """

    key: str
    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    reference_logps: tuple[float, float] | None


class PairBatch(TypedDict, total=False):
    """A batch of pairs; both answers are padded, on the right, to the longest of all, so that they can be stacked.

    Attributes:
        chosen_input_ids: int64 (B, T).
        chosen_labels: int64 (B, T), the ids of the answer and its eos; -100 on the prompt and on padding.
        chosen_attention_mask: int64 (B, T).
        rejected_input_ids: int64 (B, T).
        rejected_labels: int64 (B, T).
        rejected_attention_mask: int64 (B, T).
        index: int64 (B,), number of the pair in its data set.
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


class Pairs(Dataset[PairBatch]):
    """Pairs as batches.

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
        width = max(max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
        batch: dict[str, Tensor] = {}
        for name in ("chosen", "rejected"):
            ids_BT = torch.full((len(pairs), width), self.pad_id)
            labels_BT, mask_BT = torch.full_like(ids_BT, -100), torch.zeros_like(ids_BT)
            for row, pair in enumerate(pairs):
                ids = torch.tensor(getattr(pair, name))
                ids_BT[row, : len(ids)] = ids
                labels_BT[row, pair.prompt_length : len(ids)] = ids[pair.prompt_length :]
                mask_BT[row, : len(ids)] = 1
            batch |= {f"{name}_input_ids": ids_BT, f"{name}_labels": labels_BT, f"{name}_attention_mask": mask_BT}
        batch["index"] = torch.tensor(indices)
        if pairs[0].reference_logps is not None:
            logps_B2 = torch.tensor([pair.reference_logps for pair in pairs])
            batch["reference_chosen_logps"], batch["reference_rejected_logps"] = logps_B2.unbind(1)
        return batch  # type: ignore[return-value]


class Preferences(LanguageData):
    """Pairs of answers for preference learning: a ``.jsonl`` with ``prompt``, ``chosen`` and ``rejected`` in each row.

    The three are strings, which are put together as they are; or lists of messages (:mod:`datamodules.chat_template`), the
    answers one message of the assistant's each. An eos ends each answer, and counts. Rows may give
    ``reference_chosen_logps`` and ``reference_rejected_logps``, the answers' log-probabilities (nats) under a reference
    model: all rows, or none.

    Args:
        path: The file.
        val_path: Another file of the same kind for validation. ``null``: ``val_fraction`` of ``path``.
        val_fraction: Share of the pairs that is held out, by a fixed hash of the prompt, so that a prompt is on one side only; 0:
            no validation. Without effect if ``val_path`` is given.
        seq_len: Ids that a prompt with an answer may have.
        too_long: What is done about pairs of which one has more: an error (``raise``); they are left out (``skip``); the answers
            lose their ends (``truncate``), and pairs are left out only if the prompt fills the row.
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: ``seq_len`` < 2, or ``val_fraction`` not in [0, 1).
    """

    def __init__(
        self,
        path: Path,
        val_path: Path | None = None,
        val_fraction: float = 0.05,
        seq_len: int = 2048,
        too_long: TooLong = "raise",
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

    @cached_property
    def splits(self) -> tuple[list[Pair], list[Pair]]:
        """The pairs for training and for validation."""
        whole = self.read(self.path)
        if self.val_path is not None:
            train, val = whole, self.read(self.val_path)
        else:
            for_val = held_out([pair.key for pair in whole], self.val_fraction)
            train = [pair for pair, held in zip(whole, for_val, strict=True) if not held]
            val = [pair for pair, held in zip(whole, for_val, strict=True) if held]
        rank_zero_info(f"{len(train):,} pairs of {self.path} for training, {len(val):,} for validation.")
        return train, val

    def read(self, path: Path) -> list[Pair]:
        """Read a file of pairs.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It holds no pair that can be used; a malformed row; one that is too long, where that is an error; only
                some rows have log-probabilities of a reference.
        """
        policy = LengthPolicy(self.too_long, self.seq_len)
        pairs = [
            pair._replace(chosen=pair.chosen[: self.seq_len], rejected=pair.rejected[: self.seq_len])
            for pair in read_json_lines(path, self._parse, MalformedRows(self.on_error))
            if policy.keeps(max(len(pair.chosen), len(pair.rejected)), pair.prompt_length)
        ]
        policy.report(path, "pairs")
        if not pairs:
            raise ValueError(f"{path} holds no pair that can be used.")
        given = sum(pair.reference_logps is not None for pair in pairs)
        if 0 < given < len(pairs):
            raise ValueError(
                f"{given} of {len(pairs)} pairs of {path} have reference_chosen_logps and reference_rejected_logps: give them "
                f"for all, or for none."
            )
        return pairs

    def _parse(self, row: dict[str, Any]) -> Pair:
        parts = [row.get(name) for name in ("prompt", "chosen", "rejected")]
        if all(isinstance(part, str) for part in parts):
            prompt, *answers = (self.tokenizer.encode(encodable(str(part))) for part in parts)
            chosen, rejected = ([*prompt, *answer, self.tokenizer.eos_id] for answer in answers)
            prompt = prompt or [self.tokenizer.eos_id]
            if not parts[0]:  # an eos stands before a document, and asks for its first id
                chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
        elif all(isinstance(part, list) for part in parts):
            prompt, _ = self.template.encode_prompt(parts[0], row.get("tools"))
            chosen, rejected = (self._conversation(parts[0], answer, row.get("tools"), prompt) for answer in parts[1:])
        else:
            raise MalformedRow("prompt, chosen and rejected are neither three strings nor three lists of messages")
        if chosen == rejected:
            raise MalformedRow("chosen and rejected are the same")
        logps = [row.get(f"reference_{name}_logps") for name in ("chosen", "rejected")]
        if logps != [None, None] and not all(isinstance(logp, int | float) and math.isfinite(logp) for logp in logps):
            raise MalformedRow(f"its log-probabilities of a reference are {logps[0]} and {logps[1]}, and should be two numbers")
        reference = None if logps[0] is None else (float(logps[0]), float(logps[1]))  # type: ignore[arg-type]
        return Pair(json.dumps(parts[0]), chosen, rejected, len(prompt), reference)

    def _conversation(self, prompt: Any, answer: Any, tools: Any, prompt_ids: list[int]) -> list[int]:
        if len(answer) != 1 or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            raise MalformedRow("an answer is not one message of the assistant's")
        ids, _ = self.template.encode([*prompt, *answer], tools)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise MalformedRow("the template writes the prompt differently with an answer behind it")
        return ids

    def setup(self, stage: str) -> None:
        """Read the pairs, or the prompts (Lightning hook)."""
        super().setup(stage)
        if stage != "predict":
            _ = self.splits

    def train_dataloader(self) -> ResumableLoader[Any]:
        """Training batches (Lightning hook)."""
        if not self.splits[0]:
            raise ValueError(f"No pair of {self.path} is left to train on: lower val_fraction.")
        return self.train_loader(Pairs(self.splits[0], self.tokenizer.pad_id), mark_retries=True)

    def val_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """Validation batches (Lightning hook)."""
        return self.eval_loader(Pairs(self.splits[1], self.tokenizer.pad_id)) if self.splits[1] else []

    def test_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """The validation batches; no third part is held out (Lightning hook)."""
        return self.val_dataloader()
