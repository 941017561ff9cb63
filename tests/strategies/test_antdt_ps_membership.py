"""Parameter servers: workers come, meet, go and are lost, and no gradient counts twice or without its samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from antdt_ps_runs import (
    OPTIMIZERS,
    Scripted,
    client,
    fill,
    gradient_of,
    in_groups,
    layout_of,
    parameters,
    random,
    read,
    run_workers,
    servers,
    train,
)

from strategies.antdt.ps.clock import Clock, Consistency
from strategies.antdt.ps.meeting import MeetingError, Meetings
from strategies.antdt.ps.remote_optimizer import OptimizerSpec
from strategies.antdt.ps.worker import ServersUnreachable
from strategies.antdt.service.client import Client
from strategies.antdt.service.server import ServerThread as DataServer
from strategies.antdt.service.wire import ServiceError


def test_meetings_wait_for_all_and_then_for_those_who_are_left() -> None:
    meetings = Meetings()
    for rank in range(3):
        meetings.hello(rank, 3, f"s{rank}")
    for rank in range(2):
        meetings.bring(rank, 0, rank)
    assert meetings.result(0, 0) is None
    meetings.bring(2, 0, 2)
    assert meetings.result(0, 0) == {0: 0, 1: 1, 2: 2}
    for rank in range(3):
        meetings.enter(rank, 0)
        assert meetings.entered(0) is (rank == 2)
    meetings.bring(0, 1, "a")
    meetings.bring(1, 1, "b")
    assert meetings.result(1, 1) is None
    meetings.lost(2)
    assert meetings.result(1, 1) == {0: "a", 1: "b"}
    with pytest.raises(MeetingError, match="declared lost"):
        meetings.hello(2, 3, "s2", meetings.run)


def test_late_worker_is_let_in_while_others_train_and_never_between_meetings() -> None:
    meetings = Meetings()
    for rank in range(2):
        meetings.hello(rank, 2, f"s{rank}")
        meetings.bring(rank, 0, None)
        meetings.enter(rank, 0)
    assert meetings.result(0, 0) and meetings.entered(0)
    meetings.lost(1)
    assert meetings.hello(1, 2, "new").late
    meetings.enter(1, 0)
    assert meetings.entered(1) and meetings.members[1].met == 1
    meetings.lost(1)
    meetings.bring(0, 1, None)  # the end of the epoch
    meetings.hello(1, 2, "newer")
    meetings.enter(1, 0)
    assert not meetings.entered(1)
    assert meetings.result(0, 1) == {0: None}, "the others do not wait for it"
    meetings.enter(0, 1)
    assert meetings.entered(0) and meetings.entered(1) and meetings.members[1].met == 2


def test_what_a_member_was_told_is_told_the_others_by_the_next_process() -> None:
    """The clock was killed between two answers: one has a meeting, or the beginning of an epoch, behind it, the other waits."""
    meetings = Meetings()
    for rank in range(2):
        meetings.hello(rank, 2, f"s{rank}")
    saved = meetings.state_dict()
    about = {"epoch": 0, "requests": {"stop": 0, "save": 1}, "meeting": 3}
    again = Meetings()
    again.load_state_dict(saved)
    again.bring(1, 3, "b")
    again.enter(1, 0)
    assert again.result(1, 3) is None and not again.entered(1)
    again.remember(0, about, {0: "a", 1: "b"})
    assert again.result(1, 3) == {0: "a", 1: "b"} and again.entered(1) and again.epoch == 0
    assert again.requests == {"stop": 0, "save": 1}
    again.bring(0, 4, 1)
    again.remember(1, {"epoch": 0, "requests": {}, "meeting": 3}, {0: "a", 1: "b"})
    again.bring(1, 4, 2)
    assert again.result(0, 4) == {0: 1, 1: 2}
    with pytest.raises(MeetingError, match="does not take part"):
        again.remember(2, about, None)


def test_worker_lost_before_training_ends_the_run_with_its_name() -> None:
    meetings = Meetings()
    meetings.hello(0, 2, "s0")
    meetings.hello(1, 2, "s1")
    meetings.lost(1)
    with pytest.raises(MeetingError, match="worker 1 has ended before training began"):
        meetings.bring(0, 0, None)


def test_worker_that_comes_when_all_have_done_begins_no_run_of_its_own() -> None:
    meetings = Meetings()
    meetings.hello(0, 1, "a")
    run = meetings.run
    meetings.enter(0, 0)
    assert meetings.entered(0)
    meetings.leave(0)
    with pytest.raises(MeetingError, match="was to join has ended") as refusal:
        meetings.hello(0, 1, "b", joins=run)
    assert refusal.value.kind == "over" and not meetings.members


def test_processes_of_a_new_group_replace_those_of_the_former() -> None:
    meetings = Meetings()
    for rank in range(2):
        meetings.hello(rank, 2, f"s{rank}", group="run/0")
        meetings.enter(rank, 0)
    assert meetings.entered(0)
    first = meetings.run
    assert not meetings.hello(0, 2, "t0", group="run/1").late, "torchrun has killed the others, too"
    assert meetings.run != first and list(meetings.members) == [0]


def test_new_run_begins_when_all_have_left() -> None:
    meetings = Meetings()
    first = (meetings.hello(0, 1, "a"), meetings.run)[1]
    meetings.leave(0)
    meetings.hello(0, 1, "b")
    assert meetings.run != first
    with pytest.raises(MeetingError, match="a run that has ended"):
        meetings.hello(0, 1, "a", first)


def test_gradient_sent_again_is_taken_once() -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["momentum"](in_groups(values)))
    with servers(1) as started:
        worker = client(started)
        worker.configure(layout, spec, {"mode": "asp"}, list(values.values()))
        worker.enter(0)
        fill(values, 1)
        worker.push(layout, gradient_of(layout, values), spec.groups, version=0)
        before = read(worker, layout)
        worker._number -= 1
        worker._disconnect(0)
        outcome = worker.push(layout, gradient_of(layout, values), spec.groups, version=0)
        assert outcome.accepted and outcome.version == 1
        assert all(torch.equal(a, b) for a, b in zip(before, read(worker, layout), strict=True))
        worker.leave()


def test_gradient_that_cannot_be_applied_is_refused_once_and_not_counted() -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    with servers(1) as started:
        worker = client(started)
        worker.configure(layout, spec, {"mode": "asp"}, list(values.values()))
        worker.enter(0)
        wrong = [{**group, "lr": "fast"} for group in spec.groups]
        with pytest.raises(ServiceError, match="push"):
            train(worker, layout, wrong, [random(4, 3, seed=0)], "asp")
        assert train(worker, layout, spec.groups, [random(4, 3, seed=1)], "asp") == [True]
        assert worker.version == 1 and started[0].server.clock.counts["pushed"] == 1
        worker.leave()


@pytest.mark.parametrize("count", [1, 2])
def test_worker_that_dies_within_a_push_leaves_all_or_its_samples_come_again(count: int) -> None:
    values = parameters()
    layout, spec = layout_of(values, count), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    with DataServer(lambda settings: Scripted()) as data, servers(count, grace=0.0) as started:
        ledger = [Client(data.address, rank) for rank in range(2)]
        ledger[0].configure({"n": 8}, {"class_path": "", "init_args": {}}, world_size=2, global_batch=4,
                            semantics="at_least_once_batch")  # fmt: skip
        workers = [client(started, rank, 2) for rank in range(2)]
        about = {"mode": "asp", "report_every": 1e9, "data": list(data.address[:3])}
        workers[0].configure(layout, spec, about, list(values.values()))
        run_workers(2, lambda rank: (ledger[rank].join(2, barrier=False), workers[rank].enter(0)))
        held = [ledger[rank].fetch(0, (4, 4), 4).ranges[0] for rank in range(2)]
        fill(values, 0)
        gradient = gradient_of(layout, values, 4.0)
        whole, clock = workers[1]._exchange, []

        def die(asked: Any, *args: Any, **kwargs: Any) -> Any:
            if list(asked) == [0]:  # its other servers have their part, the clock has not
                clock.append(workers[1]._number)
                raise KeyboardInterrupt
            return whole(asked, *args, **kwargs)

        workers[1]._exchange = die  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            workers[1].push(layout, gradient, spec.groups, version=0, items=[(held[1].sid, held[1].hi)], gen=ledger[1].gen)
        assert clock
        workers[1].close()
        ledger[1].leave(graceful=False)
        workers[0].push(layout, gradient, spec.groups, version=0, items=[(held[0].sid, held[0].hi)], gen=ledger[0].gen)
        found = ledger[0].fetch(0, (4, 4), 8)
        assert [(item.lo, item.hi) for item in found.ranges] == [(held[1].lo, held[1].hi)], (
            "none is missing, only these come again"
        )
        assert [server.server.version for server in started] == [1, 2][:count]
        workers[0].leave()
        for each in ledger:
            each.close()


def test_run_of_which_some_workers_never_come_gives_up() -> None:
    with servers(1, start_timeout=0.3) as started:
        worker = client(started, 0, 3)
        with pytest.raises(ServiceError, match=r"2 of 3 workers have not come within 0.3 s: 1, 2"):
            worker.gather(None)
        worker.close()


def test_worker_at_a_meeting_is_not_waited_for_at_the_gate() -> None:
    clock = Clock(Consistency("ssp", staleness=1))
    clock.enter([0, 1])
    for _ in range(2):
        clock.push(0, clock.version)
    assert not clock.may_begin(0)
    clock.idle(1)
    assert clock.may_begin(0)
    clock.push(0, clock.version)
    clock.resume(1, 0)
    assert clock.own[1] == 3, "it counts from the slowest, so that the other need not wait for what it has missed"


def test_server_that_is_gone_is_named(tmp_path: Path) -> None:
    with servers(1) as started:
        worker = client(started, patience=0.3)
    with pytest.raises(ServersUnreachable, match=r"parameter server 0 at 127\.0\.0\.1.*--ckpt_path last"):
        worker.look()
    worker.close()
