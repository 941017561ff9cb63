"""Atomic files, the form of RecBole's data sets: ``NAME.inter`` and ``NAME.item``, columns separated by tabs under a typed head.

Shape suffixes: N interactions, I items.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from datamodules.base.json_lines import OnError
from datamodules.clicks.csv_columns import Columns, read_columns
from datamodules.interactions.interaction_log import RawLog

__all__ = ["GENRE_GROUPS", "read_atomic_files", "read_movielens", "read_table"]

GENRE_GROUPS = {
    "Family": {"Animation", "Children's", "Musical", "Fantasy"},
    "Dark": {"Horror", "Thriller", "Crime", "Mystery", "Film-Noir"},
    "Action": {"Action", "Adventure", "Sci-Fi", "War", "Western"},
    "Comedy": {"Comedy", "Romance"},
    "Drama": {"Drama", "Documentary", "unknown"},
}
"""Genres of the domains of MovieLens; a film belongs to the first that has one of its genres."""


def read_atomic_files(folder: Path, domains: list[str] | None, on_error: OnError) -> RawLog:
    """Read pairs of files; the name of a pair is its domain. Users with the same id are one.

    Interactions have columns ``user_id``, ``item_id``, ``timestamp`` and maybe ``rating``; items have ``item_id`` and a title,
    their first column with ``title`` or ``name`` in its name. Interactions with items that have no row are left out.

    Args:
        folder: Folder with the pairs, or with folders of them.
        domains: Names of the pairs to read, in order. ``None``: all, by name.
        on_error: Treatment of malformed rows.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A column is missing, or rows are malformed and not skipped.
    """
    found = {path.stem: path for path in sorted(folder.rglob("*.inter"))}
    if not found:
        raise FileNotFoundError(f"{folder} has neither Amazon's meta_CATEGORY.json nor atomic files NAME.inter and NAME.item.")
    users: dict[str, int] = {}
    keys: list[str] = []
    titles: list[str] = []
    item_domain: list[np.ndarray] = []
    parts: list[tuple[np.ndarray, ...]] = []
    names = domains or list(found)
    for domain, name in enumerate(names):
        if name not in found:
            raise ValueError(f"{folder} has no file {name}.inter: domains can be {', '.join(found)[:180]}.")
        path = found[name].with_suffix(".item")
        title = next((column for column in _head(path) if "title" in column or "name" in column), "item_title")
        items = read_table(path, ["item_id", title], on_error)
        number = {key: place for place, key in enumerate(items["item_id"].tolist(), start=len(keys))}
        keys += items["item_id"].tolist()
        titles += items[title].tolist()
        item_domain.append(np.full(len(items["index"]), domain))
        rows = read_table(found[name], ["user_id", "item_id"], on_error, ["timestamp"])
        user_N = np.array([users.setdefault(key, len(users)) for key in rows["user_id"].tolist()], dtype=np.int64)
        item_N = np.array([number.get(key, -1) for key in rows["item_id"].tolist()], dtype=np.int64)
        rating_N = np.nan_to_num(rows.get("rating", np.zeros(len(item_N))))
        columns = (user_N, item_N, np.full(len(item_N), domain), rows["timestamp"].astype(np.int64), rating_N)
        parts.append(tuple(column[item_N >= 0] for column in columns))
    merged = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return RawLog(names, list(users), keys, titles, np.concatenate(item_domain), np.arange(len(keys)), *merged)


def read_movielens(folder: Path) -> RawLog:
    """Read MovieLens-100K with groups of genres as domains: a proxy for shops, since all are films of one site.

    Args:
        folder: Folder of the asset ``movielens-100k``.
    """
    raw = read_atomic_files(folder, ["ml-100k"], "raise")
    genres = [set(text.split()) for text in read_table(folder / "ml-100k.item", ["class"], "raise")["class"].tolist()]
    groups = list(GENRE_GROUPS.values())
    domain_I = np.array([next(number for number, group in enumerate(groups) if group & own) for own in genres])
    return replace(raw, domains=list(GENRE_GROUPS), item_domain=domain_I, domain_N=domain_I[raw.item_N])


def _head(path: Path) -> list[str]:
    """Names of the columns, without their types."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: atomic files come in pairs NAME.inter and NAME.item.")
    with path.open(encoding="utf-8") as file:
        return [column.partition(":")[0] for column in file.readline().rstrip("\n").split("\t")]


def read_table(path: Path, texts: list[str], on_error: OnError, numbers: list[str] | None = None) -> Columns:
    """Columns of an atomic file: texts, numbers that every row must have and, beside these, ``rating`` if it is there."""
    head, numbers = "\t".join(_head(path)), numbers or []
    with path.open(encoding="utf-8", newline="") as file:
        lines = chain([head], (line for number, line in enumerate(file) if number))
        optional = ["rating"] if numbers else []
        return read_columns(
            lines, str(path), texts, numbers, required=numbers, optional=optional, on_error=on_error, delimiter="\t"
        )
