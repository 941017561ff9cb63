"""Conversations to fine-tune on: the loss is on what the assistant says.

Shape suffixes: B rows, T places in a row, N ids of all conversations.
"""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.held_out import divide
from datamodules.base.json_lines import MalformedRows, read_json_lines
from datamodules.base.loader import ResumableLoader
from datamodules.base.mixture import Mixture, apportion
from datamodules.conversations.call_prompts import call_prompts
from datamodules.conversations.length_policy import LengthPolicy, TooLong
from datamodules.text.split_data import SplitData
from datamodules.text.text import check_seq_len, check_val_fraction
from datamodules.text.token_windows import LanguageBatch, blank_batch, segment_positions
from datamodules.text.tokenizer import Tokenizer
from datamodules.text.tool_text import as_json

__all__ = ["SFT", "Conversation", "ConversationData", "ConversationRows", "pack"]


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        key: JSON of its messages; decides whether it is for training or validation.
        ids: Its ids, int32 (N,).
        labels: Labels, int32 (N,), -100 where nothing is learned.
        tools: JSON of its tools, empty if it has none.
    """

    key: str
    ids: np.ndarray
    labels: np.ndarray
    tools: str = ""

    @property
    def learned(self) -> np.ndarray:
        """Places with a label, bool (N,)."""
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


def _in_rows(numbers: list[int], lengths: list[int], capacity: int | None) -> list[list[int]]:
    """Some conversations in rows, in as few as can be found if these have a capacity, else in a row each."""
    if capacity is None:
        return [[number] for number in numbers]
    return [[numbers[place] for place in row] for row in pack([lengths[number] for number in numbers], capacity)]


def _mixture_of_lengths(shares: Mapping[int, float], sizes: list[int]) -> Mixture:
    """The order of rows of several kinds, in the longest epoch that asks no kind for more rows than it has."""
    names = [f"{low + 1} to {high} ids" for low, high in pairwise([0, *shares])]
    for name, size, share in zip(names, sizes, shares.values(), strict=True):
        if not size:
            raise ValueError(f"length_shares has a share of {share} for conversations of {name}, and none is there to train on.")
    exact = [Fraction(share).limit_denominator(10**9) for share in shares.values()]
    length = min(int(size * sum(exact) / share) for size, share in zip(sizes, exact, strict=True))
    for name, share, own in zip(names, shares.values(), apportion(length, list(shares.values())), strict=True):
        if not own:
            raise ValueError(
                f"An epoch has {length} rows, too few for the share of {share} that length_shares has for conversations of"
                f" {name}: give more conversations, or a larger share."
            )
    return Mixture(names, sizes, list(shares.values()), length)


class ConversationRows(Dataset[LanguageBatch]):
    """Conversations as rows of batches.

    Args:
        conversations: The conversations.
        tokenizer: Whose ids they are.
        seq_len: Places T of a row that holds several.
        packing: Whether rows hold several, which do not see one another: batches have ``position_ids`` then, and rows are
            ``seq_len`` wide. If not, a row holds one, and a batch is as wide as its longest.
        length_shares: Share of the rows of an epoch of training for each kind of conversations: those with as many ids as the
            key at most, and more than the next smaller key. Rows hold one kind; an epoch is as long as it can be without more
            rows of a kind than there are. Each kind is walked in an order of its own, over the epochs (:class:`Mixture`).
            ``None``: each row once.

    Raises:
        ValueError: There is no conversation of a kind, or no row of it in an epoch.
    """

    def __init__(
        self,
        conversations: list[Conversation],
        tokenizer: Tokenizer,
        seq_len: int,
        packing: bool,
        length_shares: Mapping[int, float] | None = None,
    ) -> None:
        self.packing = packing
        self.seq_len = seq_len
        self.pad_id = tokenizer.pad_id
        self.token_bytes = tokenizer.token_bytes.numpy()
        lengths = [len(conversation.ids) for conversation in conversations]
        bounds = [max(lengths)] if length_shares is None else sorted(length_shares)
        kinds: list[list[int]] = [[] for _ in bounds]
        for number, length in enumerate(lengths):
            kinds[bisect_left(bounds, length)].append(number)
        parts = [_in_rows(kind, lengths, seq_len if packing else None) for kind in kinds]
        if length_shares is not None:
            shares = {bound: length_shares[bound] for bound in bounds}
            self.mixture = _mixture_of_lengths(shares, [len(part) for part in parts])
            self.epoch_length = self.mixture.epoch_length
            self.epoch_order = self.mixture.epoch_order
        rows = [row for part in parts for row in part]
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


class ConversationData(SplitData):
    """The base of data for supervised fine-tuning on conversations.

    The messages, the tools and how they are written: :mod:`datamodules.text.chat_template`. Labels are the assistant's ids and an
    eos behind each of its messages; nothing else counts.

    Args:
        seq_len: Ids that a conversation, or a row of several, may have.
        packing: Whether short conversations share rows, without seeing one another. The sample of a batch is the row then.
        too_long: Treatment of conversations of more than ``seq_len`` ids: an error (``raise``); they are left out
            (``skip``); they lose their end (``truncate``), and are left out only if the assistant's first word lies behind it.
            How many is said.
        length_shares: Share of the rows of an epoch for each kind of conversations, such as ``{4096: 0.95, 16384: 0.05}`` for 95
            rows with short ones to 5 with such of more than 4096 ids; the last key is ``seq_len``. A row is a conversation, or
            several of one kind. An epoch is as long as it can be without more rows of a kind than there are; rows that it has
            no place for have their turn in the next ones, before any of their kind comes again. Validation has each conversation
            once. ``null``: as they are in the file.
        num_call_prompts: Prompts of a second loader of validation and test: held-out conversations up to a message that calls
            tools, as :class:`~datamodules.conversations.call_prompts.CallPrompts`, whose batches have the true calls. 0: no such
            loader.
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: ``seq_len`` < 2, ``num_call_prompts`` < 0, or ``length_shares`` that are not positive or do not end with
            ``seq_len``.
    """

    sample_name = "conversation"

    def __init__(
        self,
        seq_len: int = 2048,
        packing: bool = False,
        too_long: TooLong = "raise",
        length_shares: dict[int, float] | None = None,
        num_call_prompts: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_seq_len(seq_len)
        if num_call_prompts < 0:
            raise ValueError(f"num_call_prompts={num_call_prompts} must not be negative.")
        if length_shares is not None:
            if not all(bound > 0 for bound in length_shares) or max(length_shares, default=0) != seq_len:
                raise ValueError(
                    f"length_shares={length_shares} should have numbers of ids as keys, the largest of which is"
                    f" seq_len={seq_len}."
                )
            if not all(share > 0 and math.isfinite(share) for share in length_shares.values()):
                raise ValueError(f"length_shares={length_shares} should have positive shares.")
        self.seq_len = seq_len
        self.packing = packing
        self.too_long: TooLong = too_long
        self.length_shares = length_shares
        self.num_call_prompts = num_call_prompts

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Encode a row with ``messages`` and perhaps ``tools``.

        Raises:
            MalformedRow: It is none.
        """
        ids, labels = self.template.encode(row.get("messages"), row.get("tools"))
        # Many rows have the same tools.
        tools = sys.intern(as_json(row["tools"])) if row.get("tools") else ""
        return Conversation(json.dumps(row["messages"]), np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), tools)

    def fitting(self, conversations: Iterable[Conversation], source: object) -> list[Conversation]:
        """The conversations with at most ``seq_len`` ids, or cut to them; the others are counted.

        Raises:
            ValueError: One is longer, where that is an error; none is left.
        """
        policy = LengthPolicy(self.too_long, self.seq_len)
        fitting = [
            whole._replace(ids=whole.ids[: self.seq_len], labels=whole.labels[: self.seq_len])
            for whole in conversations
            if policy.keeps(len(whole.ids), bool(whole.learned[: self.seq_len].any()))
        ]
        policy.report(source, "conversations")
        if not fitting:
            raise ValueError(f"{source} holds no conversation that can be used.")
        return fitting

    def report(self, train: list[Conversation], val: list[Conversation]) -> None:
        """Log how much there is."""
        rank_zero_info(
            f"{len(train):,} conversations of {self.source} for training, with {sum(len(c.ids) for c in train):,} ids, of which "
            f"{sum(int(c.learned.sum()) for c in train):,} count; {len(val):,} for validation."
        )

    @override
    def val_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        rows = super().val_dataloader()
        if isinstance(rows, list) or not self.num_call_prompts:
            return rows
        val = self.splits[1]
        held_out = [(json.loads(conversation.key), json.loads(conversation.tools or "[]")) for conversation in val]
        prompts = call_prompts(held_out, self.template, self.tokenizer.pad_id, self.num_call_prompts)
        if not prompts.prompts:
            raise ValueError(
                f"num_call_prompts={self.num_call_prompts}, but no held-out conversation of {self.source} calls a tool: set it to"
                " 0, or give conversations with tool_calls."
            )
        return [rows, self.eval_loader(prompts)]

    @override
    def batches(self, samples: list[Conversation], training: bool = False) -> ConversationRows:
        return ConversationRows(samples, self.tokenizer, self.seq_len, self.packing, self.length_shares if training else None)


