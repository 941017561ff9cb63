"""What the service answers, by a clock of the test's own and without sockets."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_controller import ScriptedController

from strategies.antdt.service.service import Service
from strategies.antdt.sharding.journal import Journal, RecordedLedger

DATASET = {"name": "clicks", "n": 64, "seed": 0, "shuffle": "global", "shard": 8, "epochs": 2}


class Wire:
    """A connection: what it was sent."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.got.append(json.loads(json.dumps(message)))


class Job:
    """A service and its clients, as seen by a test."""

    def __init__(self, folder: Path | None = None, **configuration: Any) -> None:
        self.now, self.events, self.built = 1000.0, [], []  # type: ignore[var-annotated]
        self.service = Service(RecordedLedger(Journal(folder) if folder else None), self.build, self.events.append, self.now)
        self.numbers: dict[str, int] = {}
        self.gens: dict[str, int] = {}
        self.configuration = {
            "dataset": DATASET,
            "solution": {"class_path": "a.Solution", "init_args": {}},
            "world_size": 2,
            "global_batch": 16,
        } | configuration

    def build(self, settings: dict[str, Any]) -> ScriptedController:
        self.built.append(ScriptedController(settings))
        return self.built[-1]

    def ask(self, op: str, name: str = "worker:0", wire: Wire | None = None, **fields: Any) -> dict[str, Any]:
        """One request, on a connection of its own if none is given; {} if there is no answer yet."""
        role, number = name.split(":")
        self.numbers[name] = self.numbers.get(name, 0) + 1
        request = {
            "op": op,
            "worker": int(number),
            "role": role,
            "gen": self.gens.get(name, 0),
            "session": name,
            "seq": self.numbers[name],
        }
        return self.send(request | fields, wire)

    def send(self, request: dict[str, Any], wire: Wire | None = None) -> dict[str, Any]:
        wire = wire or Wire()
        before = len(wire.got)
        self.service.handle(request, wire, self.now)
        answer = wire.got[-1] if len(wire.got) > before else {}
        if request["op"] == "join" and "gen" in answer:
            self.gens[f"{request['role']}:{request['worker']}"] = answer["gen"]
        return answer

    def configure(self, **changes: Any) -> dict[str, Any]:
        return self.ask("configure", **(self.configuration | changes))

    def start(self, barrier: bool = True) -> list[Wire]:
        assert self.configure() == {"ok": True}
        wires = [Wire(), Wire()]
        for worker, wire in enumerate(wires):
            self.ask("join", f"worker:{worker}", wire, world_size=2, barrier=barrier)
        for worker, wire in enumerate(wires):
            self.gens[f"worker:{worker}"] = wire.got[-1]["gen"]
        return wires

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


def kind(answer: dict[str, Any]) -> str:
    return str(answer["error"]["kind"])


def test_barrier_opens_when_all_are_there_and_gives_all_the_same() -> None:
    job = Job()
    job.configure()
    first, second = Wire(), Wire()
    assert job.ask("join", "worker:1", first, world_size=2, barrier=True) == {}
    job.ask("join", "worker:0", second, world_size=2, barrier=True)
    expected = {"gen": 1, "plan": {"version": 0, "batch": [8, 8], "cap": [None, None]}, "epoch": 0, "consumed": 0}
    assert first.got == second.got == [expected]


def test_a_group_that_joins_again_makes_the_former_one_stale() -> None:
    job = Job()
    job.start()
    former = job.gens["worker:0"]
    assert "ranges" in job.ask("fetch", epoch=0, share=[8, 16], max=8)
    job.start()
    assert job.gens["worker:0"] == former + 1
    assert kind(job.ask("fetch", epoch=0, share=[8, 16], max=8, gen=former)) == "stale"
    assert kind(job.ask("commit", items=[[0, 4]], gen=former)) == "stale"
    assert "ranges" in job.ask("fetch", epoch=0, share=[8, 16], max=8)


def test_who_dies_at_the_barrier_does_not_complete_the_next_group() -> None:
    job = Job()
    job.configure()
    dead, alive, newcomer = Wire(), Wire(), Wire()
    job.ask("join", "worker:0", dead, world_size=2, barrier=True)
    job.service.disconnected(dead, job.now)
    job.ask("join", "worker:1", alive, world_size=2, barrier=True)
    assert not alive.got
    job.ask("join", "worker:0", newcomer, world_size=2, barrier=True)
    assert alive.got[0]["gen"] == newcomer.got[0]["gen"] == 1 and not dead.got


