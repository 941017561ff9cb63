"""Tables of clicks on disk: what is written is read, by the place of the row, and damage is named."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import ClickData
from datamodules.clicks.click_table import SPLITS, ClickColumns, ClickRows, TableWriter, open_table
from datamodules.clicks.feature_ids import Categories, Ranges

COLUMNS = ClickColumns(("colour", "shape"), (50, 3), ("weight",))
SIZES = {"train": 40, "val": 5, "test": 7}


def written(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A table in two blocks a split, and what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    random, writer, held = np.random.default_rng(0), TableWriter(folder, COLUMNS, SIZES), {}  # type: ignore[arg-type]
    for split, size in SIZES.items():
        sparse = np.stack([random.integers(dim, size=size) for dim in COLUMNS.field_dims], axis=1)
        label, dense = random.integers(2, size=size), random.normal(size=(size, 1)).astype(np.float32)
        for part in (slice(0, 3), slice(3, None)):
            writer.add(split, sparse[part], label[part], dense[part])  # type: ignore[arg-type]
        held[split] = (sparse, label, dense)
    writer.close()
    return held


class Stored(ClickData):
    """Click data whose table is in a folder."""

    def __init__(self, root: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)

    def folder(self) -> Path:
        return self.root / "clicks" / "table"

    def write(self, folder: Path) -> None:
        written(folder)

    def read_file(self, path: Path) -> ClickRows:
        raise NotImplementedError


def test_what_is_written_is_read_by_place(tmp_path: Path) -> None:
    held = written(tmp_path)
    tables = open_table(tmp_path)
    assert tables["train"].columns == COLUMNS
    for split in SPLITS:
        sparse, label, dense = held[split]
        places = [4, 0, 2]
        batch = tables[split].batch(places)
        assert {name: value.dtype for name, value in batch.items()} == {
            "index": torch.int64, "dense": torch.float32, "sparse": torch.int64, "label": torch.float32}  # fmt: skip
        assert batch["index"].tolist() == places and batch["label"].tolist() == label[places].tolist()
        assert batch["sparse"].tolist() == sparse[places].tolist() and batch["dense"].tolist() == dense[places].tolist()
        single = tables[split][4]
        assert single["label"].ndim == 0 and torch.equal(single["sparse"], batch["sparse"][0])


def test_every_row_comes_once_an_epoch_and_the_number_is_that_of_the_row(tmp_path: Path) -> None:
    data = Stored(tmp_path, batch_size=8)
    batches = list(data.train_dataloader())
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == list(range(40)) and index.tolist() != list(range(40))
    table = data.tables["train"]
    assert torch.equal(torch.cat([batch["sparse"] for batch in batches]), table.batch(index.tolist())["sparse"])
    assert torch.cat([batch["index"] for batch in data.test_dataloader()]).tolist() == list(range(7))
    assert len(list(data.val_dataloader())) == 1


def test_some_training_rows_are_drawn_once(tmp_path: Path) -> None:
    data = Stored(tmp_path, train_rows=10, batch_size=5)
    some, whole = data.dataset("train"), data.tables["train"]
    assert len(some) == 10 and len(data.dataset("test")) == 7
    batch = some.batch(list(range(10)))
    assert batch["index"].tolist() == list(range(10))
    places = some.places.tolist()
    assert places == sorted(set(places)) and torch.equal(batch["sparse"], whole.batch(places)["sparse"])
    assert Stored(tmp_path, train_rows=10).dataset("train").places.tolist() == places
    assert Stored(tmp_path, train_rows=10, seed=1).dataset("train").places.tolist() != places
    assert len(Stored(tmp_path, train_rows=1000).dataset("train")) == 40


def test_workers_are_not_sent_what_is_mapped(tmp_path: Path) -> None:
    data = Stored(tmp_path)
    table = data.dataset("train")
    before = table.batch([3, 1])
    assert b"train.sparse" not in pickle.dumps(table) and len(pickle.dumps(table)) < 1000
    assert torch.equal(copy.deepcopy(table).batch([3, 1])["sparse"], before["sparse"])


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    alone, helped = (list(Stored(tmp_path, batch_size=16, num_workers=workers).train_dataloader()) for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("index", "dense", "sparse", "label"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "facts.json").unlink(), r"facts\.json is damaged .*: delete the folder"),
        (lambda folder: (folder / "facts.json").write_text("{}"), r"facts\.json is damaged"),
        (lambda folder: (folder / "train.sparse.npy").unlink(), r"train\.sparse\.npy of the cache cannot be read"),
        (lambda folder: (folder / "train.label.npy").write_bytes(b"x"), r"train\.label\.npy of the cache cannot be read"),
        (
            lambda folder: np.save(folder / "train.dense.npy", np.zeros((2, 1))),
            r"holds an array of shape \(2, 1\), not \(40, 1\)",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    data = Stored(tmp_path, batch_size=8)
    data.prepare_data()
    damage(data.folder())
    with pytest.raises(ValueError, match=message):
        next(iter(data.train_dataloader()))


def test_tables_that_are_filled_wrongly_are_refused(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, COLUMNS, {"train": 1, "val": 0, "test": 0})
    with pytest.raises(ValueError, match="lies outside its field"):
        writer.add("train", np.array([[0, 3]]), np.array([0]), np.zeros((1, 1)))
    with pytest.raises(ValueError, match="rows were announced"):
        writer.close()
    with pytest.raises(ValueError, match="announced with 1 rows, and has 2"):
        writer.add("train", np.zeros((2, 2), int), np.zeros(2), np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"train_rows": 0}, "train_rows=0"), ({"predict_split": "all"}, "train, val, test"), ({"on_error": "warn"}, "raise, skip")],
)
def test_impossible_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stored(tmp_path, **arguments)


def test_unknown_and_rare_categories_share_an_id() -> None:
    found = Categories.of(np.array(["a", "b", "a", "", "c", "c"]), min_count=2)
    assert found.ids(np.array(["a", "b", "c", "d", ""])).tolist() == [1, 0, 2, 0, 0] and found.num_ids == 3


def test_ranges_hold_equally_many_and_know_what_is_missing() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(3, 2, size=1000), [np.nan] * 10])
    ranges = Ranges.of(values, 8)
    ids = ranges.ids(values)
    assert np.bincount(ids).tolist() == [10] + [125] * 8 and ranges.num_ids == 9
    assert ranges.ids(np.array([-1e9, 1e9])).tolist() == [1, 8]
    scaled = ranges.standardized(values)
    assert scaled[-1] == 0 and abs(scaled[:1000].mean()) < 1e-5 and scaled[:1000].std() == pytest.approx(1, abs=1e-5)
    few = Ranges.of(np.array([0.0] * 99 + [1.0]), 8)  # edges that coincide are one
    assert few.ids(np.array([0.0, 0.5, 1.0])).max() < few.num_ids <= 3
    assert Ranges.of(np.array([2.0, 2.0]), 8).standardized(np.array([2.0])).tolist() == [0.0]
