"""Candidates with the histories of their users, as rows of batches.

Shape suffixes: E events, B rows of a batch, N features, M behaviours of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.interactions.catalogue import padded
from datamodules.text_histories.event_log import EventLog

__all__ = ["Behaviors", "HistoryRows", "TextHistoryBatch"]


class TextHistoryBatch(TypedDict, total=False):
    """A batch of candidates; without the axis B, one of them.

    Attributes:
        behaviors: int64 (B, N, M), numbers of atoms in each list, the oldest first, 0 for padding on the right. All are of events
            of an earlier time than the candidate's.
        item: int64 (B,), number of the atom of the candidate's text.
        user: int64 (B,), number of the user in its log, known to training or not.
        user_id: int64 (B,), 1 to ``num_users``; 0 for a user that training does not know.
        item_id: int64 (B,), 1 to ``num_items``; 0 for an item that training does not know.
        label: float32 (B,), 1 for a click, else 0; absent where it is not known.
        log_odds: float32 (B,), to be added to the logit of a model that was trained on sampled rows; 0 where all were taken.
        index: int64 (B,), number of the row in its data set; -1 where it only fills up the batches of a process.
    """

    behaviors: Tensor
    item: Tensor
    user: Tensor
    user_id: Tensor
    item_id: Tensor
    label: Tensor
    log_odds: Tensor
    index: Tensor


class Behaviors:
    """Atoms of each user's lists by time.

    Args:
        log: The events.
        atom_E: Number of the atom of each event that is a behaviour, int64 (E,).
    """

    def __init__(self, log: EventLog, atom_E: np.ndarray) -> None:
        times, self._rank_E = np.unique(log.time_E, return_inverse=True)
        self._num_times, self._num_features, self._user_E = len(times), len(log.features), log.user_E
        place = np.flatnonzero(log.feature_E >= 0)
        key = self._list(log.user_E[place], log.feature_E[place]) + self._rank_E[place]
        order = np.argsort(key, kind="stable")  # events of the same time keep the log's order
        self._keys, self._atoms = key[order], atom_E[place[order]]

    def _list(self, user: np.ndarray, feature: np.ndarray) -> np.ndarray:
        """Key before all events of a list; an event's is more by the rank of its time."""
        return (user.astype(np.int64) * self._num_features + feature) * self._num_times

    def before(self, event_B: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the lists of the users of events begin and end, before the events' time: two of int64 (B, N).

        Args:
            event_B: Numbers of the events, int64 (B,).
            most: Length of a list, of which the last ones are taken.
        """
        first_BN = self._list(self._user_E[event_B][:, None], np.arange(self._num_features))
        begin_BN = np.searchsorted(self._keys, first_BN)
        end_BN = np.searchsorted(self._keys, first_BN + self._rank_E[event_B][:, None])
        return np.maximum(begin_BN, end_BN - most), end_BN

    def take(self, event_B: np.ndarray, most: int) -> np.ndarray:
        """Atoms of the lists, int64 (B, N, M), the oldest first, 0 for padding on the right."""
        begin_BN, end_BN = self.before(event_B, most)
        atoms, _ = padded(self._atoms, begin_BN.ravel(), end_BN.ravel(), 0, most)
        return atoms.reshape(*begin_BN.shape, most)


class HistoryRows(Dataset[Any]):
    """Some events of a log as candidates.

    Args:
        behaviors: The lists of the users.
        history: Behaviours of a list that are given, M.
        event_R: Numbers of the events.
        columns: Further entries of the batch, of all events of the log.
    """

    def __init__(self, behaviors: Behaviors, history: int, event_R: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        self.behaviors, self.history, self.event_R, self.columns = behaviors, history, event_R, columns

    def __len__(self) -> int:
        return len(self.event_R)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in cast(dict[str, Any], self.batch([index])).items()}

    def batch(self, indices: Sequence[int]) -> TextHistoryBatch:
        """A whole batch."""
        event_B = self.event_R[indices]
        batch = {name: torch.from_numpy(np.array(column[event_B])) for name, column in self.columns.items()}
        batch |= {"behaviors": torch.from_numpy(self.behaviors.take(event_B, self.history)), "index": torch.tensor(indices)}
        return cast(TextHistoryBatch, batch)

    def blank(self) -> TextHistoryBatch:
        """A batch in which nothing counts."""
        return {**self.batch([0]), "index": torch.tensor([-1])}

    def column(self, name: str) -> Tensor:
        """An entry of the batch, but for ``behaviors`` and ``index``, of all rows."""
        return torch.from_numpy(np.array(self.columns[name][self.event_R]))

    @property
    def num_slots(self) -> int:
        """Behaviours in all lists of all rows."""
        begin_RN, end_RN = self.behaviors.before(self.event_R, self.history)
        return int((end_RN - begin_RN).sum())
