"""Hot restarts: ranks are lost, the others live on, and the result is that of a run in which nothing happened."""

import ctypes
import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from antdt_hot_job import Death, EndedWhileItLeaves, Job, Torchrun, logs
from antdt_kept import split_and_run
from antdt_plans import Restart
from fork_server import start_fork_server
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from sweep import sweep_tuples
from torch import nn

from benchmarks.sample_trace import audit, read_traces
from strategies import AntDTStrategy
from strategies.antdt.restart.gloo_links import GlooLinks
from strategies.antdt.restart.hot_restart import KeptBuffers, Snapshot
from strategies.antdt.restart.loop_progress import Reached, before_interruption, is_before_first_batch
from strategies.antdt.restart.rank_keeper import RankKeeper
from strategies.antdt.sharding.ledger import DatasetSpec, DataShardingService, LedgerError
from zoo.callbacks import EMA

STEPS = 6  # an epoch of 45 samples, 8 a step, the last of 5

# A whole job


@pytest.fixture(scope="module")
def torchrun() -> Iterator[Torchrun]:
    starter = Torchrun()
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def undisturbed(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    job = Job(tmp_path_factory.mktemp("undisturbed"), trainer={"limit_val_batches": 1.0})
    assert torchrun.run(job) == [0, 0], logs(job)
    return ended(job)


def ended(job: Job) -> dict[str, Any]:
    """What all ranks have come to, which is the same."""
    ends = [json.loads((job.folder / f"end{rank}.json").read_text()) for rank in range(job.ranks)]
    weights = [torch.load(job.folder / f"weights{rank}.pt", weights_only=True) for rank in range(job.ranks)]
    assert all(end == ends[0] for end in ends)
    for other in weights:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)
    return {"weights": weights[0], **ends[0]}


def lives(job: Job) -> dict[int, list[int]]:
    """Processes of each rank that have begun to train, in the order in which they came."""
    found: dict[int, list[int]] = defaultdict(list)
    for line in read_traces(job.folder / "trace"):
        if line["pid" if line["kind"] == "start" else "kind"] not in ("step", *found[line["rank"]]):
            found[line["rank"]].append(line["pid"])
    return dict(found)


def recoveries(job: Job) -> list[float]:
    """Seconds without steps around each restart."""
    lines = [line for line in read_traces(job.folder / "trace") if line["kind"] == "step"]
    generations = sorted({line["gen"] for line in lines})
    return [
        min(line["t"] for line in lines if line["gen"] == gen) - max(line["t"] for line in lines if line["gen"] < gen)
        for gen in generations[1:]
    ]


def goes_through(torchrun: Torchrun, job: Job, undisturbed: dict[str, Any], lost: dict[int, int]) -> None:
    """The job ends well, and as the undisturbed one; ranks not in ``lost`` keep their process, others are replaced as often."""
    assert torchrun.run(job) == [0] * job.ranks, logs(job)
    found = audit(read_traces(job.folder / "trace"), job.rows, 2)
    assert (found.steps, found.duplicates, found.missing) == (2 * STEPS, 0, 0)
    assert {rank: len(pids) - 1 for rank, pids in lives(job).items()} == {rank: lost.get(rank, 0) for rank in range(job.ranks)}
    end = ended(job)
    for name, value in undisturbed["weights"].items():
        torch.testing.assert_close(end["weights"][name], value, rtol=1e-6, atol=1e-12)
    assert {**end, "weights": None} == {**undisturbed, "weights": None}  # counters and learning rates, too
    times = ", ".join(f"{seconds:.2f}" for seconds in recoveries(job))
    print(f"{lost}: training went on after {times} s")


