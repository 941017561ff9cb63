"""MovieLens-100K as tasks: the ratings of a user, or of a film.

Shape suffixes: N ratings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.base.json_lines import OnError
from datamodules.clicks.click_table import ClickColumns, ClickRows
from datamodules.clicks.csv_columns import Columns, open_columns, read_columns
from datamodules.interactions.atomic_files import read_table
from datamodules.tasks.task_table import RowSource

__all__ = ["FILM_COLUMNS", "TaskKey", "read_film_tasks", "read_films_to_score"]

TaskKey = Literal["user", "item"]
_LIKED = 4
_YEARS = (1940, 1950, 1960, 1970, 1980, 1985, 1988, 1990, 1992, 1993, 1994, 1995, 1996, 1997)
_AGES = (18, 25, 30, 35, 45, 50, 56)
_GENDERS = ("F", "M")
_OCCUPATIONS = (
    "administrator", "artist", "doctor", "educator", "engineer", "entertainment", "executive", "healthcare", "homemaker",
    "lawyer", "librarian", "marketing", "none", "other", "programmer", "retired", "salesman", "scientist", "student",
    "technician", "writer",
)  # fmt: skip
_GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "unknown",
)  # fmt: skip
_FILMS = 1682
_ZIP = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_USER = ["gender", "occupation", "zip_code"]

FILM_COLUMNS = ClickColumns(
    ("item", "year", "age", "gender", "occupation", "zip"),
    (_FILMS + 1, len(_YEARS) + 2, len(_AGES) + 1, len(_GENDERS), len(_OCCUPATIONS), len(_ZIP) + 1),
    _GENRES,
)
"""Fields of 1,767 ids in all, and genres as numbers; id 0 of item is an unknown film, of year an unknown one, of zip another."""


def read_film_tasks(folder: Path, task_key: TaskKey) -> RowSource:
    """Read the asset: rows are ratings by time, a click is one of 4 stars or more.

    Args:
        folder: Folder of the asset ``movielens-100k``.
        task_key: Whether a task is a user or a film.
    """
    rows = read_table(folder / "ml-100k.inter", ["user_id", "item_id"], "raise", ["timestamp"])
    users = read_table(folder / "ml-100k.user", ["user_id", *_USER], "raise", ["age"])
    place = {user: number for number, user in enumerate(users["user_id"].tolist())}
    user_N = np.array([place[user] for user in rows["user_id"].tolist()])
    columns: Columns = {**rows, **{name: users[name][user_N] for name in (*_USER, "age")}}
    sparse, dense = _encode(folder, columns)
    clicks = ClickRows(sparse, dense, rows["rating"] >= _LIKED)
    return RowSource(FILM_COLUMNS, [clicks], rows[f"{task_key}_id"].astype(np.int64), rows["timestamp"])


def read_films_to_score(folder: Path, path: Path, task_key: TaskKey, on_error: OnError) -> tuple[ClickRows, np.ndarray]:
    """Read a user's file ``user_id, item_id, age, gender, occupation, zip_code, rating``, where rating may be empty.

    Args:
        folder: Folder of the asset, for the year and genres of films.
        path: The file.
        task_key: Whether a task is a user or a film.
        on_error: Treatment of malformed rows.

    Returns:
        The rows, with labels NaN where there is no rating, and the task of each, int64 (N,).

    Raises:
        FileNotFoundError: No such file.
        ValueError: A column is missing, rows are malformed, or there is none.
    """
    with open_columns(path) as file:
        columns = read_columns(
            file, str(path), _USER, ["user_id", "item_id", "age", "rating"], required=["user_id", "item_id", "age"],
            check=_unsound, on_error=on_error,
        )  # fmt: skip
    if not len(columns["index"]):
        raise ValueError(f"{path} holds no rows.")
    sparse, dense = _encode(folder, {**columns, "item_id": columns["item_id"].astype(np.int64).astype(str)})
    label = np.where(np.isnan(columns["rating"]), np.nan, columns["rating"] >= _LIKED)
    rows = ClickRows(sparse, dense, label, columns["index"].astype(np.int64))
    return rows, columns[f"{task_key}_id"].astype(np.int64)


def _unsound(columns: Columns) -> dict[int, str]:
    wrong: dict[int, str] = {}
    for name, known in (("gender", _GENDERS), ("occupation", _OCCUPATIONS)):
        places = np.flatnonzero(~np.isin(columns[name], known)).tolist()
        wrong |= {place: f"{name} is {str(columns[name][place])[:40]!r}, not one of {', '.join(known)[:90]}" for place in places}
    return wrong


def _encode(folder: Path, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 (N, 6) and genres float32 (N, 19)."""
    films = read_table(folder / "ml-100k.item", ["item_id", "release_year", "class"], "raise")
    item, year = np.zeros(_FILMS + 1, np.int32), np.zeros(_FILMS + 1, np.int32)
    genres = np.zeros((_FILMS + 1, len(_GENRES)), np.float32)
    for key, released, names in zip(*(films[name].tolist() for name in ("item_id", "release_year", "class")), strict=True):
        item[int(key)] = int(key)
        year[int(key)] = 1 + np.searchsorted(_YEARS, int(released), side="right") if released.isdigit() else 0
        genres[int(key)] = [name in names.split() for name in _GENRES]
    film_N = columns["item_id"].astype(np.int64)
    film_N = np.where((film_N >= 1) & (film_N <= _FILMS), film_N, 0)
    zip_N = np.array([_ZIP.find(text[:1].upper()) + 1 if text else 0 for text in columns["zip_code"].tolist()])
    ids: list[np.ndarray] = [
        item[film_N],
        year[film_N],
        np.searchsorted(_AGES, columns["age"], side="right"),
        np.searchsorted(_GENDERS, columns["gender"]),
        np.searchsorted(_OCCUPATIONS, columns["occupation"]),
        zip_N,
    ]
    return np.stack(ids, axis=1).astype(np.int32), genres[film_N]