def test_barrier_gives_up_and_names_who_is_missing() -> None:
    job = Job()
    job.configure(world_size=4)
    wires = [Wire(), Wire()]
    for worker, wire in zip((0, 2), wires, strict=True):
        job.ask("join", f"worker:{worker}", wire, world_size=4, barrier=True, timeout=30)
    job.service.tick(job.now + 29)
    assert not wires[0].got
    job.service.tick(job.now + 30)
    for wire in wires:
        assert (
            kind(wire.got[0]) == "timeout" and "2 of 4 workers have not joined in time: 1, 3" in wire.got[0]["error"]["message"]
        )


def test_group_of_another_size_takes_the_place_of_the_one_that_forms() -> None:
    job = Job()
    job.configure()
    former, wires = Wire(), [Wire(), Wire(), Wire()]
    job.ask("join", "worker:1", former, world_size=2, barrier=True)
    for worker, wire in enumerate(wires):
        job.ask("join", f"worker:{worker}", wire, world_size=3, barrier=True)
    assert kind(former.got[0]) == "timeout"
    assert [wire.got[0]["gen"] for wire in wires] == [1, 1, 1]
    assert kind(job.ask("join", "worker:3", world_size=3, barrier=True)) == "bad_request"


def test_a_repeated_request_gets_the_same_answer_and_changes_nothing() -> None:
    job = Job()
    job.start()
    request = {
        "op": "fetch",
        "worker": 0,
        "role": "worker",
        "gen": 1,
        "session": "s",
        "seq": 1,
        "epoch": 0,
        "share": [8, 16],
        "max": 8,
    }
    first = job.send(request)
    assert job.send(request) == first and job.service._recorded.ledger.counts()[0]["doing"] == 8
    assert job.send(request | {"seq": 2}) != first
    assert kind(job.send(request)) == "bad_request"  # it comes late: its answer is no more
    report = request | {
        "op": "report",
        "seq": 3,
        "step": 1,
        "samples": [[1, 8, 0.1, 0.2, 0.4]],
        "items": [[0, 8]],
        "version": 0,
    }
    assert job.send(report) == job.send(report) == {"actions": [], "version": 0}
    assert [heard for heard in job.built[0].heard if heard[0] == "report"] == [
        ("report", "worker:0", [[1, 8, 0.1, 0.2, 0.4]], {}, [])
    ]
    assert ("progress", 120, 1) in job.built[0].heard


def test_a_repeated_join_opens_no_generation() -> None:
    job = Job()
    job.start()
    request = {"op": "join", "worker": 0, "role": "worker", "gen": 0, "session": "worker:0", "seq": job.numbers["worker:0"],
               "world_size": 2, "barrier": True}  # fmt: skip
    assert job.send(request)["gen"] == 1
    assert job.service._recorded.ledger.generation == 1


def test_out_of_step_workers_come_and_go_alone() -> None:
    job = Job(semantics="at_least_once_batch")
    job.start(barrier=False)
    mine = job.ask("fetch", "worker:0", epoch=0, share=[8, 16], max=64)["ranges"]
    others = job.gens["worker:1"]
    job.ask("join", "worker:0", world_size=2, barrier=False)
    assert job.gens["worker:0"] > others
    assert "ranges" in job.ask("fetch", "worker:1", epoch=0, share=[8, 16], max=8)  # goes on
    again = job.ask("fetch", "worker:0", epoch=0, share=[8, 16], max=64)["ranges"]
    assert again[0][1] == mine[0][1] + 8  # what the first life held has gone to worker 1 and to this one


