"""The agent: reports, decisions, wishes, and when a process must end; and what a rank measures of its own steps."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from strategies.antdt.control.actions import AdjustBatch, KillRestart, Versioned
from strategies.antdt.rank.agent import Agent
from strategies.antdt.rank.exchange import RESTART, STOP, Exchange
from strategies.antdt.rank.peer_watch import PeerWatch
from strategies.antdt.rank.shard_buffer import Piece
from strategies.antdt.rank.shard_source import ShardSource
from strategies.antdt.rank.step_timer import StepTimer


class Server:
    """Remembers requests; answers reports with decisions."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.decisions: list[Versioned] = []
        self.nodes: dict[str, dict[str, Any]] = {}
        self.failure: Exception | None = None
        self.heard = threading.Event()
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self, op: str, **fields: Any) -> dict[str, Any]:
        self.requests.append((op, fields))
        self.heard.set()
        if self.failure is not None:
            raise self.failure
        if op == "report":
            self.meanwhile()
        if op == "status":
            return {"generation": 1, "nodes": self.nodes}
        new = [each for each in self.decisions if each.version > fields.get("version", 0)]
        return {"actions": [each.to_json() for each in new], "version": 0}


class Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lost() -> list[str]:
    return []


@pytest.fixture
def agent(server: Server, clock: Clock, lost: list[str]) -> Iterator[Agent]:
    timer = StepTimer(torch.device("cpu"), clock)
    made = Agent(server, 0, ShardSource(server, 4, 1), Exchange(None), timer, on_lost=lost.append, clock=clock)
    yield made
    made.stop()


def report_in_the_thread(agent: Agent, clock: Clock) -> None:
    """Start it, and let it be time for a report."""
    agent.start()
    clock.now = 5.0
    with agent._wake:
        agent._wake.notify()


def test_decisions_are_given_once_and_only_when_all_have_them(agent: Agent, server: Server) -> None:
    server.decisions = [Versioned(1, AdjustBatch((3, 1), (None, None))), Versioned(3, AdjustBatch((2, 2), (None, None)))]
    agent.report()
    assert agent.announce(0, 0, 4)().version == 3
    assert agent.decisions(0) == []
    assert [each.version for each in agent.decisions(2)] == [1]
    agent.report()  # hears of both again, as none is in force yet
    assert [each.version for each in agent.decisions(3)] == [3]
    assert agent.decisions(3) == []
    agent.in_force(server.decisions)
    agent.report()
    assert server.requests[-1][1]["version"] == 3


def test_a_restart_becomes_a_wish_that_is_spoken_of_once(agent: Agent, server: Server) -> None:
    server.decisions = [Versioned(1, KillRestart("worker:0"))]
    agent.report()
    agent.report()
    assert agent.announce(0, 0, 4)().flags == RESTART
    agent.wish(STOP)
    assert agent.announce(0, 1, 4)().flags == STOP
    assert agent.announce(0, 2, 4)().flags == 0
    assert agent.decisions(1) == []


def test_reports_when_it_is_time(agent: Agent, server: Server, clock: Clock) -> None:
    report_in_the_thread(agent, clock)
    assert server.heard.wait(10)
    assert server.requests[0][0] == "report"


def test_what_fails_in_the_thread_is_raised_in_training(agent: Agent, server: Server, clock: Clock) -> None:
    server.failure = ConnectionError("the server is gone")
    report_in_the_thread(agent, clock)
    assert agent._thread is not None
    agent._thread.join(10)
    with pytest.raises(ConnectionError, match="is gone"):
        agent.announce(0, 0, 4)


def test_a_checkpoint_waits_for_commits_that_are_under_way(agent: Agent, server: Server) -> None:
    """A report has taken them, so that `flush` finds none to make; the ledger must know of them all the same."""
    flushing = threading.Thread(target=agent.flush)
    waited: list[bool] = []

    def save() -> None:
        flushing.start()
        flushing.join(0.5)
        waited.append(flushing.is_alive())

    server.meanwhile = save
    agent.source.trained((Piece(7, 0, 4),))
    agent.report()
    flushing.join(10)
    assert waited == [True]
    assert not flushing.is_alive()
    assert [fields["items"] for _, fields in server.requests] == [[[7, 4]]]


def test_a_checkpoint_of_commits_that_were_lost_says_why(agent: Agent, server: Server, clock: Clock) -> None:
    server.failure = ConnectionError("the server is gone")
    agent.source.trained((Piece(7, 0, 4),))
    report_in_the_thread(agent, clock)
    assert agent._thread is not None
    agent._thread.join(10)
    with pytest.raises(ConnectionError, match="is gone"):
        agent.flush()


def test_ends_when_its_launcher_is_gone(agent: Agent, server: Server, lost: list[str]) -> None:
    agent._launcher = os.getppid() + 1
    agent.source.trained(())
    agent.start()
    assert agent._thread is not None
    agent._thread.join(10)
    assert lost == ["the process that has launched this rank is gone"]
    assert server.requests == []  # no commit


def test_told_to_end_it_does_so_at_once_when_a_peer_is_gone(agent: Agent, server: Server, lost: list[str]) -> None:
    there = {"gen": 1, "connected": True, "silent": 0.0}
    server.nodes = {"worker:0": there, "worker:1": there, "worker:2": {**there, "connected": False}}
    agent.peers = PeerWatch([("here", 1), ("here", 2), ("there", 3)], 0, 60.0)
    agent.told_to_end(True)
    agent.start()
    assert agent._thread is not None
    agent._thread.join(10)
    assert "a peer for which it would wait is gone" in lost[0]


def test_time_of_a_step_is_data_and_computation_without_waiting(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"), clock)
    timer.begin(7, count=4, data=0.5, begun=0.0)
    clock.now = 1.0  # DDP waits for rank 0's buffers
    timer.forward_begins()
    clock.now = 2.0
    timer.forward_begins()  # of the second micro-batch
    timer.waited(0.25)
    clock.now = 3.0
    timer.handed_over()
    clock.now = 9.0  # waits for gradients of others
    assert timer.finished() == []
    timer.begin(8, count=4, data=0.5, begun=9.5)
    (sample,) = timer.finished()
    assert (sample.step, sample.count, sample.data, sample.compute, sample.wall) == (7, 4, 0.5, 1.75, 9.5)
    assert sample.seconds == 2.25
    assert timer.finished() == []


def test_a_silent_process_of_the_same_machine_is_ended() -> None:
    killed: list[int] = []
    addresses = [("here", 10), ("here", 11), ("here", 12), ("there", 13)]
    watch = PeerWatch(addresses, 1, heartbeat_timeout=10.0, kill=killed.append)
    node = {"gen": 2, "connected": True, "silent": 0.1}
    status: dict[str, Any] = {"generation": 2, "nodes": {f"worker:{rank}": dict(node) for rank in range(4)}}
    assert watch.all_there(status)
    for rank in (1, 2, 3):
        status["nodes"][f"worker:{rank}"]["silent"] = 9.0
    status["nodes"]["worker:0"] |= {"silent": 9.0, "connected": False}  # it has crashed: its launcher sees that
    assert watch.end_silent(status) == [2]
    assert killed == [12]
    assert not watch.all_there(status)
    assert [PeerWatch(addresses, rank, 10.0).guards for rank in range(4)] == [True, True, False, False]