@pytest.mark.parametrize(
    ("deaths", "lost"),
    sweep_tuples(
        [
            # In a forward pass, and the process that has come for it again; rank 0 while it saves; rank 2 after its last step.
            (
                (Death(1, 2, "forward"), Death(1, 2, "forward", 1), Death(0, 4, "saving"), Death(2, 6, "batch_end")),
                {0: 1, 1: 2, 2: 1},
            ),
            # In the validation between the epochs; before its end; when the next has begun, but no batch; in its first step.
            pytest.param(
                (Death(0, 6, "validation"), Death(1, 6, "epoch_end"), Death(2, 6, "epoch_start"), Death(2, 6, "forward", 1)),
                {0: 1, 1: 1, 2: 2},
                marks=pytest.mark.slow,
            ),
            # Two at once, of which one only while it rejoins; in the last validation, and when all is done but the farewell.
            (
                (Death(0, 3, "forward"), Death(1, 3, "setup"), Death(0, 12, "validation", 1), Death(2, 12, "train_end")),
                {0: 2, 1: 1, 2: 1},
            ),
        ]
    ),
    ids=["steps", "epochs", "together"],
)
def test_lost_ranks_are_replaced(
    torchrun: Torchrun, tmp_path: Path, undisturbed: dict[str, Any], deaths: tuple[Death, ...], lost: dict[int, int]
) -> None:
    goes_through(torchrun, Job(tmp_path, deaths, ranks=3, trainer={"limit_val_batches": 1.0}), undisturbed, lost)


@pytest.mark.slow
def test_averages_and_loading_processes_go_on(torchrun: Torchrun, tmp_path: Path) -> None:
    """Validation uses averaged weights, which a loss in its midst must not leave in the model; killed ranks leave loaders."""
    averages = (EMA(decay=0.9),)
    undisturbed = Job(tmp_path / "undisturbed", callbacks=averages, trainer={"limit_val_batches": 1.0})
    assert torchrun.run(undisturbed) == [0, 0], logs(undisturbed)
    deaths = (Death(1, 6, "validation"), Death(0, 9, "forward"))
    job = replace(undisturbed, folder=tmp_path / "disturbed", deaths=deaths, workers=1)
    goes_through(torchrun, job, ended(undisturbed), {0: 1, 1: 1})
    assert max(recoveries(job)) < 15  # a loader that outlived its rank would keep the connections open for longer


@pytest.mark.slow
def test_killed_from_outside_at_random_moments(torchrun: Torchrun, tmp_path: Path) -> None:
    """Ranges of three steps are under way, and commits are late: the ledger is settled by those who live."""
    job = Job(
        tmp_path, ranks=3, slow=0.05, options={"shard_steps": 3}, trainer={"limit_val_batches": 1.0, "max_epochs": 4}
    )  # fmt: skip
    draw = random.Random(5)
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 60
        for generation in (1, 2, 3):
            pids: dict[int, int] = {}
            while len(pids) < 3 and time.monotonic() < end:
                lines = [line for line in read_traces(tmp_path / "trace") if line["gen"] == generation]
                if any(line["kind"] == "step" for line in lines):
                    pids = {line["rank"]: line["pid"] for line in lines if line["kind"] == "start"}
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.2))
            killed.append(pids[draw.randrange(3)])
            os.kill(killed[-1], signal.SIGKILL)

    assert torchrun.run(job, kill) == [0, 0, 0], logs(job)
    found = audit(read_traces(tmp_path / "trace"), job.rows, 4)
    assert (found.steps, found.duplicates, found.missing) == (4 * STEPS, 0, 0)
    assert sum(len(pids) - 1 for pids in lives(job).values()) == 3
    assert {pid for pids in lives(job).values() for pid in pids[:-1]} == set(killed)
    ended(job)


