"""A log of interactions: from a reader's rows to sequences of users and numbers of items; section 7 of the method's notes.

Shape suffixes: N interactions, U users, I items, D domains.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.base.held_out import held_out
from datamodules.interactions.k_core import k_core

__all__ = ["InteractionLog", "Pipeline", "RawLog"]

_MILLISECONDS = 1e11
"""Times above are milliseconds: as seconds they would lie beyond the year 5000."""
_ARRAYS = ("user_offsets", "item_N", "domain_N", "time_N", "domain_offsets")


@dataclass(frozen=True)
class RawLog:
    """The rows of a source, in any order.

    Attributes:
        domains: Names of the domains.
        user_keys: The users, in the order that the log keeps.
        item_keys: The items, in the order that they keep inside their domain.
        titles: Their titles, empty where there is none.
        item_domain: Number of each item's domain, int64 (I,).
        rank_I: Order of the items that a user took at one time, int64 (I,).
        user_N: User of each row, int64 (N,).
        item_N: Item of each row, int64 (N,).
        domain_N: Domain in which each row was read, int64 (N,); that of the item unless the item is in several.
        time_N: Time, int64 (N,), seconds or milliseconds.
        rating_N: Rating, float64 (N,); decides between rows of the same user, item and time.
    """

    domains: list[str]
    user_keys: list[str]
    item_keys: list[str]
    titles: list[str]
    item_domain: np.ndarray
    rank_I: np.ndarray
    user_N: np.ndarray
    item_N: np.ndarray
    domain_N: np.ndarray
    time_N: np.ndarray
    rating_N: np.ndarray


@dataclass(frozen=True)
class Pipeline:
    """Steps from a reader's rows to a log; see the arguments of `Interactions`."""

    k_core: tuple[int, int] = (5, 5)
    last: int | None = None
    users_fraction: float = 1.0
    string_time_sort: bool = False
    clean: bool = False

    def __call__(self, raw: RawLog, source: str) -> InteractionLog:
        """Leave out exact repeats; sample users; take the last rows; find the k-core; sort; give numbers.

        Raises:
            ValueError: Times are in mixed units, or nothing remains.
        """
        in_milliseconds = raw.time_N > _MILLISECONDS
        if in_milliseconds.any() and not in_milliseconds.all():
            raise ValueError(
                f"{source} has times in mixed units ({in_milliseconds.sum()} of {len(raw.time_N)} in milliseconds, the others in"
                " seconds): write all in one unit."
            )
        order_N = self._order(raw)
        fields = (raw.user_N, raw.item_N, raw.domain_N, raw.time_N, raw.rating_N)
        repeated = np.all([field[order_N][1:] == field[order_N][:-1] for field in fields], axis=0)
        place_N = order_N[np.append(True, ~repeated)] if len(order_N) else order_N
        if self.users_fraction < 1:
            place_N = place_N[held_out(raw.user_keys, self.users_fraction)[raw.user_N[place_N]]]
        if self.last is not None:
            place_N = place_N[_places_from_end(raw.user_N[place_N]) < self.last]
        place_N = place_N[k_core(raw.user_N[place_N], raw.item_N[place_N], *self.k_core)]
        count_N = np.bincount(raw.user_N[place_N], minlength=1)[raw.user_N[place_N]]
        if short := len(np.unique(raw.user_N[place_N[count_N < 3]])):
            rank_zero_info(f"{short:,} users of {source} have fewer than 3 interactions, and are left out.")
            place_N = place_N[count_N >= 3]
        if not len(place_N):
            raise ValueError(f"No interaction of {source} remains with k_core={list(self.k_core)}: lower it.")
        return self._number(raw, place_N, source)

    def _order(self, raw: RawLog) -> np.ndarray:
        """Places by user, time, item and rating."""
        time_N = raw.time_N.astype(str) if self.string_time_sort else raw.time_N
        return np.lexsort((raw.domain_N, raw.rating_N, raw.rank_I[raw.item_N], time_N, raw.user_N))

    def _number(self, raw: RawLog, place_N: np.ndarray, source: str) -> InteractionLog:
        users, user_N = np.unique(raw.user_N[place_N], return_inverse=True)
        items = np.unique(raw.item_N[place_N])
        items = items[np.argsort(raw.item_domain[items], kind="stable")]
        num_items = np.bincount(raw.item_domain[items], minlength=len(raw.domains))
        if not num_items.all():
            empty = raw.domains[int(np.argmin(num_items))]
            raise ValueError(
                f"The domain {empty!r} of {source} has no items with k_core={list(self.k_core)}: lower it, or leave it out."
            )
        number_I = np.full(len(raw.item_keys), -1)
        number_I[items] = np.arange(len(items))
        titles = [raw.titles[item] for item in items.tolist()]
        return InteractionLog(
            domains=raw.domains,
            user_keys=[raw.user_keys[user] for user in users.tolist()],
            item_keys=[raw.item_keys[item] for item in items.tolist()],
            titles=[_clean(title) for title in titles] if self.clean else titles,
            user_offsets=np.append(0, np.cumsum(np.bincount(user_N))),
            item_N=number_I[raw.item_N[place_N]],
            domain_N=raw.domain_N[place_N],
            time_N=raw.time_N[place_N],
            domain_offsets=np.append(0, np.cumsum(num_items)),
        )


