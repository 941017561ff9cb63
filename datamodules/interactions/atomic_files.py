"""Atomic files, the form of RecBole's data sets: ``NAME.inter`` and ``NAME.item``, columns separated by tabs under a typed head.

Shape suffixes: N interactions, I items.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from datamodules.base.json_lines import MalformedRows, OnError
from datamodules.interactions.interaction_log import RawLog

__all__ = ["GENRE_GROUPS", "read_atomic_files", "read_movielens"]

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

    Columns: ``user_id``, ``item_id``, ``timestamp`` and, if it is there, ``rating`` of the interactions; ``item_id`` and the first
    column with ``title`` or ``name`` in its name, of the items. Interactions with items that have no row are left out.

    Args:
        folder: Folder with the pairs, or with folders of them.
        domains: Names of the pairs to read, in order. ``None``: all, by name.
        on_error: Treatment of malformed rows.

    Raises:
        ValueError: A file or a column is missing, or rows are malformed and not skipped.
    """
    found = {path.stem: path for path in sorted(folder.rglob("*.inter"))}
    users: dict[str, int] = {}
    keys: list[str] = []
    titles: list[str] = []
    item_domain: list[int] = []
    rows: list[tuple[int, int, int, int, float]] = []
    names = domains or list(found)
    for domain, name in enumerate(names):
        if name not in found:
            raise ValueError(f"{folder} has no file {name}.inter: domains can be {', '.join(found)[:200]}.")
        path = found[name]
        items: dict[str, int] = {}
        head, table = _read_table(path.with_suffix(".item"), ["item_id"], on_error)
        title = next((place for place, column in enumerate(head) if "title" in column or "name" in column), None)
        if title is None:
            raise ValueError(f"{path.with_suffix('.item')} has no column of titles: it has {', '.join(head)[:200]}.")
        for row in table:
            items[row[head.index("item_id")]] = len(keys)
            keys.append(row[head.index("item_id")])
            titles.append(row[title])
            item_domain.append(domain)
        head, table = _read_table(path, ["user_id", "item_id", "timestamp"], on_error)
        user, item, time = (head.index(column) for column in ("user_id", "item_id", "timestamp"))
        rating = head.index("rating") if "rating" in head else None
        for row in table:
            number = users.setdefault(row[user], len(users))
            if row[item] in items:
                when = int(float(row[time]))
                rows.append((number, items[row[item]], domain, when, 0.0 if rating is None else float(row[rating])))
    columns = [np.array(column, dtype=np.int64) for column in list(zip(*rows, strict=True))[:4] or [[]] * 4]
    columns.append(np.array([row[4] for row in rows]))
    return RawLog(names, list(users), keys, titles, np.array(item_domain, dtype=np.int64), np.arange(len(keys)), *columns)


def read_movielens(folder: Path) -> RawLog:
    """Read MovieLens-100K with groups of genres as domains: a proxy for shops, since all are films of one site.

    Args:
        folder: Folder of the asset ``movielens-100k``.
    """
    raw = read_atomic_files(folder, ["ml-100k"], "raise")
    head, table = _read_table(folder / "ml-100k.item", ["item_id", "class"], "raise")
    genres = {row[head.index("item_id")]: set(row[head.index("class")].split()) for row in table}
    groups = list(GENRE_GROUPS.values())
    domain_I = np.array([next(d for d, group in enumerate(groups) if group & genres[key]) for key in raw.item_keys])
    return replace(raw, domains=list(GENRE_GROUPS), item_domain=domain_I, domain_N=domain_I[raw.item_N])


def _read_table(path: Path, needed: list[str], on_error: OnError) -> tuple[list[str], list[list[str]]]:
    """Names of the columns without their types, and the rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: atomic files come in pairs NAME.inter and NAME.item.")
    problems, rows, total = MalformedRows(on_error), [], 0
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        head = [column.partition(":")[0] for column in next(reader, [])]
        if missing := [column for column in needed if column not in head]:
            raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(head)[:150] or 'none'}.")
        numbers = [head.index(column) for column in ("timestamp", "rating") if column in head and "user_id" in head]
        for row in reader:
            total += 1
            if len(row) != len(head):
                problems.add(f"line {reader.line_num}: it has {len(row)} columns, not {len(head)}")
                continue
            try:
                _ = [int(float(row[place])) for place in numbers]
            except (ValueError, OverflowError):
                problems.add(f"line {reader.line_num}: time or rating is no number")
                continue
            rows.append(row)
    problems.report(path, total)
    return head, rows
