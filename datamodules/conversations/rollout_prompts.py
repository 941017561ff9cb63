"""Prompts to train on: a policy answers them, and rewards judge the answers.

Shape suffixes: B prompts, P places of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from datamodules.base.held_out import divide
from datamodules.conversations.length_policy import LengthPolicy, TooLong
from datamodules.text.prompts import Prompt, PromptBatch, Prompts, read_prompt_rows
from datamodules.text.split_data import SplitData
from datamodules.text.text import check_val_fraction

__all__ = ["PromptRow", "PromptRows", "RolloutBatch", "RolloutPrompts"]

PromptRow = tuple[Prompt, dict[str, Any]]
"""A prompt, and the columns of its row in the file."""


class RolloutBatch(PromptBatch):
    """Batch of prompts to train on; ``input_ids`` and ``attention_mask`` are int64 (B, P), padded on the left.

    Attributes:
        rows: B dictionaries with all columns of a prompt's row, for rewards; empty for a line of text.
    """

    rows: list[dict[str, Any]]


class PromptRows(Prompts):
    """Prompts in their order, with the columns of their rows.

    Args:
        prompt_rows: The prompts with their columns.
        pad_id: Fills up on the left.
        width: Places P of a batch. ``None``: those of the batch's longest.
    """

    def __init__(self, prompt_rows: Sequence[PromptRow], pad_id: int, width: int | None = None) -> None:
        super().__init__([prompt for prompt, _ in prompt_rows], pad_id, width)
        self.rows = [row for _, row in prompt_rows]

    @override
    def batch(self, indices: list[int]) -> RolloutBatch:
        return {**super().batch(indices), "rows": [self.rows[index] for index in indices]}

    @override
    def blank(self) -> RolloutBatch:
        return {**self.batch([0]), "index": torch.tensor([-1]), "prompt": [""], "rows": [{}]}


class RolloutPrompts(SplitData):
    """Prompts to train on, from a ``.jsonl`` or a text file, with all columns for rewards that need more than the answer.

    ``predict`` without prompts of yours answers the held-out ones, or all if none is held out.

    Args:
        path: ``.jsonl`` with ``prompt``, a text to continue, or ``messages`` (and ``tools``), a conversation to answer, in each
            row; any other file has one prompt a line.
        val_path: Another file of the same kind for validation. ``null``: ``val_fraction`` of ``path``.
        val_fraction: Share of the prompts that is held out, by a fixed hash of the prompt; 0: no validation. Without effect if
            ``val_path`` is given.
        prompt_len: Places that each prompt is padded to. ``null``: batches are as wide as their longest prompt.
        too_long: Treatment of prompts of more than ``prompt_len`` ids: an error (``raise``); they are left out (``skip``); they
            lose their beginning (``truncate``).
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: ``val_fraction`` not in [0, 1), or ``prompt_len`` < 1.
    """

    sample_name = "prompt"

    def __init__(
        self,
        path: Path,
        val_path: Path | None = None,
        val_fraction: float = 0.05,
        prompt_len: int | None = None,
        too_long: TooLong = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_val_fraction(val_fraction)
        if prompt_len is not None and prompt_len < 1:
            raise ValueError(f"prompt_len is {prompt_len}, and must be at least 1, or null for the longest of each batch.")
        self.path = Path(path)
        self.val_path = None if val_path is None else Path(val_path)
        self.val_fraction = val_fraction
        self.prompt_len = prompt_len
        self.too_long: TooLong = too_long

    @property
    @override
    def source(self) -> str:
        """The file."""
        return str(self.path)

    @property
    @override
    def marks_retries(self) -> bool:
        return False

    @cached_property
    @override
    def splits(self) -> tuple[list[PromptRow], list[PromptRow]]:
        """The prompts for training and for validation."""
        whole = self.read(self.path)
        if self.val_path is not None:
            train, val = whole, self.read(self.val_path)
        else:
            train, val = divide(whole, self.val_fraction, lambda row: row[0].text)
        rank_zero_info(f"{len(train):,} prompts of {self.path} for training, {len(val):,} for validation.")
        return train, val

    def read(self, path: Path) -> list[PromptRow]:
        """Read a file of prompts.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It holds no prompt that can be used; a malformed row; one that is too long, where that is an error.
        """
        whole = read_prompt_rows(path, self.tokenizer, self.template, self.on_error)
        if self.prompt_len is None:
            return whole
        policy = LengthPolicy(self.too_long, self.prompt_len, "prompt_len", lost="beginning")
        fitting = [
            (prompt._replace(ids=prompt.ids[-self.prompt_len :]), row)
            for prompt, row in whole
            if policy.keeps(len(prompt.ids), remains=True)
        ]
        policy.report(path, "prompts")
        if not fitting:
            raise ValueError(f"{path} holds no prompt of at most prompt_len={self.prompt_len} ids: raise prompt_len.")
        return fitting

    @override
    def _read_prompts(self) -> Prompts:
        train, val = ([], self.read(self.predict_prompts)) if self.predict_prompts is not None else self.splits
        return self.batches(val or train)

    @override
    def batches(self, samples: list[PromptRow], training: bool = False) -> PromptRows:
        return PromptRows(samples, self.tokenizer.pad_id, self.prompt_len)