def test_the_controller_has_one_rank_replaced(torchrun: Torchrun, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    job = Job(
        tmp_path, slow=0.1, options={"solution": Restart(worker=1, step=3), "report_every": 1, "decide_every": 0.1},
        trainer={"limit_val_batches": 1.0},
    )  # fmt: skip
    goes_through(torchrun, job, undisturbed, {1: 1})
    assert "is to be replaced; a spare takes its place (1 of 3)" in (tmp_path / "log1.txt").read_text()


def test_without_spares_the_group_is_started_again(torchrun: Torchrun, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    deaths = (Death(1, 2, "forward"), Death(1, 7, "forward", 1))
    job = Job(tmp_path, deaths, spares=1, trainer={"limit_val_batches": 1.0})
    codes = torchrun.run(job)
    assert codes[1] == -signal.SIGKILL, logs(job)
    assert codes[0] not in (0, -signal.SIGKILL), "the survivor ended only when it was killed"
    assert "its 1 spares are used up: all ranks end, and torchrun starts them again" in (tmp_path / "log1.txt").read_text()
    again = Job(tmp_path, trainer=job.trainer, resume=True)
    assert torchrun.run(again) == [0, 0], logs(again)
    found = audit(read_traces(tmp_path / "trace"), job.rows, 2)
    assert (found.steps, found.duplicates, found.missing) == (2 * STEPS, 0, 0)
    for name, value in undisturbed["weights"].items():
        torch.testing.assert_close(ended(again)["weights"][name], value, rtol=1e-6, atol=1e-12)


def test_a_survivor_that_is_told_to_end_while_it_leaves_ends(torchrun: Torchrun, tmp_path: Path) -> None:
    """Though it has other threads, which the kernel may choose to take the signal."""
    job = Job(tmp_path, (Death(1, 2, "forward"),), callbacks=(EndedWhileItLeaves(),))
    assert torchrun.run(job) == [-signal.SIGTERM] * 2, logs(job)


def test_hot_restart_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must outlive all ranks"):
        AntDTStrategy(restart="hot", server="inprocess")
    with pytest.raises(ValueError, match="spares=0 must be at least 1"):
        AntDTStrategy(restart="hot", spares=0)
    with pytest.raises(ValueError, match="torchrun to start the processes"):
        Trainer(accelerator="cpu", devices=2, strategy=AntDTStrategy(restart="hot"), logger=False)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**alone, "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start at least two processes"):
        Trainer(accelerator="cpu", devices=1, strategy=AntDTStrategy(restart="hot"), logger=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="process_group_backend to gloo"):
        Trainer(accelerator="cpu", devices=2, strategy=AntDTStrategy(restart="hot", process_group_backend="nccl"), logger=False)


# The keeper


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., tuple[int | None, str]]:
    """Runs code in a process that a keeper has split off; returns how the keeper ended, and what was written."""

    def run(code: str, spares: int = 1, before: str = "") -> tuple[int | None, str]:
        args = (before, code, spares, tmp_path / "out")
        start_fork_server()
        process = multiprocessing.get_context("forkserver").Process(target=split_and_run, args=args)
        process.start()
        process.join(60)
        process.kill()
        return process.exitcode, (tmp_path / "out").read_text()

    return run


Keep = Callable[..., tuple[int | None, str]]


def test_keeper_replaces_what_is_killed_and_nothing_else(keep: Keep) -> None:
    """Copies compute with several threads, though their keeper's have no copies."""
    work = "print(keeper.number, float(torch.ones(4_000_000).sigmoid().sum()) > 0, flush=True)\n"
    status, wrote = keep(work + "if keeper.number < 2: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(5)", spares=2)
    assert status == 5 and [line for line in wrote.splitlines() if "True" in line] == ["0 True", "1 True", "2 True"]
    assert wrote.count("was killed by SIGKILL; a spare takes its place") == 2


