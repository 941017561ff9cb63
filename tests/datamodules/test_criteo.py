"""Criteo: the official form of files, parsed block by block, counted, hashed and divided; what is malformed is named."""

import gzip
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import Criteo
from datamodules.clicks.criteo import integer_ids
from datamodules.clicks.criteo_rows import MISSING, parse_block, read_blocks

Row = tuple[int, list[int | None], list[int | None]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))


def drawn(count: int, seed: int = 0) -> list[Row]:
    """Rows with some common and many rare categories, and some of everything missing."""
    draw = random.Random(seed)

    def category(column: int) -> int | None:
        kind = draw.random()
        return None if kind < 0.1 else draw.randrange(2**32) if kind < 0.2 else 1000 * column + draw.randrange(5)

    def integer() -> int | None:
        kind = draw.random()
        return None if kind < 0.2 else draw.randint(-3, 3) if kind < 0.5 else int(draw.expovariate(1e-3))

    return [(draw.randrange(2), [integer() for _ in range(13)], [category(c) for c in range(26)]) for _ in range(count)]


def text(rows: list[Row], labelled: bool = True) -> bytes:
    return b"".join(
        "\t".join([
            *([str(label)] if labelled else []),
            *("" if value is None else str(value) for value in integers),
            *("" if value is None else f"{value:08x}" for value in categories),
        ]).encode() + b"\n"
        for label, integers, categories in rows
    )  # fmt: skip


def folder(root: Path, rows: list[Row], name: str = "train.txt") -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(gzip.compress(text(rows)) if name.endswith(".gz") else text(rows))
    return root


integers = st.lists(st.none() | st.integers(-(10**10) + 1, 10**11 - 1), min_size=13, max_size=13)
categories = st.lists(st.none() | st.integers(0, 2**32 - 1), min_size=26, max_size=26)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 1), integers, categories), min_size=1, max_size=5), labelled=st.booleans())
def test_what_is_written_is_parsed(rows: list[Row], labelled: bool) -> None:
    parsed = parse_block(text(rows, labelled), labelled)
    assert not parsed.problems and parsed.line.tolist() == list(range(len(rows))) and parsed.num_lines == len(rows)
    assert parsed.label.tolist() == [label if labelled else 0 for label, _, _ in rows]
    assert parsed.integers.tolist() == [[MISSING if value is None else value for value in row] for _, row, _ in rows]
    assert parsed.categories.tolist() == [[-1 if value is None else value for value in row] for _, _, row in rows]


@given(st.binary(max_size=200).map(lambda data: data + b"\n"))
def test_any_bytes_are_rows_problems_or_empty(data: bytes) -> None:
    parsed = parse_block(data)
    empty = sum(not line for line in data.split(b"\n")[:-1])
    assert len(parsed.label) + len(parsed.problems) + empty == parsed.num_lines


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_blocks_are_whole_lines_of_any_size(tmp_path: Path, name: str, ending: bytes, size: int) -> None:
    data = text(drawn(4))
    raw = data.replace(b"\n", ending).removesuffix(ending)  # the last line may lack its end
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    blocks = list(read_blocks(tmp_path / name, size))
    assert b"".join(blocks) == data and all(block.endswith(b"\n") for block in blocks)


def test_integers_fall_into_the_published_ranges() -> None:
    values = [None, -5, -3, -2, -1, 0, 1, 2, 3, 4, 17, 1000, 2**31 - 1, 10**10]
    ids = integer_ids(np.array([MISSING if value is None else value for value in values])).tolist()
    assert ids[:8] == [0, 1, 1, 2, 3, 4, 5, 6]
    assert ids[8:13] == [6 + math.floor(math.log(value) ** 2) for value in values[8:13] if value]
    assert ids[13] == ids[12] == 467


def test_rare_unseen_and_missing_categories_have_ids_of_their_own(tmp_path: Path) -> None:
    rows = drawn(600)
    data = Criteo(folder(tmp_path / "dac", rows), min_count=10, hash_size=1000)
    assert data.field_dims == (468,) * 13 + (1002,) * 26 and data.num_dense == 0
    where = np.concatenate([table.sparse for table in data.tables.values()])
    assert len(where) == 600
    # The same rows in the order of the splits, by their integers and labels.
    order = {split: [] for split in data.tables}
    for table in data.tables.values():
        for row in range(len(table)):
            order[table.split].append((int(table.label[row]), *table.sparse[row, :13].tolist()))
    key = {
        (label, *integer_ids(np.array([MISSING if v is None else v for v in ints])).tolist()): cats for label, ints, cats in rows
    }
    assert len(key) == 600
    train = [key[row] for row in order["train"]]
    for column in range(26):
        common = {value for value, count in Counter(cats[column] for cats in train).items() if count >= 10 and value is not None}
        assert len(common) == 5
        names: dict[int, int] = {}
        for split, found in order.items():
            ids = data.tables[split].sparse[:, 13 + column].tolist()
            for row, number in zip(found, ids, strict=True):
                value = key[row][column]
                assert number == 0 if value is None else (number >= 2) == (value in common)
                if value in common:
                    assert names.setdefault(value, number) == number
        assert 3 <= len(set(names.values())) <= 5


