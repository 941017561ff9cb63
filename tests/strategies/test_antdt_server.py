"""Server and clients over real sockets, in threads of this process: bad messages, bad networks, and no sample twice."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_controller import ScriptedController

from strategies.antdt.service import client as client_module
from strategies.antdt.service.address import Address
from strategies.antdt.service.client import Client, ServerUnreachable
from strategies.antdt.service.server import ServerThread
from strategies.antdt.service.wire import LIMIT, Decoder, MessageTooLarge, ServiceError, WireError, encode, same_token
from strategies.antdt.sharding.journal import Journal

DATASET = {"name": "clicks", "n": 500, "seed": 0, "shuffle": "global", "shard": 8, "epochs": 2}
SOLUTION = {"class_path": "a.Solution", "init_args": {}}


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(ScriptedController) as running:
        yield running


def configure(client: Client, world_size: int = 1, semantics: str = "at_least_once_batch") -> None:
    client.configure(DATASET, SOLUTION, world_size=world_size, global_batch=8 * world_size, semantics=semantics)


def train(client: Client, world_size: int, trained: list[tuple[int, int]], random: Random) -> None:
    """Work as an asynchronous worker does until all epochs are over; a step is noted when its commit is answered."""
    epoch = client.join(world_size, barrier=False)["epoch"]
    while epoch < 2:
        got = client.fetch(epoch, (8, 8 * world_size), 24)
        epoch += got.state == "end"
        for sid, lo, hi in got.ranges:
            stop = hi if random.random() < 0.7 else random.randint(lo, hi)
            for upto in [*range(lo + 8, stop, 8), stop]:
                client.commit([(sid, upto)])
            trained += [(epoch, position) for position in range(lo, stop)]
            client.release(sid, stop)


def run_all(clients: list[Client], seed: int = 0) -> Counter[tuple[int, int]]:
    trained: list[list[tuple[int, int]]] = [[] for _ in clients]
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            train(clients[number], len(clients), trained[number], Random(seed + number))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Counter(item for part in trained for item in part)


ONCE = Counter({(epoch, position): 1 for epoch in range(2) for position in range(500)})


# ---- messages ---------------------------------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=25, deadline=None)
@given(messages=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4), data=st.data())
def test_messages_survive_any_way_of_being_cut(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = b"".join(map(encode, messages))
    decoder, got, at = Decoder(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        got += decoder.feed(stream[at : at + size])
        at += size
    assert got == messages


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(MessageTooLarge, match="2000 bytes is larger than the limit of 1000"):
        list(Decoder(1000).feed(struct.pack(">I", 2000)))
    for body in (b"[1]", b"{", b"\xff\xfe"):
        with pytest.raises(WireError):
            list(Decoder().feed(struct.pack(">I", len(body)) + body))
    with pytest.raises(MessageTooLarge):
        encode({"x": "a" * 100}, limit=50)
    with pytest.raises(ValueError, match="JSON"):
        encode({"x": float("nan")})
    assert same_token("secret", "secret") and not same_token("secre", "secret") and not same_token(None, "secret")


def raw(address: Address, data: bytes) -> tuple[list[dict[str, Any]], bool]:
    """What the server answers to bytes, and whether it then closes the connection."""
    with socket.create_connection((address.host, address.port), timeout=5) as connection:
        connection.sendall(data)
        decoder, got = Decoder(), []
        while chunk := connection.recv(65536):
            got += decoder.feed(chunk)
        return got, True


def test_strangers_get_one_answer_and_no_more(server: ServerThread) -> None:
    big = struct.pack(">I", LIMIT + 1)
    for data, kind in (
        (encode({"op": "status", "token": "guess"}), "token"),
        (encode({"op": "status"}), "token"),
        (big, "too_large"),
        (b"GET / HTTP/1.1\r\n\r\n", "too_large"),
        (struct.pack(">I", 3) + b"abc", "bad_request"),
    ):
        got, closed = raw(server.address, data)
        assert [answer["error"]["kind"] for answer in got] == [kind] and closed
    with Client(server.address._replace(token="guess"), 0) as client:
        begun = time.monotonic()
        with pytest.raises(ServiceError, match=r"token is wrong; it is in server.json") as refusal:
            client.status()
        assert refusal.value.kind == "token" and time.monotonic() - begun < 5  # at once, not after two minutes
    with Client(server.address, 0) as client:
        assert client.status()["configured"] is False  # others are served as before


def test_who_knows_the_token_may_send_more(server: ServerThread) -> None:
    with Client(server.address, 0) as client:
        configure(client)
        client.join(1, barrier=True)
        ledger = client.snapshot()["ledger"]
        client.restore({**ledger, "note": "w" * (2 * LIMIT)})
        with pytest.raises(MessageTooLarge):
            client.restore({**ledger, "note": "w" * (80 * LIMIT)})
        assert client.status()["configured"]


# ---- networks ---------------------------------------------------------------------------------------------------------


def test_unreachable_server_is_an_error_in_words_after_the_time_of_patience() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    begun = time.monotonic()
    with (
        Client(Address("127.0.0.1", port, "t"), 0, patience=0.4) as client,
        pytest.raises(ServerUnreachable, match=rf"127.0.0.1:{port} has not answered for 0.4 s.*zoo serve-data --folder"),
    ):
        client.fetch(0, (1, 1), 1)
    assert time.monotonic() - begun < 10


def test_server_that_accepts_and_is_silent_does_not_hang_its_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = Address("127.0.0.1", deaf.getsockname()[1], "t")
        with Client(address, 0, patience=0.3, answer_timeout=0.2) as client, pytest.raises(ServerUnreachable, match="timed out"):
            client.status()


def test_workers_of_any_speed_train_every_sample_once(server: ServerThread) -> None:
    clients = [Client(server.address, worker) for worker in range(4)]
    configure(clients[0], 4)
    assert run_all(clients) == ONCE
    status = clients[0].status()
    assert status["remaining"] == 0 and status["counts"]["1"] == {"todo": 0, "doing": 0, "done": 500, "lost": 0, "repeated": 0}


class FlakyNetwork:
    """Hands messages on, and cuts the connection before or after the server has seen them, as a seeded coin says."""

    def __init__(self, target: Address, seed: int, rate: float) -> None:
        self._target, self._random, self._rate = target, Random(seed), rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = target._replace(port=self._listener.getsockname()[1])
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(inner,), daemon=True).start()

    def _serve(self, inner: socket.socket) -> None:
        # Clients that close while a message is on its way are part of a bad network too.
        with (
            contextlib.suppress(OSError),
            inner,
            socket.create_connection((self._target.host, self._target.port)) as outer,
        ):
            while data := inner.recv(65536):
                fate = self._random.random()
                if fate < self._rate / 2:
                    self.cuts += 1
                    return
                outer.sendall(data)
                answer = outer.recv(65536)
                if fate < self._rate:
                    self.cuts += 1
                    return
                inner.sendall(answer)

    def close(self) -> None:
        self._listener.close()


def test_lost_requests_and_lost_answers_train_nothing_twice(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.001)
    network = FlakyNetwork(server.address, seed=1, rate=0.3)
    clients = [Client(network.address, worker) for worker in range(3)]
    configure(clients[0], 3)
    assert run_all(clients) == ONCE
    assert network.cuts > 50
    assert clients[0].status()["counts"]["0"]["repeated"] == 0
    network.close()


def test_one_client_serves_many_threads(server: ServerThread) -> None:
    with Client(server.address, 0) as client:
        configure(client, semantics="exactly_once")
        client.join(1, barrier=True)
        got: list[tuple[int, int]] = []

        def work() -> None:
            while (answer := client.fetch(0, (4, 8), 4)).state == "ranges":
                for sid, lo, hi in answer.ranges:
                    got.extend((0, position) for position in range(lo, hi))
                    client.commit([(sid, hi)])

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Counter(got) == Counter({(0, position): 1 for position in range(500)})


@pytest.mark.slow  # waits until the other is declared lost
def test_signs_of_life_keep_a_worker_in(server: ServerThread) -> None:
    """A worker that validates for long says nothing else."""
    with Client(server.address, 0) as client, Client(server.address, 1) as other:
        client.configure(DATASET, SOLUTION, world_size=2, global_batch=16, heartbeat_timeout=4.0)
        for each in (client, other):
            each.join(2, barrier=False)
        client.keep_alive(every=0.1)
        deadline = time.monotonic() + 30
        with Client(server.address, -1) as watcher:
            while "worker:1" in (nodes := watcher.status()["nodes"]):
                assert time.monotonic() < deadline
        assert "worker:0" in nodes
        assert client.fetch(0, (8, 16), 8).state == "ranges"
        with pytest.raises(ServiceError, match="declared lost") as refusal:
            other.fetch(0, (8, 16), 8)
        assert refusal.value.kind == "stale"
        other.leave()  # which it may say all the same


def test_barrier_of_real_connections(server: ServerThread) -> None:
    clients = [Client(server.address, worker) for worker in range(3)]
    configure(clients[0], 3)
    answers: dict[int, dict[str, Any]] = {}

    def join(worker: int) -> None:
        answers[worker] = clients[worker].join(3, barrier=True, timeout=30)

    dying = socket.create_connection((server.address.host, server.address.port))
    dying.sendall(
        encode({"op": "join", "token": server.address.token, "worker": 2, "gen": 0, "session": "d", "seq": 1, "world_size": 3,
                "barrier": True})
    )  # fmt: skip
    deadline = time.monotonic() + 20
    with Client(server.address, -1) as watcher:
        while watcher.status()["at_barrier"] != [2]:
            assert time.monotonic() < deadline
        dying.close()
        while watcher.status()["at_barrier"]:
            assert time.monotonic() < deadline
    threads = [threading.Thread(target=join, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["gen"] for answer in answers.values()}) == 1
    with pytest.raises(ServiceError, match=r"2 of 3 workers have not joined in time: 1, 2"):
        clients[0].join(3, barrier=True, timeout=0.1)


@pytest.mark.slow  # waits for the time-out
def test_end_without_clients(tmp_path: Path) -> None:
    idle = ServerThread(ScriptedController, idle_timeout=2.0, journal=Journal(tmp_path))
    with Client(idle.address, 0) as client:
        configure(client)
        client.join(1, barrier=True)
    idle._thread.join(timeout=10)
    assert not idle._thread.is_alive() and (tmp_path / "ledger.json").exists()


def test_end_on_request(tmp_path: Path) -> None:
    asked = ServerThread(ScriptedController, journal=Journal(tmp_path))
    with Client(asked.address, 0) as client:
        configure(client)
        client.join(1, barrier=True)
        assert client.status()["generation"] == 1
        client.shutdown()
    asked._thread.join(timeout=10)
    assert not asked._thread.is_alive() and not (tmp_path / "ledger.json").exists()


def test_address_is_read_only_from_a_file_of_ones_own(tmp_path: Path) -> None:
    assert Address.parse("[::1]:80", "t") == Address("::1", 80, "t")
    for text in ("node0", "node0:", ":80", "node0:http"):
        with pytest.raises(ValueError, match="host:port"):
            Address.parse(text, "t")
    with pytest.raises(ValueError, match="ANTDT_TOKEN"):
        Address.parse("node0:80", "")
    assert Address.read(tmp_path) is None
    path = tmp_path / "server.json"
    path.write_text('{"host": "h", "port"')  # half written
    path.chmod(0o600)
    assert Address.read(tmp_path) is None
    path.write_text(json.dumps({"host": "h", "port": 1, "pid": 2, "hostname": "n", "token": "t"}))
    assert Address.read(tmp_path) == Address("h", 1, "t", 2, "n")
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="chmod 600"):
        Address.read(tmp_path)
