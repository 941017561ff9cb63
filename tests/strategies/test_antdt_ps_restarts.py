"""Parameter servers that are started again: what they had told some workers holds for all, and what is lost is counted."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from antdt_ps_runs import (
    OPTIMIZERS,
    Scripted,
    client,
    distance,
    fill,
    gradient_of,
    in_groups,
    layout_of,
    least_squares,
    parameters,
    random,
    read,
    run_workers,
    servers,
    train,
    union_steps,
)

from strategies.antdt.ps.clock import Clock, Consistency, Decision
from strategies.antdt.ps.dispatch import Caller
from strategies.antdt.ps.parameter_server import ParameterServer
from strategies.antdt.ps.partition import Layout
from strategies.antdt.ps.remote_optimizer import OptimizerSpec
from strategies.antdt.ps.server import ServerThread
from strategies.antdt.ps.slices import Gradient, Slices
from strategies.antdt.ps.worker import ParameterClient, unflatten
from strategies.antdt.service.client import Client
from strategies.antdt.service.server import ServerThread as DataServer
from strategies.antdt.simulation.inject import SleepInjector, Slowdown


def one_worker(
    folder: Path, optimizer: str, settings: dict[str, Any], **options: Any
) -> tuple[ServerThread, ParameterClient, Layout, OptimizerSpec]:
    """A server that keeps a file in this folder, and the only worker of a run, in its first epoch."""
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS[optimizer](in_groups(values)))
    server = ServerThread(0, slice_file=folder / "slice.safetensors", **options)
    worker = client([server])
    worker.configure(layout, spec, settings, list(values.values()))
    worker.enter(0)
    return server, worker, layout, spec


@pytest.mark.parametrize("first", [0, 1])
def test_meeting_whose_answers_were_lost_with_the_clock_is_over_for_all(tmp_path: Path, first: int) -> None:
    """Killed when one worker had its answer and the other had not; the file is from before that, as it may be."""
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    workers = [client([server], rank, 2) for rank in range(2)]
    workers[0].configure(layout, spec, {"mode": "ssp", "save_every": 1e9}, list(values.values()))
    brought = [{"weights": random(3, seed=rank), "rank": rank} for rank in range(2)]
    found = run_workers(2, lambda rank: workers[rank].gather(brought[rank]))
    run_workers(2, lambda rank: workers[rank].enter(0))
    server.stop()  # the file knows of neither
    again = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    assert again.server._meetings.epoch == -1
    told, other = workers[first], workers[1 - first]
    for worker in workers:
        worker._disconnect(0)
    other._meeting, other._gathered, other.epoch = 0, None, -1

    def go_on(rank: int) -> Any:
        if workers[rank] is told:
            return told.gather("more")
        repeated = other.gather(brought[rank])
        assert other.enter(0) == 0
        return repeated, other.gather("more")

    results = run_workers(2, go_on)
    repeated, more = results[1 - first]
    assert all(torch.equal(repeated[rank]["weights"], found[0][rank]["weights"]) for rank in range(2))
    assert more == results[first] == {0: "more", 1: "more"}
    assert again.server._meetings.epoch == 0
    for worker in workers:
        worker.leave()
    again.stop()


def test_worker_that_computes_for_long_is_not_lost_with_the_clock() -> None:
    """The clock was started again; one worker gives signs of life, from the others nothing is heard."""
    server = ParameterServer(0, "token")
    for rank in range(2):
        server._membership.hello(Caller(rank, f"s{rank}", pulse=False), {"world_size": 2})
    server._membership.expect_back(100.0)
    server._membership.heard(Caller(0, "s0", pulse=True))
    server._membership.tick(time.monotonic() + 99.0)
    assert server._meetings.members.keys() == {0, 1}
    server._membership.tick(time.monotonic() + 106.0)
    assert server._meetings.members.keys() == {0}
    server._membership.gone(Caller(0, "s0", pulse=False))  # not a restart: a sign of life that was under way does not count
    server._membership.heard(Caller(0, "s0", pulse=True))
    server._membership.tick(time.monotonic() + 6.0)
    assert not server._meetings.members
    server.close()


def test_signs_of_life_find_a_clock_that_was_started_again(tmp_path: Path) -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    now, heard = [server.address], threading.Event()
    worker = client([server], pulse_every=0.05, find=lambda index: now[index])
    worker.configure(layout, spec, {"mode": "asp"}, list(values.values()))
    worker.enter(0)
    server.stop()
    again = ServerThread(0, server.token, slice_file=tmp_path / "slice.safetensors")
    again.server._membership.heard = lambda caller: heard.set() if caller.pulse else None  # type: ignore[method-assign]
    now[0] = again.address
    assert again.address.port != server.address.port and heard.wait(60)
    worker.leave()
    again.stop()


def test_server_that_is_started_again_goes_on_from_its_file_and_counts_what_is_lost(tmp_path: Path) -> None:
    values = parameters()
    layout, spec = layout_of(values, 2), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    with servers(1) as first:
        second = ServerThread(1, first[0].token, slice_file=tmp_path / "slice.safetensors")
        worker = client([first[0], second])
        worker.configure(layout, spec, {"mode": "bsp", "save_every": 1e9}, list(values.values()))
        worker.enter(0)
        train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(3)], "bsp")
        worker.pull(layout, "bsp", gate=False)
        second.server.save(wait=True)
        saved = read(worker, layout, "bsp")
        train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(3, 5)], "bsp")
        worker.pull(layout, "bsp", gate=False)
        after = read(worker, layout, "bsp")
        second.stop()
        again = ServerThread(1, first[0].token, second.address.port, slice_file=tmp_path / "slice.safetensors")
        found = read(worker, layout, "bsp")
        assert again.server.version == 5 and again.server.lost == 2
        for number, value in enumerate(found):  # the part of server 0 is new, that of server 1 as it was saved
            assert all(bool(((value == after[number]) | (value == saved[number])).all()) for _ in [0])
        assert any(not torch.equal(a, b) for a, b in zip(found, after, strict=True))
        assert train(worker, layout, spec.groups, [random(4, 3, seed=9)], "bsp") == [True]
        worker.leave()
        again.stop()


def test_clock_that_is_started_again_knows_its_workers(tmp_path: Path) -> None:
    server, worker, layout, spec = one_worker(tmp_path, "adam", {"mode": "ssp", "staleness": 2})
    train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(3)], "ssp")
    server.server.save(wait=True)
    train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(2)], "ssp")
    server.stop()
    again = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    assert train(worker, layout, spec.groups, [random(4, 3, seed=7)], "ssp") == [True]
    assert worker.version == 6 and again.server.lost == 2
    assert worker.gather("here") == {0: "here"}
    worker.leave()
    again.stop()


def test_synchronous_clock_that_is_started_again_waits_for_all_who_took_part() -> None:
    """What it had saved may say that somebody is idle who trains meanwhile."""
    clock = Clock(Consistency("bsp"))
    clock.enter(range(3))
    clock.idle(1)
    again = Clock(Consistency("bsp"))
    again.load_state_dict(clock.state_dict())
    again.expect_back(range(4))
    assert again.push(0, 0).accepted is None and again.push(2, 0).accepted is None
    assert again.idle(3) is None  # it was idle, and says so again
    assert again.push(1, 0).decision == Decision(0, (0, 1, 2))
    assert again.push(0, 1).decision is None  # the one that was thought idle trains, and is waited for
    again.expect_back([0, 1, 2])
    assert [again.idle(worker) for worker in (1, 2)] == [None, None]
    assert again.idle(0) is None  # all are lost, or have nothing to train


def test_synchronous_gradient_of_a_step_that_is_lost_is_not_dropped() -> None:
    """Its worker has not heard that the former process took it; one of a step before that is late, as ever."""
    clock = Clock(Consistency("bsp"))
    clock.version = 5
    clock.expect_back(range(3))
    clock.enter([2])
    assert clock.advance(7) == 2 and clock.advance(6) == 0
    assert [clock.push(0, version).accepted for version in (6, 5, 4)] == [True, True, False]
    again = Clock(Consistency("bsp"))
    again.load_state_dict(clock.state_dict())
    assert again.advance(8) == 1
    assert [again.push(1, version).accepted for version in (7, 5, 4)] == [True, True, False]
    assert clock.counts["dropped"] == 1 and again.counts["dropped"] == 2
    assert clock.push(2, 7).decision is None, "the third is waited for"
    assert clock.push(0, 7).decision is None and clock.push(1, 7).decision == Decision(7, (0, 1, 2))


@pytest.mark.parametrize("first", ["who was told", "who was not told", "nobody was told"])
@pytest.mark.parametrize("on_drop", ["lose", "requeue"])
def test_synchronous_step_whose_answers_were_lost_with_the_clock_counts(tmp_path: Path, first: str, on_drop: str) -> None:
    """Killed after one worker was told that a step is complete, and before the others were: nothing of it is dropped."""
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    workers = [client([server], rank, 2) for rank in range(2)]
    workers[0].configure(layout, spec, {"mode": "bsp", "save_every": 1e9, "on_drop": on_drop}, list(values.values()))
    run_workers(2, lambda rank: workers[rank].enter(0))
    batches = [[random(4, 3, seed=10 * rank + step) for step in range(3)] for rank in range(2)]

    def step(rank: int, number: int) -> bool:
        dense = unflatten(layout, workers[rank].pull(layout, "bsp"))
        rows = (batches[rank][number][:, 0].abs() * 5).long() % 11
        found = workers[rank].rows(layout, {4: rows.unique()})[4]
        own = parameters()
        with torch.no_grad():
            for index, value in enumerate(own.values()):
                if index in dense:
                    value.copy_(dense[index])
            own["table"][rows.unique()] = found
        least_squares(own, batches[rank][number]).backward()
        sent[rank] = gradient_of(layout, own, 4.0)
        return workers[rank].push(layout, sent[rank], spec.groups, version=number).accepted

    def again(rank: int) -> bool:
        """The answer never came: the same once more."""
        workers[rank]._number -= 1
        return workers[rank].push(layout, sent[rank], spec.groups, version=1).accepted

    sent: dict[int, Gradient] = {}
    assert run_workers(2, lambda rank: step(rank, 0)) == [True, True]
    for worker in workers:  # the step is applied when it is told of
        worker.pull(layout, "bsp", gate=False)
    server.server.save(wait=True)
    assert run_workers(2, lambda rank: step(rank, 1)) == [True, True]
    server.stop()
    second = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    for worker in workers:
        worker._disconnect(0)
    untold = [1] if first != "nobody was told" else [0, 1]
    for rank in untold:
        workers[rank].version, workers[rank]._last = 1, None
    if first == "who was told":
        workers[0].pull(layout, "bsp")
        assert again(1)
    elif first == "who was not told":
        assert run_workers(2, lambda rank: again(1) if rank else len(workers[0].pull(layout, "bsp")) > 0) == [True, True]
    else:
        assert run_workers(2, again) == [True, True]
    assert run_workers(2, lambda rank: step(rank, 2)) == [True, True]
    for worker in workers:
        worker.pull(layout, "bsp", gate=False)
    assert second.server.version == second.server.clock.version == 3
    assert second.server.lost == (0 if first == "nobody was told" else 1)
    assert second.server.clock.counts["dropped"] == 0
    if first == "nobody was told":  # the step is done anew
        expected = union_steps("sgd", [torch.cat([of[number] for of in batches]) for number in range(3)])
        assert distance(expected, read(workers[0], layout, "bsp")) < 1e-12
    for worker in workers:
        worker.leave()
    second.stop()


def test_step_that_is_decided_and_not_applied_is_not_in_the_file(tmp_path: Path) -> None:
    """A server applies a synchronous step when it is told of it: until then a copy of its part does not say that it has."""
    server, worker, layout, spec = one_worker(tmp_path, "sgd", {"mode": "bsp", "save_every": 1e9})
    assert train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(2)], "bsp") == [True, True]
    server.server.save(wait=True)  # the second step waits to be told
    server.stop()
    again = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    assert again.server.version == again.server.clock.version == 1
    assert train(worker, layout, spec.groups, [random(4, 3, seed=7)], "bsp") == [True]
    assert worker.version == 3 and again.server.lost == 1
    worker.leave()
    again.stop()


def test_full_disk_is_told_and_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    told = threading.Event()

    def event(line: dict[str, Any]) -> None:
        events.append(line)
        if line["kind"] == "not saved":
            told.set()

    write = Slices.write_file

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    server, worker, layout, spec = one_worker(tmp_path, "adam", {"mode": "asp", "save_every": 0.0}, event=event)
    monkeypatch.setattr(Slices, "write_file", full)
    assert train(worker, layout, spec.groups, [random(4, 3, seed=0)], "asp") == [True]
    assert told.wait(20)
    monkeypatch.setattr(Slices, "write_file", write)
    assert train(worker, layout, spec.groups, [random(4, 3, seed=1)], "asp") == [True]
    worker.leave()
    server.stop()
    assert "No space left" in next(line["reason"] for line in events if line["kind"] == "not saved")


def test_controller_sees_a_slow_server_and_has_it_started_again_without_loss(tmp_path: Path) -> None:
    controller = Scripted()
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    expected = parameters()
    alone = OPTIMIZERS["adam"](in_groups(expected))
    with DataServer(lambda settings: controller) as data:
        owner = Client(data.address, 0)
        owner.configure({"n": 100}, {"class_path": "", "init_args": {}}, world_size=1, global_batch=4)
        slow = SleepInjector(0.0, [Slowdown(rank=0, factor=5.0, pid_bound=True)], cost_per_batch=0.01)
        file = tmp_path / "slice.safetensors"
        started = [ServerThread(0, slice_file=file, delay=slow.delay)]

        def start_again(index: int) -> Any:
            started[-1]._thread.join()  # it has said that it ends
            started.append(ServerThread(0, started[0].token, slice_file=file))
            return started[-1].address

        worker = client(started[:1], resolve=start_again)
        about = {"mode": "asp", "report_every": 0.0, "save_every": 1e9, "data": list(data.address[:3])}
        worker.configure(layout, spec, about, list(values.values()))
        worker.enter(0)
        pushed = 0
        while len(started) == 1:
            push_both(worker, layout, spec, values, alone, expected, pushed)
            pushed += 1
        again = started[1]
        assert again.server.lost == 0 and again.server.version == pushed
        assert distance(expected, read(worker, layout)) < 1e-12
        worker.leave()
        again.stop()
        owner.close()
    seen = [sample for node, samples in controller.reports for sample in samples if node == "server:0"]
    assert seen and all(seconds >= 0.05 for _, _, _, seconds, _ in seen[:3]), "what a gradient takes is what the server reports"


def push_both(
    worker: ParameterClient, layout: Layout, spec: OptimizerSpec, values: Any, alone: Any, expected: Any, step: int
) -> None:
    """A gradient to the servers, and to an optimizer of this process."""
    fill(values, step)
    fill(expected, step)
    worker.push(layout, gradient_of(layout, values), spec.groups, version=step)
    alone.step()


def test_damaged_slice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slice.safetensors"
    path.write_bytes(b"not a slice")
    with pytest.raises(ValueError, match="no slice of a parameter server, or damaged"):
        ServerThread(0, slice_file=path)
