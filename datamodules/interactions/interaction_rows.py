"""Histories and targets as rows of batches.

Shape suffixes: N interactions, R rows, U users, B rows of a batch, H items of a history, L tokens, S seen items, K candidates.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.interactions.catalogue import padded
from datamodules.interactions.interaction_log import InteractionLog

__all__ = ["InteractionBatch", "InteractionRows", "Stretches", "draw_negatives", "sequences"]


class InteractionBatch(TypedDict, total=False):
    """A batch of examples.

    Attributes:
        history: int64 (B, H), item numbers, the oldest first, -1 for padding on the right; also -1, in a user's own history, for
            a title that the catalogue does not know.
        input_ids: int64 (B, L), tokens of the history's titles one after another, without special tokens, padded on the right.
        attention_mask: int64 (B, L), 0 for padding; these two are missing without a tokenizer.
        target: int64 (B,), item number; not in prediction.
        domain: int64 (B,), the target's domain; in prediction that asked for, or -1.
        index: int64 (B,), number of the example in its split; -1 for one that does not count, which in evaluation is given to a
            process with one batch fewer than others.
        seen: int64 (B, S), all items of the user before the target, -1 for padding; in evaluation and prediction.
        is_tail: bool (B,), whether the target has at most 5 interactions in training; in evaluation.
        is_cold: bool (B,), whether the target is cold by time; in evaluation.
        candidates: int64 (B, K), items to rank the target among, -1 for padding; in evaluation, if they are drawn.
        user: B original ids of the users; in prediction.
    """

    history: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    target: Tensor
    domain: Tensor
    index: Tensor
    seen: Tensor
    is_tail: Tensor
    is_cold: Tensor
    candidates: Tensor
    user: list[str]


class Stretches(NamedTuple):
    """A stretch ``values[begin:end]`` for each row.

    Attributes:
        values: int (N,).
        begin_R: int64 (R,).
        end_R: int64 (R,).
    """

    values: np.ndarray
    begin_R: np.ndarray
    end_R: np.ndarray


def sequences(log: InteractionLog, kept_N: np.ndarray, by_domain: bool) -> tuple[np.ndarray, np.ndarray]:
    """Put interactions into sequences: those of a user, or of a user in a domain, together and by time.

    Args:
        log: The log.
        kept_N: Which interactions are taken, bool (N,).
        by_domain: Whether each domain of the items has sequences of its own.

    Returns:
        Places of the interactions in the log, and where the sequence of each begins, both int64 (N,).
    """
    place_N = np.flatnonzero(kept_N)
    group_N = log.user_N[place_N]
    if by_domain:
        group_N = group_N * len(log.domains) + log.item_domain[log.item_N[place_N]]
        order_N = np.argsort(group_N, kind="stable")
        place_N, group_N = place_N[order_N], group_N[order_N]
    is_first = np.append(True, group_N[1:] != group_N[:-1])[: len(group_N)]
    return place_N, np.maximum.accumulate(np.where(is_first, np.arange(len(place_N)), 0))


class InteractionRows(Dataset[Any]):
    """Histories, with what belongs to each.

    Args:
        histories: The items before the target; the last of them are given.
        columns: Further entries of the batch, arrays (R, ...).
        max_history: Items of a history that are given.
        tokens: Tokens of all titles and where each begins. ``None``: no tokens.
        pad_id: Fills up tokens.
        num_items: Items of the catalogue; those beyond are titles that it does not know.
        seen: All items before the target. ``None``: not given.
        candidates: Items to rank the target among, integers (U, K), and which row of them belongs to each, int64 (R,). ``None``:
            not given.
        users: Original ids of the users. ``None``: not given.
    """

    def __init__(
        self,
        histories: Stretches,
        columns: Mapping[str, np.ndarray],
        *,
        max_history: int,
        tokens: tuple[np.ndarray, np.ndarray] | None,
        pad_id: int,
        num_items: int,
        seen: Stretches | None = None,
        candidates: tuple[np.ndarray, np.ndarray] | None = None,
        users: list[str] | None = None,
    ) -> None:
        self.histories = histories
        self.columns = columns
        self.max_history = max_history
        self.tokens = tokens
        self.pad_id = pad_id
        self.num_items = num_items
        self.seen = seen
        self.candidates = candidates
        self.users = users

    def __len__(self) -> int:
        return len(self.histories.begin_R)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in cast(dict[str, Any], self.batch([index])).items()}

    def batch(self, indices: list[int]) -> InteractionBatch:
        """A whole batch."""
        values, begin_R, end_R = self.histories
        end_B = end_R[indices]
        history_BH, _ = padded(values, np.maximum(begin_R[indices], end_B - self.max_history), end_B, -1, self.max_history)
        batch: dict[str, Any] = {name: torch.as_tensor(np.array(column[indices])) for name, column in self.columns.items()}
        batch |= {"history": self._known(history_BH), "index": torch.tensor(indices)}
        if self.tokens is not None:
            batch |= self._titles(history_BH, *self.tokens)
        if self.seen is not None:
            seen_BS, _ = padded(self.seen.values, self.seen.begin_R[indices], self.seen.end_R[indices], -1)
            batch["seen"] = self._known(seen_BS)
        if self.candidates is not None:
            items_UK, row_R = self.candidates
            batch["candidates"] = torch.from_numpy(items_UK[row_R[indices]].astype(np.int64))
        if self.users is not None:
            batch["user"] = [self.users[index] for index in indices]
        return cast(InteractionBatch, batch)

    def blank(self) -> InteractionBatch:
        """A batch in which nothing counts."""
        return {**self.batch([0]), "index": torch.tensor([-1])}

    def _known(self, items: np.ndarray) -> Tensor:
        return torch.from_numpy(np.where(items < self.num_items, items, -1))

    def _titles(self, history_BH: np.ndarray, values: np.ndarray, offsets: np.ndarray) -> dict[str, Tensor]:
        item_X = history_BH.ravel()
        begin_X, end_X = (np.where(item_X < 0, 0, offsets[item_X + step]) for step in (0, 1))
        ids_XL, mask_XL = padded(values, begin_X, end_X, self.pad_id)
        length_B = mask_XL.reshape(len(history_BH), -1).sum(axis=1)
        end_B = np.cumsum(length_B)
        ids_BL, mask_BL = padded(ids_XL[mask_XL], end_B - length_B, end_B, self.pad_id)
        return {"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL.astype(np.int64))}


def draw_negatives(log: InteractionLog, number: int, val_UK: np.ndarray, test_UK: np.ndarray) -> list[str]:
    """Draw the published candidates of validation and test: `number` items of the domain of the target's interaction.

    Python's generator with seed 42, users in order, first the draw of validation, then that of test; the target and items of the
    history may be among them. A domain with fewer items gives all but the target, and takes nothing from the generator. It takes
    about a millisecond a draw of 1000: ten minutes for 310,000 users, once.

    Args:
        log: The log.
        number: Candidates of a target.
        val_UK: Filled with those of validation, integers (U, K), -1 for padding.
        test_UK: Filled with those of test.

    Returns:
        Names of the domains with too few items.
    """
    generator = random.Random(42)
    begin_D, size_D = log.domain_offsets[:-1].tolist(), np.diff(log.domain_offsets).tolist()
    too_small = set()
    for user, end in enumerate(log.user_offsets[1:].tolist()):
        for drawn_UK, place in ((val_UK, end - 2), (test_UK, end - 1)):
            domain = int(log.domain_N[place])
            if size_D[domain] >= number:
                drawn_UK[user] = generator.sample(range(size_D[domain]), number)
                drawn_UK[user] += begin_D[domain]
            else:
                too_small.add(domain)
                others = np.setdiff1d(np.arange(size_D[domain]) + begin_D[domain], log.item_N[place])
                drawn_UK[user] = -1
                drawn_UK[user, : len(others)] = others
    return [log.domains[domain] for domain in sorted(too_small)]
