"""Tasks: blocks hold the source's rows and nothing else, support and query share none, and ranks see one order."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import Tasks
from datamodules.clicks.click_table import SPLITS, ClickColumns, ClickRows
from datamodules.tasks.task_files import TaskFiles
from datamodules.tasks.task_sets import Share, TaskSet
from datamodules.tasks.task_table import RowSource, TaskTable, open_tasks, write_tasks

COLUMNS = ClickColumns(("item", "kind"), (500, 7), ("price",))


def source(num_tasks: int = 90, seed: int = 0) -> RowSource:
    """Rows of tasks with 1 to 40 rows, in the order of time, tasks mixed."""
    draw = np.random.default_rng(seed)
    task_N = draw.permutation(np.repeat(np.arange(num_tasks) + 1000, draw.integers(1, 41, num_tasks)))
    size = len(task_N)
    rows = ClickRows(
        np.stack([draw.integers(0, 500, size), draw.integers(0, 7, size)], axis=1),
        draw.standard_normal((size, 1)).astype(np.float32),
        draw.integers(0, 2, size),
    )
    return RowSource(COLUMNS, [rows], task_N)


def written(folder: Path, rows: RowSource | None = None, least: int = 6, share: float = 0.25) -> dict[str, TaskTable]:
    folder.mkdir(exist_ok=True)
    write_tasks(folder, rows or source(), least, share, 0.1, "task")
    return {**open_tasks(folder)}


def sets(table: TaskTable, world: int, batch_size: int, train: bool = True, **options) -> list[TaskSet]:
    """The set of each rank."""
    arguments = {"support": 3, "query": 3, "order": "random", "seed": 5, "run": 8} | options
    return [TaskSet([table], share=Share((world, rank, batch_size)), train=train, **arguments) for rank in range(world)]


@pytest.fixture(scope="module")
def films() -> Tasks:
    data = Tasks(seed=0)
    data.setup("fit")
    return data


def test_users_of_movielens_are_613_and_330_cold_ones(films: Tasks) -> None:
    train, val, cold = (films.dataset(split) for split in SPLITS)
    assert (len(train), len(val), len(cold)) == (613, 94, 236)
    assert films.field_dims == (1683, 16, 8, 2, 21, 37) and sum(films.field_dims) == 1767 and films.num_dense == 19
    assert sorted([*train.tasks, *val.tasks, *cold.tasks]) == list(range(1, 944))
    tables = films.tables[0]
    assert sum(table.table.num_rows for table in tables.values()) == 100_000
    assert np.mean(np.concatenate([table.table.label for table in tables.values()])) == pytest.approx(0.55375)


def test_blocks_hold_the_rows_of_the_source_and_each_is_of_one_task(tmp_path: Path) -> None:
    rows = source()
    tables = written(tmp_path / "blocks", rows)
    seen: list[int] = []
    for table in tables.values():
        for number in range(len(table)):
            block, task = table.read(number, number + 1), table.tasks[number]
            index = block["index"]
            assert len(index) == task["count"] >= 6 and (np.diff(index) > 0).all(), "in the order of time"
            assert (rows.task_N[index] == task["task"]).all()
            for name in ("sparse", "dense", "label"):
                assert np.array_equal(block[name], getattr(rows.parts[0], name)[index])
            seen += index.tolist()
    long = [task for task, count in Counter(rows.task_N.tolist()).items() if count >= 6]
    assert sorted(seen) == np.flatnonzero(np.isin(rows.task_N, long)).tolist()


@pytest.mark.parametrize("order", ["random", "chronological"])
def test_support_and_query_are_rows_of_the_task_and_share_none(tmp_path: Path, order: str) -> None:
    rows = source()
    table = written(tmp_path / "blocks", rows)["train"]
    (data,) = sets(table, 1, 4, order=order)
    numbers = [7, 2, 3, 4]
    batch = data.batch(numbers)
    support, query = batch["support"]["index"], batch["query"]["index"]
    assert support.shape == query.shape == (4, 3) and batch["support"]["mask"].all()
    for place, number in enumerate(numbers):
        assert batch["task"][place] == table.tasks["task"][number]
        chosen = torch.cat([support[place], query[place]]).tolist()
        assert len(set(chosen)) == 6 and (rows.task_N[chosen] == int(batch["task"][place])).all()
        if order == "chronological":
            assert chosen == np.flatnonzero(rows.task_N == int(batch["task"][place]))[:6].tolist()
        assert torch.equal(batch["query"]["sparse"][place], torch.from_numpy(rows.parts[0].sparse[query[place]]))
    again = data.batch(numbers)["support"]["index"]
    data.set_epoch(1)
    other = data.batch(numbers)["support"]["index"]
    assert torch.equal(again, support) and torch.equal(other, support) == (order == "chronological")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_have_the_tasks_of_one_process_step_by_step(tmp_path: Path, world: int) -> None:
    table = written(tmp_path / "blocks")["train"]
    (one,) = sets(table, 1, 8)
    order = one.epoch_order(3, 5)
    assert sorted(order) == list(range(len(table))), "every task once"
    assert np.array_equal(order, one.epoch_order(3, 5)) and not np.array_equal(order, one.epoch_order(4, 5))
    shared = sets(table, world, 8 // world)[0].epoch_order(3, 5)
    for step in range(len(table) // 8):
        expected, found = (each[8 * step : 8 * step + 8] for each in (order, shared))
        assert np.array_equal(expected, found.reshape(-1, world).T.ravel()), "rank by rank, neighbours"


# Files of the user's


def days(folder: Path, number: int, parquet: bool = False) -> TaskFiles:
    """A file a day; day d has users d ... d + 29, twelve rows each, and films that begin with its number."""
    paths = []
    for day in range(number):
        rows = [
            {
                "user": f"u{day * 5 + place % 30}",
                "film": f"{day}-{place % 7}",
                "price": place / 10,
                "time": -place,
                "label": place % 2,
            }
            for place in range(360)
        ]
        path = folder / f"day{day}.{'parquet' if parquet else 'csv'}"
        if parquet:
            parquet_files = pytest.importorskip("pyarrow.parquet", reason="not measured: pyarrow is not installed")
            parquet_files.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        else:
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            path.write_text("\n".join(lines) + "\n")
        paths.append(path)
    return TaskFiles(paths, "user", ["user", "film"], ["price"], time="time")


@pytest.mark.parametrize("parquet", [False, True])
def test_a_day_is_appended_without_rewriting(parquet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))
    arguments: dict[str, Any] = {"support": 4, "query": 4, "batch_size": 4, "order": "chronological"}
    first = Tasks(files=days(tmp_path, 1, parquet), **arguments)
    first.setup("fit")
    assert first.field_dims == (31, 8) and first.num_dense == 1
    (folder,) = first.folders()
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = Tasks(files=days(tmp_path, 2, parquet), **arguments)
    second.setup("fit")
    assert second.folders()[0] == folder and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    # Five users are new and seven films; what was known keeps its id.
    assert second.field_dims == (36, 15)
    tasks = {split: {*second.dataset(split).tasks} for split in SPLITS}
    assert sum(len(second.dataset(split)) for split in SPLITS) == 60, "a block of each user and day"
    assert sum(map(len, tasks.values())) == 35 == len(set.union(*tasks.values()))
    for split in ("val", "test"):
        assert {*first.dataset(split).tasks} <= tasks[split], "who is cold stays so"
    for part, table in enumerate(second.tables):
        for split in SPLITS:
            rows = table[split].read(0, len(table[split]))
            assert (rows["sparse"][:, 1] > 7 * part).all() and (rows["sparse"][:, 1] <= 7 * (part + 1)).all()
            assert np.array_equal(rows["label"], rows["index"] % 2)
            np.testing.assert_allclose(rows["dense"][:, 0], rows["index"] / 10, rtol=1e-6)
            assert (np.diff(rows["index"].reshape(-1, 12)) < 0).all(), "in the order of time"


def test_rows_of_a_file_without_a_label_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "asked.csv"
    path.write_text("user,film,price,time,label\nu3,0-1,1.5,0,1\nu3,9-9,2.5,1,\nnew,0-2,1,1,0\nnew,0-3,1,1,\n")
    data = Tasks(files=days(tmp_path, 1), support=4, query=4, predict_file=path)
    (batch,) = data.predict_dataloader()
    assert batch["task"].tolist() == [data.files.names(data.folders()[0])["user"].names.index("u3") + 1, 31]
    assert batch["support"]["label"].tolist() == [[1.0], [0.0]] and batch["query"]["index"].tolist() == [[1], [3]]
    # What is new has id 0.
    assert batch["query"]["sparse"][0, 0].tolist()[1] == 0 and batch["query"]["sparse"][1, 0].tolist()[0] == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [("u1,0-1,1.5,0,2", "label is 2, not 0 or 1"), (",0-1,1,1,0", "user is missing"), ("u1,0-1,,1,0", "price is missing"),
     ("u1,0-1,1,1,", "label is missing")],
)  # fmt: skip
def test_a_malformed_row_is_one_sentence(line: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))
    files = days(tmp_path, 1)
    with files.paths[0].open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=says) as refused:
        Tasks(files=files, support=4, query=4).setup("fit")
    assert "line 362" in str(refused.value) and len(str(refused.value)) <= 300
    Tasks(files=files, support=4, query=4, on_error="skip").setup("fit")


def test_a_corrupt_block_is_found_by_its_sum(tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    written(folder)
    labels = np.load(next(folder.glob("train*label*.npy")), mmap_mode="r+")
    labels[7] = 1 - labels[7]
    labels.flush()
    table = open_tasks(folder)["train"]
    place = int(np.searchsorted(table.tasks["offset"], 7, side="right")) - 1
    table.read(place + 1, place + 2)  # the others are sound
    with pytest.raises(ValueError, match=rf"task {table.tasks['task'][place]} .*CRC differs: delete the folder"):
        table.read(place, place + 1)


def test_blocks_of_other_columns_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "blocks")
    with pytest.raises(ValueError, match="columns item, kind, price, not item: delete"):
        open_tasks(tmp_path / "blocks", ClickColumns(("item",), (500,), ()))


def test_the_latest_tasks_are_the_test_and_those_before_are_validation(tmp_path: Path) -> None:
    rows = source()
    tasks, short = write_tasks(tmp_path, rows, 6, 0.25, 0.1, "time")
    assert [round(share * (90 - short)) for share in (0.25, 0.1)] == pytest.approx([tasks["test"], tasks["val"]], abs=1)
    first = {
        split: [int(np.flatnonzero(rows.task_N == task)[0]) for task in table.tasks["task"]]
        for split, table in open_tasks(tmp_path).items()
    }
    assert max(first["train"]) < min(first["val"]) <= max(first["val"]) < min(first["test"])


def test_tasks_without_enough_rows_and_too_many_ranks_are_refused(
    tmp_path: Path, films: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="None of the 90 tasks has the 41 rows of support and query"):
        written(tmp_path / "blocks", least=41)
    for name in ("support", "query"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            Tasks(**{name: 0})
    monkeypatch.setattr(films, "_share", lambda: (614, 0))
    with pytest.raises(ValueError, match=r"613 task\(s\) cannot be shared out to 614 processes"):
        films.train_dataloader()
