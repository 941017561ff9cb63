"""Conversations to fine-tune on: the loss is on what the assistant says.

Shape suffixes: B rows, T places in a row, N ids of all conversations.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.held_out import held_out
from datamodules.json_lines import MalformedRows, read_json_lines
from datamodules.language import LanguageData, check_seq_len, check_val_fraction
from datamodules.length_policy import LengthPolicy, TooLong
from datamodules.loader import ResumableLoader
from datamodules.token_windows import LanguageBatch, blank_batch, segment_positions
from datamodules.tokenizer import Tokenizer

__all__ = ["SFT", "Conversation", "ConversationRows", "pack"]


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        key: Decides whether it is for training or validation.
        ids: Its ids, int32 (N,).
        labels: What is to be learned at each place, int32 (N,), -100 for nothing.
    """

    key: str
    ids: np.ndarray
    labels: np.ndarray

    @property
    def learned(self) -> np.ndarray:
        """Where something is to be learned, bool (N,)."""
        return self.labels != -100


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows as a simple rule can: the longest first, each into the fullest row that has room.

    Args:
        lengths: Ids of each sample, at most ``capacity``.
        capacity: Ids of a row.

    Returns:
        The samples of each row.

    Example:
        >>> pack([3, 5, 2, 4], capacity=7)
        [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # ascending: ids that still fit, row
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[sample], -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        insort(room, (free - lengths[sample], row))
    return rows


class ConversationRows(Dataset[LanguageBatch]):
    """Conversations as rows of batches.

    Args:
        conversations: The conversations.
        tokenizer: Whose ids they are.
        seq_len: Places T of a row that holds several.
        packing: Whether rows hold several, which do not see one another: batches have ``position_ids`` then, and rows are
            ``seq_len`` wide. If not, a row holds one, and a batch is as wide as its longest.
    """

    def __init__(self, conversations: list[Conversation], tokenizer: Tokenizer, seq_len: int, packing: bool) -> None:
        self.packing = packing
        self.seq_len = seq_len
        self.pad_id = tokenizer.pad_id
        self.token_bytes = tokenizer.token_bytes.numpy()
        lengths = [len(conversation.ids) for conversation in conversations]
        rows = pack(lengths, seq_len) if packing else [[number] for number in range(len(lengths))]
        ordered = [conversations[number] for row in rows for number in row]
        self.ids = np.concatenate([conversation.ids for conversation in ordered])
        self.labels = np.concatenate([conversation.labels for conversation in ordered])
        self.ends = np.cumsum([len(conversation.ids) for conversation in ordered])
        self.stops = np.cumsum([sum(lengths[number] for number in row) for row in rows])
        self.starts = np.concatenate([[0], self.stops[:-1]])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> LanguageBatch:
        return cast(LanguageBatch, {name: value[0] for name, value in cast(dict[str, Tensor], self.batch([index])).items()})

    def batch(self, indices: list[int]) -> LanguageBatch:
        """A whole batch of rows."""
        start_B, stop_B = self.starts[indices], self.stops[indices]
        width = self.seq_len if self.packing else int((stop_B - start_B).max())
        at_BT = start_B[:, None] + np.arange(width)
        real_BT = at_BT < stop_B[:, None]
        at_BT = np.minimum(at_BT, stop_B[:, None] - 1)
        ids_BT = np.where(real_BT, self.ids[at_BT], self.pad_id).astype(np.int64)
        labels_BT = np.where(real_BT, self.labels[at_BT], -100).astype(np.int64)
        asked_BT = labels_BT[:, 1:]
        bytes_BT = np.where(asked_BT != -100, self.token_bytes[np.maximum(asked_BT, 0)], 0)
        batch: LanguageBatch = {
            "input_ids": torch.from_numpy(ids_BT),
            "labels": torch.from_numpy(labels_BT),
            "attention_mask": torch.from_numpy(real_BT.astype(np.int64)),
            "index": torch.tensor(indices),
            "num_bytes": torch.from_numpy(bytes_BT.sum(axis=1)),
        }
        if self.packing:
            conversation_BT = np.searchsorted(self.ends, at_BT, side="right")
            begins_BT = np.diff(conversation_BT, axis=1, prepend=conversation_BT[:, :1]) != 0
            batch["position_ids"] = torch.from_numpy(segment_positions(begins_BT))
        return batch

    def blank(self) -> LanguageBatch:
        """A batch in which nothing counts."""
        return blank_batch(self.batch([0]))


class SFT(LanguageData):
    """Supervised fine-tuning on conversations: a ``.jsonl`` with ``messages``, and ``tools`` if there are any, in each row.

    The messages, the tools and how they are written: :mod:`datamodules.chat_template`. Labels are the assistant's ids and an
    eos behind each of its messages; nothing else counts.

    Args:
        path: The file.
        val_path: Another file of the same kind for validation. ``null``: ``val_fraction`` of ``path``.
        val_fraction: Share of the conversations that is held out, by a fixed hash of the messages; 0: no validation. Without
            effect if ``val_path`` is given.
        seq_len: Ids that a conversation, or a row of several, may have.
        packing: Whether short conversations share rows, without seeing one another. The sample of a batch is the row then.
        too_long: What is done about conversations of more than ``seq_len`` ids: an error (``raise``); they are left out
            (``skip``); they lose their end (``truncate``), and are left out only if the assistant's first word lies behind it.
            How many is said.
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
        packing: bool = False,
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
        self.packing = packing
        self.too_long: TooLong = too_long

    @cached_property
    def splits(self) -> tuple[list[Conversation], list[Conversation]]:
        """The conversations for training and for validation."""
        whole = self.read(self.path)
        if self.val_path is not None:
            train, val = whole, self.read(self.val_path)
        else:
            for_val = held_out([conversation.key for conversation in whole], self.val_fraction)
            train = [conversation for conversation, held in zip(whole, for_val, strict=True) if not held]
            val = [conversation for conversation, held in zip(whole, for_val, strict=True) if held]
        rank_zero_info(
            f"{len(train):,} conversations of {self.path} for training, with {sum(len(c.ids) for c in train):,} ids, of which "
            f"{sum(int(c.learned.sum()) for c in train):,} count; {len(val):,} for validation."
        )
        return train, val

    def read(self, path: Path) -> list[Conversation]:
        """Read a file of conversations.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It holds no conversation that can be used; a malformed row; one that is too long, where that is an error.
        """
        policy = LengthPolicy(self.too_long, self.seq_len)

        def parse(row: dict[str, Any]) -> Conversation:
            ids, labels = self.template.encode(row.get("messages"), row.get("tools"))
            return Conversation(json.dumps(row["messages"]), np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))

        conversations = [
            whole._replace(ids=whole.ids[: self.seq_len], labels=whole.labels[: self.seq_len])
            for whole in read_json_lines(path, parse, MalformedRows(self.on_error))
            if policy.keeps(len(whole.ids), bool(whole.learned[: self.seq_len].any()))
        ]
        policy.report(path, "conversations")
        if not conversations:
            raise ValueError(f"{path} holds no conversation that can be used.")
        return conversations

    def setup(self, stage: str) -> None:
        """Read the conversations, or the prompts (Lightning hook)."""
        super().setup(stage)
        if stage != "predict":
            _ = self.splits

    def train_dataloader(self) -> ResumableLoader[Any]:
        """Training batches (Lightning hook)."""
        return self.train_loader(self._rows(self.splits[0]), mark_retries=True)

    def val_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """Validation batches (Lightning hook)."""
        return self.eval_loader(self._rows(self.splits[1])) if self.splits[1] else []

    def test_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """The validation batches; no third part is held out (Lightning hook)."""
        return self.val_dataloader()

    def _rows(self, conversations: list[Conversation]) -> ConversationRows:
        if not conversations:
            raise ValueError(f"No conversation of {self.path} is left to train on: lower val_fraction.")
        return ConversationRows(conversations, self.tokenizer, self.seq_len, self.packing)
