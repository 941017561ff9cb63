"""The server as a process of its own: found, started once, killed, replayed, and outliving those who started it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm_python
from antdt_job import wait_for_end

from strategies.antdt.service.address import Address
from strategies.antdt.service.client import Client, ServerUnreachable
from strategies.antdt.service.launch import ServerNotStarted, find, find_or_start, is_alive, revive
from strategies.antdt.service.wire import ServiceError
from zoo.__main__ import main

ROOT = Path(__file__).parents[2]
DATASET = {"name": "clicks", "n": 3000, "seed": 0, "shuffle": "global", "shard": 8, "epochs": 1}
SOLUTION = {"class_path": "strategies.antdt.control.solutions.StaticBSP", "init_args": {}}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def kill(address: Address) -> None:
    """SIGKILL, and wait until the process is gone."""
    os.kill(address.pid, signal.SIGKILL)
    wait_for_end(address.pid)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run's folder, whose server is ended with the test."""
    yield tmp_path / "antdt"
    address = Address.read(tmp_path / "antdt")
    if address is not None and is_alive(address):
        with Client(address, 0, patience=1.0) as client:
            client.shutdown()


def run(code: str, *words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_processes_that_race_start_one_server(folder: Path) -> None:
    code = (
        "import sys, pathlib; from strategies.antdt.service.launch import find_or_start\n"
        "print(find_or_start(pathlib.Path(sys.argv[1])).pid)"
    )
    racing = [run(code, folder) for _ in range(5)]
    pids = {process.communicate(timeout=60)[0] for process in racing}
    assert len(pids) == 1 and {process.returncode for process in racing} == {0}
    address = find(folder)
    assert str(address.pid) == pids.pop().strip()
    assert (folder / "server.log").read_text().count("serves") == 1
    assert (folder / "server.json").stat().st_mode & 0o777 == 0o600


def test_server_outlives_the_group_that_started_it(folder: Path) -> None:
    code = (
        "import sys, pathlib; from strategies.antdt.service.launch import find_or_start\n"
        "print(find_or_start(pathlib.Path(sys.argv[1])).pid, flush=True); sys.stdin.read()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    os.killpg(starter.pid, signal.SIGKILL)  # as torchrun ends a group, and its terminal with it
    starter.communicate()
    address = find(folder)
    assert address.pid == pid and find_or_start(folder) == address


def test_killed_server_loses_and_repeats_no_sample(folder: Path) -> None:
    """Four workers train while their server is killed three times; whoever notices starts it again, and it is one."""
    clients = [Client(find_or_start(folder), worker, resolve=lambda: revive(folder), answer_timeout=5.0) for worker in range(4)]
    clients[0].configure(DATASET, SOLUTION, world_size=4, global_batch=32, semantics="at_least_once_batch")
    trained: list[list[int]] = [[] for _ in clients]
    failures: list[BaseException] = []
    progressed = threading.Condition()

    def work(worker: int) -> None:
        client = clients[worker]
        try:
            client.join(4, barrier=False)
            while (got := client.fetch(0, (8, 32), 16)).state != "end":
                for sid, lo, hi in got.ranges:
                    client.commit([(sid, hi)])
                    with progressed:
                        trained[worker] += range(lo, hi)
                        progressed.notify()
        except BaseException as failure:
            failures.append(failure)
            with progressed:
                progressed.notify()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    pids = set()
    for milestone in (600, 1200, 1800):
        with progressed:
            assert progressed.wait_for(lambda goal=milestone: failures or sum(map(len, trained)) >= goal, timeout=60)
        address = find(folder)
        pids.add(address.pid)
        kill(address)
    for thread in threads:
        thread.join()
    assert not failures
    assert Counter(position for part in trained for position in part) == Counter(range(3000))
    status = clients[0].status()
    assert status["counts"]["0"] == {"todo": 0, "doing": 0, "done": 3000, "lost": 0, "repeated": 0}
    assert len(pids) == 3 and (folder / "server.log").read_text().count("serves") == 4
    joins = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "join" for line in joins) == 4  # nobody had to join again


def test_a_stale_file_is_no_server(folder: Path) -> None:
    first = find_or_start(folder)
    kill(first)
    assert not is_alive(first)
    with pytest.raises(ServerNotStarted, match=r"has come up .* within 0 s"):
        find(folder, timeout=0)
    second = find_or_start(folder)
    assert second.pid != first.pid and second.token == first.token


def test_a_server_that_has_ended_in_order_is_not_started_again_by_its_clients(folder: Path) -> None:
    """A worker that is late with its last report must not leave a server behind."""
    address = find_or_start(folder)
    with Client(address, 0) as first, Client(address, 1, patience=0.3, resolve=lambda: revive(folder)) as late:
        late.status()
        first.shutdown()
        wait_for_end(address.pid)
        with pytest.raises(ServerUnreachable, match="has ended in order"):
            late.status()
    assert Address.read(folder) is None


def test_server_that_cannot_start_says_why(folder: Path) -> None:
    folder.mkdir()
    (folder / "journal.jsonl").write_text("{broken\n")
    with pytest.raises(ServerNotStarted, match=r"ended at once.*journal.jsonl, line 1 is damaged"):
        find_or_start(folder)


def test_journal_of_another_data_set_is_refused_across_processes(folder: Path) -> None:
    with Client(find_or_start(folder), 0) as client:
        client.configure(DATASET, SOLUTION, world_size=1, global_batch=8)
    kill(find(folder))
    with Client(find_or_start(folder), 0) as client:
        with pytest.raises(ServiceError, match=r"(?s)clicks.*flights.*another folder") as refusal:
            client.configure(DATASET | {"name": "flights"}, SOLUTION, world_size=1, global_batch=8)
        assert refusal.value.kind == "other_dataset"


@pytest.mark.parametrize(
    "solution, message",
    [
        ("strategies.antdt.control.solutions.NoSuch", "there is no solution strategies.antdt.control.solutions.NoSuch"),
        ("no_such_package.Solution", "there is no solution no_such_package"),
        ("pathlib.Path", "pathlib.Path is no strategies.antdt.control.solutions.Solution"),
    ],
)
def test_solutions_that_are_none_are_refused(folder: Path, solution: str, message: str) -> None:
    with Client(find_or_start(folder), 0) as client, pytest.raises(ServiceError, match=message):
        client.configure(DATASET, {"class_path": solution, "init_args": {}}, world_size=1, global_batch=8)


def serve(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """``zoo serve-data``, when it listens."""
    process = warm_python.Popen(
        [sys.executable, "-m", "zoo", "serve-data", "--folder", str(folder), *words],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline().startswith("serves")
    return process


def test_verb_serves_until_it_is_told_to_end(folder: Path) -> None:
    process = serve(folder, "--port", "0")
    with Client(find(folder), 0) as client:
        client.configure(DATASET, SOLUTION, world_size=1, global_batch=8)
        again = [sys.executable, "-m", "zoo", "serve-data", "--folder", str(folder)]
        second = warm_python.run(again, env=ENVIRONMENT)
        assert second.returncode == 1 and "error: another server writes the journal" in second.stderr
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0 and not (folder / "server.json").exists()
    assert json.loads((folder / "ledger.json").read_text())["settings"]["dataset"]["name"] == "clicks"  # it can go on
    idle = serve(folder, "--idle-timeout", "0.2")
    assert "no client for 0.2 s" in idle.communicate(timeout=20)[0] and idle.returncode == 0


def test_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve-data", "--help"])
    assert "ANTDT_TOKEN" in capsys.readouterr().out


def test_server_and_its_folder_need_neither_torch_nor_lightning() -> None:
    modules = "strategies.antdt.service.server, strategies.antdt.service.launch"
    code = f"import sys, {modules}; print({{'torch', 'lightning'}} & set(sys.modules))"
    assert run(code).communicate(timeout=60)[0].strip() == "set()"