def test_the_hash_tells_fields_apart(tmp_path: Path) -> None:
    data = Criteo(tmp_path, min_count=1)
    same = parse_block(text([(0, [None] * 13, [7] * 26)]))
    assert len(set(data.encode(same, [])[0, 13:].tolist())) == 26


def test_rows_are_divided_eight_one_one_by_their_number(tmp_path: Path) -> None:
    rows = drawn(4000)
    data = Criteo(folder(tmp_path / "one", rows), min_count=1)
    sizes = {split: len(table) for split, table in data.tables.items()}
    assert sum(sizes.values()) == 4000
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert sizes[split] / 4000 == pytest.approx(share, abs=0.02)
    root = tmp_path / "days"
    for day, part in ((0, rows[:1500]), (2, rows[1500:1600]), (10, rows[1600:])):
        folder(root, part, f"day_{day}.gz" if day else "day_0")
    folder(root, [], "day_0.gz")
    days = Criteo(root, min_count=1)
    assert [path.name for path in days.files()] == ["day_0", "day_2.gz", "day_10.gz"]
    for split, table in data.tables.items():
        assert np.array_equal(table.sparse, days.tables[split].sparse) and np.array_equal(table.label, days.tables[split].label)


def test_values_of_the_user_are_encoded_as_in_the_table(tmp_path: Path) -> None:
    rows = drawn(300)
    root = folder(tmp_path / "dac", rows)
    (root / "test.txt").write_bytes(text(rows, labelled=False))
    data = Criteo(root, predict_file=root / "test.txt", batch_size=64)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    sparse = torch.cat([batch["sparse"] for batch in batches])
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(300)) and "label" not in batches[0]
    known = data.read_file(root / "train.txt").batch(list(range(300)))
    assert torch.equal(known["sparse"], sparse) and known["label"].tolist() == [label for label, _, _ in rows]
    table = {tuple(row) for part in data.tables.values() for row in part.sparse.tolist()}
    assert {tuple(row) for row in sparse.tolist()} == table
    assert batches[0]["dense"].shape == (64, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1\t2", r"line 3: 2 column\(s\), not 40"),
        (b"2" + b"\t" * 39, "line 3: column 1 holds '2', which is no label"),
        (b"\t" * 39, "line 3: column 1 holds '', which is no label"),
        (b"1\t1.5" + b"\t" * 38, r"line 3: column 2 holds '1\.5', which is no integer"),
        (b"1\t-" + b"\t" * 38, "line 3: column 2 holds '-', which is no integer"),
        (b"1" + b"\t" * 14 + b"68fd1e6g" + b"\t" * 25, "line 3: column 15 holds '68fd1e6g', which is no hexadecimal"),
        (b"1" + b"\t" * 39 + b"123456789", "line 3: column 40 holds '123456789', which is no hexadecimal"),
    ],
)
def test_malformed_lines_are_counted_or_left_out(tmp_path: Path, line: bytes, message: str) -> None:
    rows = drawn(40)
    tmp_path.joinpath("train.txt").write_bytes(text(rows[:2]) + line + b"\n" + text(rows[2:]) + b"\n")
    with pytest.raises(ValueError, match=f"1 of 42 rows of .*{message}.*on_error: skip"):
        Criteo(tmp_path).prepare_data()
    skipping = Criteo(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match=f"1 of 42 rows .*{message}"):
        skipping.prepare_data()
    assert sum(len(table) for table in skipping.tables.values()) == 40


def test_another_file_is_another_table(tmp_path: Path) -> None:
    root = folder(tmp_path / "dac", drawn(100))
    first = Criteo(root).folder()
    assert Criteo(root).folder() == first != Criteo(root, min_count=2).folder()
    folder(root, drawn(101))
    assert Criteo(root).folder() != first


@pytest.mark.parametrize(("arguments", "message"), [({"min_count": 0}, "min_count=0"), ({"hash_size": 0}, "hash_size=0")])
def test_impossible_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Criteo(Path("dac"), **arguments)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither train\.txt .* nor day_0\.gz"):
        Criteo(tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Criteo(tmp_path).read_file(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no rows to train on"):
        Criteo(folder(tmp_path / "empty", [])).prepare_data()
