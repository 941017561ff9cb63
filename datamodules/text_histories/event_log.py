"""Events of users with texts: behaviours, examples with a label, or both.

Shape suffixes: E events, U users, I items, T texts.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

__all__ = ["EventLog", "normalized"]

NORMALIZATION = "NFKC, single spaces"


@dataclass(frozen=True)
class EventLog:
    """Events of a source, by time, user and item.

    Attributes:
        features: Names of the lists that behaviours belong to.
        user_keys: Original ids of the users.
        item_keys: Original ids of the items.
        texts: Distinct texts, normalised.
        user_E: Number of the user, int64 (E,).
        item_E: Number of the item, int64 (E,).
        text_E: Number of the text, int64 (E,).
        time_E: Time, float64 (E,).
        label_E: 1 for a click, 0 for none, -1 where it is not known, int8 (E,).
        feature_E: List that a behaviour belongs to, -1 for an event that is none, int8 (E,).
        log_odds_E: Logarithm of the rate at which events like this one were sampled, float32 (E,); 0 where all were taken.
    """

    features: tuple[str, ...]
    user_keys: list[str]
    item_keys: list[str]
    texts: list[str]
    user_E: np.ndarray
    item_E: np.ndarray
    text_E: np.ndarray
    time_E: np.ndarray
    label_E: np.ndarray
    feature_E: np.ndarray
    log_odds_E: np.ndarray

    @classmethod
    def of(
        cls,
        features: tuple[str, ...],
        users: np.ndarray,
        items: np.ndarray,
        texts: np.ndarray,
        time_E: np.ndarray,
        label_E: np.ndarray,
        feature_E: np.ndarray,
        log_odds_E: np.ndarray | None = None,
    ) -> EventLog:
        """Number users, items and texts, normalise these, and sort the events.

        Args:
            features: Names of the lists.
            users: Their original ids, (E,).
            items: Their original ids, (E,).
            texts: Texts, str (E,).
            time_E: Times.
            label_E: Labels; NaN or -1 where they are not known.
            feature_E: Lists of behaviours, or -1.
            log_odds_E: As of the log. ``None``: 0.
        """
        (user_keys, user_E), (item_keys, item_E), (raw, raw_E) = (
            np.unique(values, return_inverse=True) for values in (users, items, texts)
        )
        number: dict[str, int] = {}
        text_R = np.array([number.setdefault(normalized(text), len(number)) for text in raw.tolist()], dtype=np.int64)
        order_E = np.lexsort((item_E, user_E, time_E))
        log_odds_E = np.zeros(len(time_E)) if log_odds_E is None else log_odds_E
        kinds = (np.int64, np.int64, np.int64, np.float64, np.int8, np.int8, np.float32)
        columns = (user_E, item_E, text_R[raw_E], time_E, np.nan_to_num(label_E, nan=-1), feature_E, log_odds_E)
        keys = (list(map(str, user_keys.tolist())), list(map(str, item_keys.tolist())))
        return cls(features, *keys, list(number), *(x[order_E].astype(kind) for x, kind in zip(columns, kinds, strict=True)))

    def save(self, folder: Path) -> None:
        """Write arrays and texts into a folder."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for name, value in arrays.items():
            np.save(folder / f"{name}.npy", value)
        (folder / "texts.json").write_text(json.dumps({name: value for name, value in vars(self).items() if name not in arrays}))

    @classmethod
    def open(cls, folder: Path) -> EventLog:
        """Open what :meth:`save` wrote, memory-mapped."""
        texts = json.loads((folder / "texts.json").read_text())
        arrays = {
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(cls) if field.name not in texts
        }
        return cls(**{**texts, **arrays, "features": tuple(texts["features"])})


def normalized(text: str) -> str:
    """A text in Unicode's form NFKC, with single spaces and none at its ends.

    >>> normalized(" Café  au\\n lait")
    'Café au lait'
    """
    return " ".join(unicodedata.normalize("NFKC", text).split())
