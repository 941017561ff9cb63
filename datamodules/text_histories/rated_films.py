"""Ratings of films as clicks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datamodules.interactions.atomic_files import read_table
from datamodules.text_histories.event_log import EventLog

__all__ = ["read_rated_films"]

_LIKED = 4


def read_rated_films(folder: Path) -> EventLog:
    """Read MovieLens-100K: each rating is a behaviour, ``liked`` from 4 stars on, else ``disliked``, and a candidate, a click if
    liked; its text is "Title (year), genres".

    Args:
        folder: Folder of the asset ``movielens-100k``.
    """
    films = read_table(folder / "ml-100k.item", ["item_id", "movie_title", "release_year", "class"], "raise")
    parts = zip(*(films[name].tolist() for name in ("item_id", "movie_title", "release_year", "class")), strict=True)
    texts = {item: f"{title} ({year}), {genres}" for item, title, year, genres in parts}
    rows = read_table(folder / "ml-100k.inter", ["user_id", "item_id"], "raise", ["timestamp"])
    liked = rows["rating"] >= _LIKED
    text_E = np.array([texts[item] for item in rows["item_id"].tolist()])
    user, item = (rows[name].astype(np.int64) for name in ("user_id", "item_id"))
    return EventLog.of(("liked", "disliked"), user, item, text_E, rows["timestamp"], liked, np.where(liked, 0, 1))
