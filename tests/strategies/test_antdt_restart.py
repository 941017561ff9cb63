"""Every sample once an epoch, and the weights of an undisturbed run, whatever happens to processes on the way."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from antdt_job import Run, diary, job, wait_for_end
from antdt_plans import Plans, Restart
from distributed import RankError, RankPool
from sweep import sweep

from zoo.base.checkpoint import read_checkpoint

ROWS = 45  # six steps of 8 an epoch, the last of 5
EXACT: dict[str, Any] = {"shard_steps": 1, "global_batch_size": 8, "shuffle": "global"}
SHARDS: dict[str, Any] = {**EXACT, "shard_steps": 3}


def once(folder: Path, epochs: int = 2) -> None:
    trained, steps = diary(folder)
    assert {epoch: dict(counts) for epoch, counts in trained.items()} == {
        epoch: dict.fromkeys(range(ROWS), 1) for epoch in range(epochs)
    }
    assert steps == list(range(1, 6 * epochs + 1))


def same(runs: list[Run], others: list[Run]) -> None:
    for run, other in zip(runs, others, strict=True):
        for name, value in run.weights.items():
            torch.testing.assert_close(value, other.weights[name], rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = pool.run(job, folder, EXACT, data={"rows": ROWS})
    once(folder)
    return runs


@pytest.mark.parametrize("stop", sweep([1, 4, 6, 8], quick=(0, 2)))
def test_a_run_that_is_stopped_goes_on_where_it_was(pool: RankPool, tmp_path: Path, undisturbed: list[Run], stop: int) -> None:
    """Within an epoch, and at its end (step 6)."""
    data = {"rows": ROWS}
    pool.run(job, tmp_path, EXACT, data=data, max_steps=stop)
    runs = pool.run(job, tmp_path, EXACT, 1, data=data, resume=True)
    once(tmp_path)
    same(runs, undisturbed)


def test_ranks_may_be_more_or_fewer(pool: RankPool, tmp_path: Path, undisturbed: list[Run]) -> None:
    data = {"rows": ROWS}
    pool.run(job, tmp_path, SHARDS, data=data, max_steps=3, world_size=3)
    pool.run(job, tmp_path, SHARDS, 1, data=data, resume=True, max_steps=8, world_size=1)
    pool.run(job, tmp_path, SHARDS, 2, data=data, resume=True, world_size=2)
    once(tmp_path)


def test_another_global_batch_within_an_epoch_is_refused(pool: RankPool, tmp_path: Path) -> None:
    automatic = {**SHARDS, "global_batch_size": None}
    pool.run(job, tmp_path, automatic, max_steps=3, world_size=3, data={"rows": ROWS})
    with pytest.raises(RankError, match=r"set\s+global_batch_size to 12"):
        pool.run(job, tmp_path, automatic, 1, resume=True, data={"rows": ROWS})


def test_other_strategies_go_on_with_it_and_it_with_theirs(pool: RankPool, tmp_path: Path) -> None:
    """The zoo's own order, in whole batches; DDP leaves out what fills none."""
    exact = {"shard_steps": 1, "drop_last": True}
    (tmp_path / "ddp").mkdir()
    ddp = pool.run(job, tmp_path / "ddp", "ddp", data={"rows": ROWS})
    for first, second in ((exact, "ddp"), ("ddp", exact)):
        folder = tmp_path / str(type(first).__name__)
        folder.mkdir()
        pool.run(job, folder, first, data={"rows": ROWS}, max_steps=3)
        same(pool.run(job, folder, second, 1, data={"rows": ROWS}, resume=True), ddp)


def test_what_is_left_in_pieces_is_not_taken_for_a_rest(pool: RankPool, tmp_path: Path) -> None:
    pieces = {"shard_steps": 3, "tail_factor": 1.0, "drop_last": True}
    pool.run(job, tmp_path, pieces, data={"rows": ROWS}, max_steps=2)
    stored = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["antdt"]["ledger"]
    assert len(stored["todo"]) > 1
    with pytest.raises(RankError, match="another kind of loader"):
        pool.run(job, tmp_path, "ddp", 1, data={"rows": ROWS}, resume=True)


def test_killed_ranks_cost_nothing_but_time(pool: RankPool, tmp_path: Path, undisturbed: list[Run]) -> None:
    """SIGKILL in the last step of an epoch; the service lives on in its own process, and batches change meanwhile."""
    data, own = {"rows": ROWS}, {**SHARDS, "server": "auto", "solution": Plans([[6, 2], [2, 6], [5, 3]])}
    with pytest.raises(RankError):
        pool.run(job, tmp_path, own, data=data, end=("kill", 1, 6), max_restarts=3)
    server = json.loads((tmp_path / "antdt" / "server.json").read_text())["pid"]
    pool.run(job, tmp_path, own, 1, data=data, resume=True, max_restarts=3)
    once(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "antdt" / "events.jsonl").read_text().splitlines()]
    assert [event["gen"] for event in events if event["kind"] == "generation"] == [1, 2]
    wait_for_end(server)  # with the job
    assert not (tmp_path / "antdt" / "server.json").exists()


def test_a_planned_restart_saves_and_asks_to_be_started_again(pool: RankPool, tmp_path: Path, undisturbed: list[Run]) -> None:
    settings = {**EXACT, "solution": Restart(worker=1, step=3)}
    stopped = pool.run(job, tmp_path, settings, data={"rows": ROWS}, save_every=100, max_restarts=1)
    assert [run.extra["code"] for run in stopped] == [75, 75]
    assert stopped[0].extra["step"] == stopped[1].extra["step"] >= 4
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == stopped[0].extra["step"]
    runs = pool.run(job, tmp_path, settings, 1, data={"rows": ROWS}, resume=True, max_restarts=1)
    assert "code" not in runs[0].extra
    once(tmp_path)
    same(runs, undisturbed)


def test_without_a_launcher_that_restarts_nothing_is_restarted(pool: RankPool, tmp_path: Path) -> None:
    settings = {**EXACT, "solution": Restart(worker=1, step=3)}
    assert "code" not in pool.run(job, tmp_path, settings, data={"rows": ROWS}, max_restarts=0)[0].extra
    once(tmp_path)


def test_all_stop_after_the_same_step_when_one_is_told_to(pool: RankPool, tmp_path: Path, undisturbed: list[Run]) -> None:
    stopped = pool.run(job, tmp_path, EXACT, data={"rows": ROWS}, save_every=100, end=("term", 1, 2))
    assert [run.extra["ended"] for run in stopped] == ["SIGTERMException"] * 2
    assert stopped[0].extra["step"] == stopped[1].extra["step"] < 8
    runs = pool.run(job, tmp_path, EXACT, 1, data={"rows": ROWS}, resume=True)
    once(tmp_path)
    same(runs, undisturbed)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
