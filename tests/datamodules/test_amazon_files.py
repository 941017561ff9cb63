"""Amazon's files: every form gives what a plain reading of the published pipeline gives, in the published order."""

import gzip
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from datamodules.interactions.amazon_files import read_amazon
from datamodules.interactions.interaction_log import InteractionLog, Pipeline
from datamodules.interactions.interaction_rows import draw_negatives

DOMAINS = ["Toys", "Arts"]  # not in the order of their names
Rows = dict[str, list[tuple[str, str, str, str]]]


def synthetic() -> tuple[Rows, dict[str, list[dict]]]:
    """Ratings (item, user, rating, time) and metadata, with repeats, unknown items, shared items, equal and 9-digit times."""
    draw = random.Random(5)
    asins = [f"B{number:09d}" for number in range(60)]
    own = {"Toys": asins[:35], "Arts": asins[30:]}
    ratings, metas = {}, {}
    for domain in DOMAINS:
        rows = [
            (
                draw.choice(own[domain]),
                f"A{draw.randrange(30):012d}",
                draw.choice(["1.0", "5.0"]),
                str(10**9 + draw.randrange(-9, 30)),
            )
            for _ in range(260)
        ]
        ratings[domain] = rows + draw.sample(rows, 30) + [("B999999999", "A000000000099", "3.0", "1000000001")]
        metas[domain] = [
            {"asin": key, "title": f"{domain} {key[-2:]}" if draw.random() < 0.9 else ""}
            for key in draw.sample(own[domain], len(own[domain]))
        ]
    return ratings, metas