class SFT(ConversationData):
    """Supervised fine-tuning on conversations: a ``.jsonl`` with ``messages``, and ``tools`` if there are any, in each row.

    Args:
        path: The file.
        val_path: Another file of the same kind for validation. ``null``: ``val_fraction`` of ``path``.
        val_fraction: Share of the conversations that is held out, by a fixed hash of the messages; 0: no validation. Without
            effect if ``val_path`` is given.
        **kwargs: Arguments of `ConversationData`, `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: ``val_fraction`` not in [0, 1).
    """

    def __init__(self, path: Path, val_path: Path | None = None, val_fraction: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_val_fraction(val_fraction)
        self.path = Path(path)
        self.val_path = None if val_path is None else Path(val_path)
        self.val_fraction = val_fraction

    @property
    @override
    def source(self) -> str:
        """The file."""
        return str(self.path)

    @cached_property
    @override
    def splits(self) -> tuple[list[Conversation], list[Conversation]]:
        """The conversations for training and for validation."""
        whole = self.read(self.path)
        if self.val_path is not None:
            train, val = whole, self.read(self.val_path)
        else:
            train, val = divide(whole, self.val_fraction, lambda conversation: conversation.key)
        self.report(train, val)
        return train, val

    def read(self, path: Path) -> list[Conversation]:
        """Read a file of conversations.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It holds no conversation that can be used; a malformed row; one that is too long, where that is an error.
        """
        return self.fitting(read_json_lines(path, self.conversation, MalformedRows(self.on_error)), path)