@dataclass(frozen=True)
class InteractionLog:
    """Interactions by user and, for each, by time.

    Attributes:
        domains: Names of the domains.
        user_keys: Original ids of the users.
        item_keys: Original ids of the items.
        titles: Titles of the items, empty where there is none.
        user_offsets: Where the interactions of each user begin, and the last end, int64 (U + 1,).
        item_N: Number of the item, int64 (N,).
        domain_N: Domain in which it was read, int64 (N,).
        time_N: Time, int64 (N,).
        domain_offsets: Where the items of each domain begin, and the last end, int64 (D + 1,).
    """

    domains: list[str]
    user_keys: list[str]
    item_keys: list[str]
    titles: list[str]
    user_offsets: np.ndarray
    item_N: np.ndarray
    domain_N: np.ndarray
    time_N: np.ndarray
    domain_offsets: np.ndarray

    @property
    def item_domain(self) -> np.ndarray:
        """Domain of each item, int64 (I,)."""
        return np.repeat(np.arange(len(self.domains)), np.diff(self.domain_offsets))

    @property
    def user_N(self) -> np.ndarray:
        """User of each interaction, int64 (N,)."""
        return np.repeat(np.arange(len(self.user_keys)), np.diff(self.user_offsets))

    @property
    def active_domains(self) -> list[int]:
        """Number of users with interactions in 1, 2, ..., D domains."""
        active = np.unique(self.user_N * len(self.domains) + self.domain_N) // len(self.domains)
        return np.bincount(np.bincount(active), minlength=len(self.domains) + 1)[1:].tolist()

    def digest(self) -> str:
        """SHA-256 of the log, in hexadecimal."""
        digest = hashlib.sha256(json.dumps([self.domains, self.user_keys, self.item_keys, self.titles]).encode())
        for name in _ARRAYS:
            digest.update(getattr(self, name).astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the arrays and the texts into a folder."""
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name).astype(np.int64))
        texts = {name: value for name, value in vars(self).items() if name not in _ARRAYS}
        (folder / "texts.json").write_text(json.dumps({**texts, "sha256": self.digest()}))

    @classmethod
    def open(cls, folder: Path) -> tuple[InteractionLog, str]:
        """Open what :meth:`save` wrote, memory-mapped, and its digest."""
        texts = json.loads((folder / "texts.json").read_text())
        digest = texts.pop("sha256")
        return cls(**texts, **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}), digest


def _places_from_end(user_N: np.ndarray) -> np.ndarray:
    """Place of each row among those of its user, counted from the last, 0; rows of a user are together."""
    ends = np.append(np.flatnonzero(np.diff(user_N)), len(user_N) - 1)
    return np.repeat(ends, np.diff(np.append(-1, ends))) - np.arange(len(user_N))


def _clean(title: str) -> str:
    """A title without HTML entities and control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", html.unescape(title)).strip()