def test_progress_bars_of_before_do_not_hinder(keep: Keep) -> None:
    """Their thread, which tqdm starts again with the next bar, is ended."""
    before = "import tqdm\nfor _ in tqdm.tqdm(range(3)): pass\nassert tqdm.tqdm.monitor.is_alive()"
    status, wrote = keep("for _ in tqdm.tqdm(range(3)): pass\nsys.exit(4 if tqdm.tqdm.monitor.is_alive() else 5)", before=before)
    assert status == 4, wrote


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise ValueError('own mistake')", 1, "own mistake"),
        ("keeper.finished(); os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "spares are used up"),
        ("keeper.ask_for_another()", 75, "is to be replaced, and its 1 spares are used up"),
        # Told to end, from outside: the keeper passes it on.
        ("signal.signal(signal.SIGTERM, lambda *_: os._exit(9)); os.kill(first, signal.SIGTERM); time.sleep(60)", 9, ""),
        ("os.kill(first, signal.SIGTERM); time.sleep(60)", -15, ""),
    ],
)
def test_keeper_ends_as_its_process(keep: Keep, code: str, status: int, said: str) -> None:
    ended, wrote = keep(code)
    assert (ended, said in wrote) == (status, True), wrote


def test_a_process_ends_with_its_keeper(keep: Keep) -> None:
    status, wrote = keep("print(os.getpid(), flush=True); os.kill(first, signal.SIGKILL); time.sleep(60)")
    assert status == -signal.SIGKILL
    end = time.monotonic() + 10
    while time.monotonic() < end:
        stat = Path(f"/proc/{int(wrote)}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("it goes on")


def test_keeper_refuses_to_copy_threads_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    logger = threading.Thread(target=ended.wait, name="logger")
    logger.start()
    with pytest.raises(RuntimeError, match=r"threads run that copies would not have \(.*logger"):
        RankKeeper(1, "rank 0").split()
    ended.set()
    logger.join()
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.main_thread()])  # other tests may have left some
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="has joined a process group"):
        RankKeeper(1, "rank 0").split()


# The parts


def test_cut_links_end_what_waits_for_them() -> None:
    links, listener = GlooLinks(), socket.create_server(("127.0.0.1", 0))
    with links.remembered():
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        inside = socket.create_server(("127.0.0.1", 0))
    outside, peer = socket.socketpair()
    other.close()
    reused = os.dup(outside.fileno())  # takes the number of the closed one
    links.cut()
    assert one.recv(1) == b""
    outside.send(b"x")
    assert peer.recv(1) == b"x"
    socket.create_connection(inside.getsockname()).close()  # still listens
    os.close(reused)
    for each in (one, outside, peer, inside, listener):
        each.close()


def test_buffers_are_put_back_for_an_interrupted_step_only() -> None:
    module, kept = nn.BatchNorm1d(3), KeptBuffers()
    before = {name: value.clone() for name, value in module.named_buffers()}
    kept.keep(module, step=4)
    module(torch.randn(5, 3))
    kept.put_back(step=4)
    torch.testing.assert_close(dict(module.named_buffers()), before)
    kept.keep(module, step=4)
    module(torch.randn(5, 3))
    kept.put_back(step=5)
    assert module.num_batches_tracked is not None and int(module.num_batches_tracked) == 1


