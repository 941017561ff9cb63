"""Amazon's files of 2014, 2018 and 2023: ratings or reviews, and metadata, of each category; read as published (section 7).

Shape suffixes: N interactions.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from datamodules.base.json_lines import MalformedRow, MalformedRows, OnError, encodable
from datamodules.interactions.interaction_log import RawLog

__all__ = ["metadata_files", "read_amazon"]

_META = re.compile(r"meta_(\w+?)\.jsonl?(\.gz)?")
_RATINGS = re.compile(r"(?:ratings_|reviews_)?(\w+?)(?:_5)?\.(?:csv|jsonl?)(?:\.gz)?")
_ASIN = re.compile(r"[A-Z0-9]{10}")
_USER = re.compile(r"A[A-Z0-9]{8,}")
_SAMPLE = 1000
_NAMES = {"item": ("parent_asin", "asin"), "user": ("user_id", "reviewerID"), "rating": ("rating", "overall"),
          "time": ("timestamp", "unixReviewTime")}  # fmt: skip


class _Rating(NamedTuple):
    user: str
    item: str
    time: int
    rating: float


def metadata_files(folder: Path) -> dict[str, Path]:
    """Metadata files of a folder and the folders in it, by category."""
    found = ((_META.fullmatch(path.name), path) for path in sorted(folder.rglob("meta_*")))
    return {match[1]: path for match, path in found if match}


def read_amazon(folder: Path, domains: list[str] | None, on_error: OnError) -> RawLog:
    """Read the categories of a folder; the name of a category is its domain.

    A category needs ``meta_CATEGORY`` with ``.json`` or ``.jsonl`` and ``CATEGORY.csv``, ``ratings_CATEGORY.csv``, or reviews as
    JSON, with or without ``_5`` at the end of the name; all may be compressed by gzip. Rows may be Python literals, as in 2014.

    The order is the published one. Users: those of the first category, shuffled by Python's generator with seed 2023, then those
    that the second adds, shuffled likewise, and so on. Items: by their first place in the metadata. An item of several
    categories belongs to the last; its ratings keep the category that they were read in.

    Args:
        folder: Folder with the files, or with folders of them.
        domains: Categories to read, in order. ``None``: all that have metadata, by name.
        on_error: Treatment of malformed rows.

    Raises:
        FileNotFoundError: A category has no metadata or no ratings.
        ValueError: Columns fit no known order, or rows are malformed and not skipped.
    """
    metas = metadata_files(folder)
    others = ((_RATINGS.fullmatch(path.name), path) for path in sorted(folder.rglob("*"), reverse=True))
    ratings = {match[1]: path for match, path in others if match and not _META.fullmatch(path.name)}  # .csv wins over .json
    names = domains or list(metas)
    items: dict[str, int] = {}
    users: dict[str, int] = {}
    titles: list[str] = []
    item_domain: list[int] = []
    columns: list[list[np.ndarray]] = []
    for domain, name in enumerate(names):
        if name not in metas or name not in ratings:
            missing = f"meta_{name}.json" if name not in metas else f"{name}.csv"
            raise FileNotFoundError(f"{folder} has no {missing}, also not compressed: each category needs metadata and ratings.")
        own_items = {}
        for key, title in _objects(metas[name], _metadata, MalformedRows(on_error)):
            number = own_items[key] = items.setdefault(key, len(items))
            if number == len(titles):
                titles.append("")
                item_domain.append(domain)
            titles[number], item_domain[number] = title, domain
        own_users: dict[str, int] = {}
        user, item, time, rating = array("q"), array("q"), array("q"), array("d")
        for row in _read_ratings(ratings[name], MalformedRows(on_error)):
            number = own_users.setdefault(row.user, len(own_users))
            if row.item in own_items:
                user.append(number)
                item.append(own_items[row.item])
                time.append(row.time)
                rating.append(row.rating)
        for key in random.Random(2023).sample(list(own_users), len(own_users)):
            users.setdefault(key, len(users))
        user_number = np.array([users[key] for key in own_users], dtype=np.int64)
        parts = [np.array(part) for part in (user, item, time, rating)]
        columns.append([user_number[parts[0]], parts[1], np.full(len(user), domain), *parts[2:]])
    user_N, item_N, domain_N, time_N, rating_N = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    domain_I = np.array(item_domain, dtype=np.int64)
    rank_I = np.empty(len(items), dtype=np.int64)
    rank_I[np.argsort(np.array(list(items)))] = np.arange(len(items))
    return RawLog(names, list(users), list(items), titles, domain_I, rank_I, user_N, item_N, domain_N, time_N, rating_N)


def _metadata(row: dict[str, Any]) -> tuple[str, str]:
    """Key and title of an item."""
    title = row.get("title") or ""
    if not isinstance(title, str):
        raise MalformedRow("its title is no text")
    return str(_value(row, "item")), encodable(title)


def _review(row: dict[str, Any]) -> _Rating:
    return _rating(*(str(_value(row, name)) for name in ("user", "item", "time", "rating")))


def _value(row: dict[str, Any], name: str) -> Any:
    for key in _NAMES[name]:
        if key in row:
            return row[key]
    raise MalformedRow(f"it has none of {', '.join(_NAMES[name])}")


def _rating(user: str, item: str, time: str, rating: str) -> _Rating:
    try:
        return _Rating(user, item, int(time), float(rating))
    except ValueError:
        raise MalformedRow(f"time {time[:20]!r} or rating {rating[:20]!r} is no number") from None


def _read_ratings(path: Path, problems: MalformedRows) -> Iterator[_Rating]:
    with _open(path) as file:
        sample = [line.decode(errors="replace").strip().split(",") for line in islice(file, _SAMPLE)]
    if sample and sample[0][0].startswith("{"):
        return _objects(path, _review, problems)
    has_head = bool(sample) and all(set(keys) & set(sample[0]) for keys in _NAMES.values())
    order = sample[0] if has_head else _order(path, sample)
    places = [next(order.index(key) for key in _NAMES[name] if key in order) for name in _Rating._fields]
    width = len(order)

    def parse(line: bytes) -> _Rating:
        cells = line.decode().strip().split(",")
        if len(cells) != width:
            raise MalformedRow(f"it has {len(cells)} columns, not {width}")
        return _rating(*[cells[place] for place in places])

    return _lines(path, parse, problems, skip=has_head)


def _order(path: Path, sample: list[list[str]]) -> list[str]:
    """Order of the columns of a file without a head: items are ten letters and digits, users begin with A."""
    rows = [row for row in sample if len(row) == 4]
    share = {
        first: sum(bool(_ASIN.fullmatch(row[first]) and _USER.fullmatch(row[1 - first])) for row in rows) / max(1, len(rows))
        for first in (0, 1)
    }
    if (share[0] > 0.9) == (share[1] > 0.9):
        raise ValueError(
            f"The columns of {path} fit no known order (item,user,rating,time of 2018; user,item,rating,time of 2014; a head with"
            " user_id,parent_asin,rating,timestamp of 2023): write a head."
        )
    return ["asin", "user_id", "rating", "timestamp"] if share[0] > 0.9 else ["user_id", "asin", "rating", "timestamp"]


def _objects(path: Path, parse: Callable[[dict[str, Any]], Any], problems: MalformedRows) -> Iterator[Any]:
    """Rows that are JSON or Python literals."""

    def parse_line(line: bytes) -> Any:
        try:
            row = json.loads(line)
        except ValueError:
            try:
                row = ast.literal_eval(line.decode().strip())
            except (ValueError, SyntaxError, MemoryError):
                raise MalformedRow("it is neither JSON nor a Python literal (code is never run)") from None
        if not isinstance(row, dict):
            raise MalformedRow("it is no object")
        return parse(row)

    return _lines(path, parse_line, problems)


def _lines(path: Path, parse: Callable[[bytes], Any], problems: MalformedRows, skip: bool = False) -> Iterator[Any]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if (skip and number == 1) or not line.strip():
                    continue
                try:
                    yield parse(line)
                except (MalformedRow, UnicodeDecodeError, RecursionError) as error:
                    problems.add(f"line {number}: {error}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged after line {number} ({error}): fetch it again.") from error
    problems.report(path, number - skip)


def _open(path: Path) -> IO[bytes]:
    """A file, decompressed if it begins as gzip does."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]