def write_2018(folder: Path) -> Path:
    ratings, metas = synthetic()
    for domain in DOMAINS:
        (folder / "Ratings").mkdir(parents=True, exist_ok=True)
        (folder / "Ratings" / f"{domain}.csv").write_text("".join(",".join(row) + "\n" for row in ratings[domain]))
        (folder / "Metadata").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in metas[domain])
        (folder / "Metadata" / f"meta_{domain}.json.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def write_2014(folder: Path) -> Path:
    ratings, metas = synthetic()
    for domain in DOMAINS:
        rows = [f"{user},{item},{rating},{time}\n" for item, user, rating, time in ratings[domain]]
        (folder / f"ratings_{domain}.csv").write_text("".join(rows))
        (folder / f"meta_{domain}.json").write_text("".join(f"{row!r}\n" for row in metas[domain]))
    return folder


def write_2023(folder: Path, reviews: bool) -> Path:
    ratings, metas = synthetic()
    for domain in DOMAINS:
        lines = ["user_id,parent_asin,rating,timestamp,history"]
        lines += [f"{user},{item},{rating},{time}000," for item, user, rating, time in ratings[domain]]
        if reviews:
            lines = [
                json.dumps(
                    {"asin": "other", "parent_asin": item, "user_id": user, "rating": float(rating), "timestamp": f"{time}000"}
                )
                for item, user, rating, time in ratings[domain]
            ]
        (folder / f"{domain}.{'jsonl' if reviews else 'csv'}").write_text("\n".join(lines) + "\n")
        rows = [{"parent_asin": row["asin"], "title": row["title"] or None} for row in metas[domain]]
        (folder / f"meta_{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def published(as_text: bool) -> tuple[dict[str, list[list]], dict[str, list[str]], dict[str, str]]:
    """Section 7, step by step: users to [item, rating, domain, time] in order, items of each domain, titles."""
    ratings, metas = synthetic()
    users: dict[str, list[list]] = {}
    items: dict[str, tuple[str, str]] = {}
    for domain in DOMAINS:
        read: dict[str, list[list]] = {}
        for item, user, rating, time in ratings[domain]:
            rows = read.setdefault(user, [])
            if [item, rating, domain, time] not in rows:
                rows.append([item, rating, domain, time])
        known = {row["asin"] for row in metas[domain]}
        for user in random.Random(2023).sample(list(read), len(read)):
            users.setdefault(user, []).extend(row for row in read[user] if row[0] in known)
        items.update({row["asin"]: (domain, row["title"]) for row in metas[domain]})
    while True:
        count = defaultdict(int)
        for rows in users.values():
            for row in rows:
                count[row[0]] += 1
        kept = {user: [row for row in rows if count[row[0]] >= 5] for user, rows in users.items() if len(rows) >= 5}
        if kept == users:
            break
        users = kept
    left = {row[0] for rows in users.values() for row in rows}
    for rows in users.values():
        rows.sort(key=lambda row: (row[3] if as_text else int(row[3]), row[0], row[1]))
    by_domain = {domain: [item for item, (place, _) in items.items() if place == domain and item in left] for domain in DOMAINS}
    return users, by_domain, {item: title for item, (_, title) in items.items()}


def log_of(folder: Path, **arguments: object) -> InteractionLog:
    return Pipeline(**arguments)(read_amazon(folder, DOMAINS, "raise"), str(folder))


@pytest.mark.parametrize("as_text", [False, True], ids=["numbers", "texts"])
def test_log_is_the_published_one(tmp_path: Path, as_text: bool) -> None:
    log = log_of(write_2018(tmp_path), string_time_sort=as_text)
    users, items, titles = published(as_text)
    assert users != published(not as_text)[0]
    assert any(row[2] == "Toys" and row[0] in items["Arts"] for rows in users.values() for row in rows)
    assert log.user_keys == list(users)
    assert log.item_keys == [*items["Toys"], *items["Arts"]]
    assert log.domain_offsets.tolist() == [0, len(items["Toys"]), len(log.item_keys)]
    assert log.titles == [titles[key] for key in log.item_keys]
    for user, (begin, end) in enumerate(zip(log.user_offsets[:-1], log.user_offsets[1:], strict=True)):
        found = [(log.item_keys[log.item_N[n]], DOMAINS[log.domain_N[n]], str(log.time_N[n])) for n in range(begin, end)]
        assert found == [(item, domain, time) for item, _, domain, time in users[log.user_keys[user]]]


def test_negatives_are_the_published_ones(tmp_path: Path) -> None:
    log = log_of(write_2018(tmp_path))
    users, items, _ = published(False)
    number = {key: place for place, key in enumerate(log.item_keys)}
    drawn = np.zeros((2, len(users), 7), dtype=np.int32)
    assert draw_negatives(log, 7, *drawn) == []
    generator = random.Random(42)
    for user, rows in enumerate(users.values()):
        for split, row in enumerate(rows[-2:]):
            assert drawn[split, user].tolist() == [number[key] for key in generator.sample(items[row[2]], 7)]


def test_small_domain_gives_all_but_the_target(tmp_path: Path) -> None:
    log = log_of(write_2018(tmp_path))
    drawn = np.zeros((2, len(log.user_keys), 100), dtype=np.int32)
    assert draw_negatives(log, 100, *drawn) == DOMAINS
    last = log.user_offsets[1] - 1
    begin, end = log.domain_offsets[log.domain_N[last] :][:2]
    assert [item for item in drawn[1, 0] if item >= 0] == [item for item in range(begin, end) if item != log.item_N[last]]


@pytest.mark.parametrize("write", [write_2014, lambda path: write_2023(path, False), lambda path: write_2023(path, True)],
                         ids=["2014", "2023", "2023-reviews"])  # fmt: skip
def test_all_forms_give_the_same_log(tmp_path: Path, write) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = log_of(write_2018(tmp_path / "one")), log_of(write(tmp_path / "two"))
    if two.time_N[0] > 1e11:
        assert (two.time_N == one.time_N * 1000).all()
    for name in ("user_keys", "item_keys", "titles"):
        assert getattr(one, name) == getattr(two, name)
    for name in ("user_offsets", "item_N", "domain_N", "domain_offsets"):
        assert (getattr(one, name) == getattr(two, name)).all()


def test_metadata_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    write_2014(tmp_path)
    with (tmp_path / "meta_Arts.json").open("a") as file:
        file.write("{'asin': __import__('pathlib').Path('ran').touch(), 'title': 'x'}\n")
    with pytest.raises(ValueError, match="line 31: it is neither JSON nor a Python literal") as refused:
        read_amazon(tmp_path, DOMAINS, "raise")
    assert len(str(refused.value).replace(str(tmp_path), "folder")) <= 300
    assert not Path("ran").exists()
    with pytest.warns(match="1 of 31 rows"):
        assert len(read_amazon(tmp_path, DOMAINS, "skip").item_keys) == 60


def test_unknown_columns_mixed_units_and_missing_files_are_refused(tmp_path: Path) -> None:
    write_2018(tmp_path)
    path = tmp_path / "Ratings/Arts.csv"
    rows = path.read_text()
    path.write_text("\n".join(",".join(line.split(",")[::-1]) for line in rows.splitlines()))
    with pytest.raises(ValueError, match=r"Arts.csv fit no known order"):
        log_of(tmp_path)
    path.write_text("\n".join(f"{line}000" for line in rows.splitlines()))
    with pytest.raises(ValueError, match="times in mixed units"):
        log_of(tmp_path)
    path.write_text(rows.replace("5.0", "five", 1))
    with pytest.raises(ValueError, match=r"line \d+: time .* or rating 'five' is no number"):
        log_of(tmp_path)
    meta = tmp_path / "Metadata/meta_Arts.json.gz"
    meta.write_bytes(meta.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"meta_Arts.json.gz is damaged after line \d+"):
        log_of(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no Arts\.csv"):
        log_of(tmp_path)