def test_closed_connection_has_a_grace_and_then_the_worker_is_lost() -> None:
    job = Job(semantics="at_least_once_batch")
    wires = job.start(barrier=False)
    job.ask("fetch", "worker:0", wires[0], epoch=0, share=[8, 16], max=64)
    job.service.disconnected(wires[0], job.now)
    job.now += 4
    job.service.tick(job.now)
    again = Wire()
    assert job.ask("heartbeat", "worker:0", again) == {"ok": True}  # it comes back
    job.now += 4
    job.service.tick(job.now)
    assert "leave" not in job.kinds()
    job.service.disconnected(again, job.now)
    job.service.tick(job.now + 5)
    assert job.events[-1]["node"] == "worker:0" and job.events[-1]["why"] == "is gone"
    assert job.service._recorded.ledger.counts()[0]["doing"] == 0
    assert ("report", "worker:0", [], {"alive": False, "why": "is gone"}, ()) in job.built[0].heard
    assert kind(job.ask("fetch", "worker:0", epoch=0, share=[8, 16], max=8)) == "stale"


def test_silent_worker_is_lost_though_its_connection_is_open() -> None:
    job = Job(heartbeat_timeout=20, semantics="at_most_once")
    job.start(barrier=False)
    given = job.ask("fetch", "worker:0", epoch=0, share=[8, 16], max=8)["ranges"]
    job.now += 19
    job.ask("heartbeat", "worker:1")
    job.service.tick(job.now + 1)
    assert [event["node"] for event in job.events if event["kind"] == "leave"] == ["worker:0"]
    assert job.service._recorded.ledger.counts()[0]["lost"] == given[0][2] - given[0][1]


def test_decisions_reach_whom_they_concern_and_the_log() -> None:
    job = Job(solution={"class_path": "a.Solution", "init_args": {"script": [None, "worker:1"]}}, controller={"decide_every": 10})
    job.start()
    job.now += 10
    job.service.tick(job.now)
    job.service.tick(job.now + 5)  # not due
    job.now += 10
    got = [job.ask("report", f"worker:{worker}", step=1, version=0, samples=[]) for worker in (0, 1)]
    assert [[action["version"] for action in answer["actions"]] for answer in got] == [[1], [1, 2]]
    assert [event["version"] for event in job.events if event["kind"] == "decision"] == [1, 2]
    for worker in (0, 1):
        job.ask("report", f"worker:{worker}", step=5, version=1, samples=[])
    assert [heard for heard in job.built[0].heard if heard[0] == "applied"] == [("applied", 1, 5)]


def test_an_error_that_no_restart_cures_is_told_to_all() -> None:
    job = Job()
    job.start()
    job.ask("report", "worker:1", step=1, version=0, samples=[], errors=[{"kind": "AssertionError", "message": "labels below 0"}])
    assert job.ask("report", "worker:0", step=1, version=0, samples=[])["failure"] == "labels below 0"
    assert job.ask("status")["failure"] == "labels below 0"


def test_first_configuration_wins_and_others_hear_what_differs() -> None:
    job = Job()
    job.start()
    assert job.configure() == {"ok": True}
    other = job.configure(dataset=DATASET | {"name": "flights"})
    assert kind(other) == "other_dataset" and "clicks" in other["error"]["message"] and "flights" in other["error"]["message"]
    differing = job.configure(global_batch=32)
    assert kind(differing) == "conflict" and "global_batch is 32 instead of 16" in differing["error"]["message"]
    impossible = Job().configure(world_size=99)
    assert kind(impossible) == "bad_request" and "cannot be built: global_batch 16 is less" in impossible["error"]["message"]


def test_settings_may_change_when_the_group_is_gone() -> None:
    job = Job()
    wires = job.start()
    for wire in wires:
        job.service.disconnected(wire, job.now)
    assert job.configure(world_size=4, dataset=DATASET | {"epochs": 5}) == {"ok": True}
    assert job.ask("status")["remaining"] == 5 * 64 and len(job.built) == 2


def test_snapshot_and_restore_undo_what_came_after() -> None:
    job = Job()
    job.start()
    (first,) = job.ask("fetch", epoch=0, share=[8, 16], max=8)["ranges"]
    job.ask("commit", items=[[first[0], first[2]]])
    snapshot = job.ask("snapshot")
    (second,) = job.ask("fetch", epoch=0, share=[8, 16], max=8)["ranges"]
    job.ask("commit", items=[[second[0], second[2]]])
    job.start()
    assert kind(job.ask("restore", "worker:1", ledger=snapshot["ledger"])) == "bad_request"
    assert job.ask("restore", ledger=snapshot["ledger"], controller=snapshot["controller"]) == {"ok": True}
    assert job.ask("fetch", epoch=0, share=[8, 16], max=8)["ranges"][0][1:] == second[1:]
    job.ask("restore", ledger=None)
    assert job.ask("fetch", epoch=0, share=[8, 16], max=8)["ranges"][0][1:] == first[1:]