def test_snapshot_is_a_copy() -> None:
    weight = torch.ones(3)
    snapshot = Snapshot.of({"state_dict": {"weight": weight}, "epoch": 2}, 7, [3, 4])
    weight.zero_()
    assert snapshot.checkpoint()["state_dict"]["weight"].tolist() == [1, 1, 1] and snapshot.checkpoint()["epoch"] == 2
    assert snapshot.told() == {"step": 7, "trained": [3, 4]}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_settling_commits_what_was_trained(data: st.DataObject) -> None:
    """Workers fetch, commit late, and stop anywhere: what was trained is done, all else is to do, and nothing is both."""
    ledger = DataShardingService(DatasetSpec(n=data.draw(st.integers(1, 60)), epochs=1))
    gen = ledger.begin(range(3))
    held: dict[int, list[tuple[int, int, int]]] = {worker: [] for worker in range(3)}
    trained: dict[int, list[int]] = {worker: [] for worker in range(3)}
    for _ in range(data.draw(st.integers(0, 30))):
        worker = data.draw(st.integers(0, 2))
        action = data.draw(st.sampled_from(["fetch", "train", "commit", "release"]))
        if action == "fetch":
            held[worker] += ledger.fetch(worker, gen, 0, (2, 6), data.draw(st.integers(1, 9))).ranges
        elif action == "train" and held[worker]:
            sid, lo, hi = held[worker].pop(0)
            upto = data.draw(st.integers(lo, hi))
            trained[worker] += range(lo, upto)
            if upto < hi:
                held[worker].insert(0, (sid, upto, hi))
            if data.draw(st.booleans()):
                ledger.commit(worker, gen, [(sid, upto)])
        elif action == "release" and len(held[worker]) > 1:
            sid, lo, _ = held[worker].pop()
            ledger.release(worker, gen, sid, lo)
    counts = {worker: len(positions) for worker, positions in trained.items()}
    ledger.settle(counts)
    ledger.settle(counts)  # as a repeated request would
    ledger.check()
    ledger.begin(range(3))
    done = sorted(position for positions in trained.values() for position in positions)
    to_do = sorted(position for lo, hi in ledger.snapshot()["todo"] for position in range(lo, hi))
    assert sorted(done + to_do) == list(range(ledger.dataset.n))
    with pytest.raises(LedgerError, match="cannot have trained"):
        ledger.settle({0: 1})


def loops(epoch: int, batch: int, step: int, *, of: int = STEPS, next_begun: bool = False) -> dict[str, Any]:
    """Lightning's counters in the midst of a batch, ``step`` steps of the epoch being done."""

    def both(ready: int, completed: int, before: int = 0) -> dict[str, Any]:
        current = {"ready": ready, "completed": completed, "started": ready, "processed": completed}
        return {"current": current, "total": {name: count + before for name, count in current.items()}}

    before = epoch * of
    steps, zeros = both(batch, step, before), both(batch, step, before)
    for counts in (*steps.values(), *zeros.values()):
        del counts["processed"]
    return {
        "state_dict": {}, "epoch_progress": both(epoch + 1 + next_begun, epoch + next_begun),
        "epoch_loop.state_dict": {"_batches_that_stepped": 0},
        "epoch_loop.batch_progress": {**both(batch, step, before), "is_last_batch": batch == of},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": steps, "zero_grad": zeros}},
        "epoch_loop.val_loop.batch_progress": {**both(2, 2), "is_last_batch": True},
    }  # fmt: skip


def test_loops_are_put_back_to_the_last_completed_step() -> None:
    state = before_interruption(loops(1, 4, 3), Reached(1, 3, complete=False, validation=False))
    batches = state["epoch_loop.batch_progress"]
    assert batches["total"] == {"ready": 9, "started": 9, "processed": 9, "completed": 8}  # Lightning completes it
    assert state["epoch_loop.state_dict"]["_batches_that_stepped"] == 8  # and counts it
    assert not batches["is_last_batch"] and not is_before_first_batch(batches)
    first = before_interruption(loops(1, 1, 0), Reached(0, STEPS, complete=True, validation=False))
    assert is_before_first_batch(first["epoch_loop.batch_progress"])
    assert first["epoch_progress"]["current"] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}


def test_an_epoch_that_has_begun_is_not_skipped() -> None:
    """Its counters are still those of the epoch before."""
    stale = before_interruption(loops(0, STEPS, STEPS, next_begun=True), Reached(0, STEPS, complete=True, validation=False))
    fresh = before_interruption(loops(1, 1, 0), Reached(0, STEPS, complete=True, validation=False))
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"):
        assert stale[name] == fresh[name]


def test_openmp_can_be_paused() -> None:
    """The keeper relies on it."""
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if library is None:
        pytest.skip("this torch has no OpenMP of GNU")
    assert hasattr(ctypes.CDLL(str(library)), "omp_pause_resource_all")
