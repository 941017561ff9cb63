"""Tasks: blocks hold the source's rows and nothing else, support and query share none, and ranks see one order."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import Tasks
from datamodules.clicks.click_table import ClickColumns, ClickRows
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
    write_tasks(folder, rows or source(), least, share, "task")
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


def test_users_of_movielens_are_707_and_236_cold_ones(films: Tasks) -> None:
    train, cold = films.dataset("train"), films.dataset("test")
    assert (len(train), len(cold)) == (707, 236)
    assert films.field_dims == (1683, 16, 8, 2, 21, 37) and sum(films.field_dims) == 1767 and films.num_dense == 19
    assert set(train.tasks) | set(cold.tasks) == set(range(1, 944))
    tables = films.tables[0]
    assert sum(table.table.num_rows for table in tables.values()) == 100_000
    assert np.mean(np.concatenate([tables[split].table.label for split in ("train", "test")])) == pytest.approx(0.55375)


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