def test_killed_service_goes_on_from_its_journal(tmp_path: Path) -> None:
    job = Job(tmp_path, solution={"class_path": "a.Solution", "init_args": {"script": [None]}}, semantics="at_least_once_batch")
    job.start()
    request = {
        "op": "fetch",
        "worker": 0,
        "role": "worker",
        "gen": 1,
        "session": "s",
        "seq": 1,
        "epoch": 0,
        "share": [8, 16],
        "max": 8,
    }
    answer = job.send(request)
    job.service.tick(job.now + 10)
    job.service._recorded._journal.close()  # type: ignore[union-attr]  # the kill
    again = Job(tmp_path)
    again.gens, again.numbers = job.gens, job.numbers
    assert again.send(request) == answer  # its answer was on the way
    assert again.ask("report", "worker:1", step=1, version=0, samples=[])["actions"] == [{"version": 1, "node": None}]
    assert again.ask("commit", "worker:0", session="s", seq=2, items=[[answer["ranges"][0][0], 8]]) == {"ok": True}
    assert kind(again.ask("configure", **job.configuration | {"dataset": DATASET | {"n": 7}})) == "other_dataset"
    again.service.tick(again.now + 61)  # worker 1 has spoken at the start only, worker 0 too
    assert again.service._recorded.ledger.members == {}


def test_servers_and_spares_have_numbers_of_their_own() -> None:
    job = Job()
    job.start()
    assert job.ask("join", "server:0", world_size=1, barrier=False)["gen"] == 1
    assert job.ask("join", "spare:0", world_size=1, barrier=False)["gen"] == 1
    assert job.ask("report", "server:0", step=3, version=0, samples=[[3, 0, 0.0, 0.1, 0.1]]) == {"actions": [], "version": 0}
    assert job.ask("leave", "server:0") == {"ok": True}
    assert "worker:0" in job.ask("status")["nodes"] and "server:0" not in job.ask("status")["nodes"]
    assert [heard[1] for heard in job.built[0].heard if heard[0] == "join"] == ["worker:0", "worker:1", "server:0", "spare:0"]


def test_leaving_gives_back_and_failing_loses() -> None:
    for graceful, lost in ((True, 0), (False, 8)):
        job = Job(semantics="at_most_once")
        job.start(barrier=False)
        job.ask("fetch", epoch=0, share=[8, 16], max=8)
        assert job.ask("leave", graceful=graceful) == {"ok": True}
        assert job.service._recorded.ledger.counts()[0]["lost"] == lost


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"op": "dance"}, "there is no request 'dance'"),
        ({"op": ["fetch"]}, "there is no request"),
        ({"op": "fetch", "worker": 0, "gen": 1, "session": "s", "seq": 1}, "fetch: 'epoch' is missing"),
        ({"op": "fetch", "worker": "x", "gen": 1, "seq": 1}, "invalid literal"),
        ({"op": "fetch", "worker": 0, "gen": 1, "seq": 1, "role": "chief"}, "role is 'chief'"),
        ({"op": "commit", "worker": 0, "gen": 1, "session": "s", "seq": 1, "items": [[99, 1]]}, "never handed out"),
        ({"op": "commit", "worker": 0, "gen": 1, "session": "s", "seq": 1, "items": 3}, "iterable"),
        ({"op": "restore", "worker": 0, "gen": 1, "session": "s", "seq": 1, "ledger": {}}, "no snapshot"),
    ],
)
def test_wrong_requests_are_refused_in_words(request_: dict[str, Any], message: str) -> None:
    job = Job()
    job.start()
    answer = job.send(request_)
    assert kind(answer) == "bad_request" and message in answer["error"]["message"]
    assert "ranges" in job.ask("fetch", epoch=0, share=[8, 16], max=8)


def test_nothing_is_served_before_it_is_known_what_the_data_are() -> None:
    job = Job()
    assert kind(job.ask("join", world_size=2, barrier=True)) == "not_configured"
    assert job.ask("status")["configured"] is False
    assert job.ask("shutdown") == {"ok": True} and job.service.stopping
