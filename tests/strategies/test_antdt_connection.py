"""Finding the service: what goes wrong is said before training, and one that was killed is found again."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from antdt_job import Noisy, RowsData, job, trainer_of
from distributed import RankError, RankPool

from strategies import AntDTStrategy
from strategies.antdt.service import connection
from strategies.antdt.service.client import ServerUnreachable
from strategies.antdt.service.connection import Connection
from zoo.base.torchrun import restarts_left


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_FIRST_PATIENCE", 0.2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ValueError, match="ANTDT_TOKEN"):
        Connection(address, tmp_path, rank=0, world_size=1)
    monkeypatch.setenv("ANTDT_TOKEN", "secret")
    with pytest.raises(ServerUnreachable, match="has not answered"):
        Connection(address, tmp_path, rank=0, world_size=1).connect()


def test_one_server_for_several_machines_is_started_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with pytest.raises(ValueError, match="zoo serve-data"):
        Connection("auto", tmp_path, rank=0, world_size=8, num_nodes=2)


def test_restarts_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarts_left() == 2
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    assert restarts_left() == 0


OWN = {"server": "auto", "global_batch_size": 8, "shard_steps": 3}


def test_a_journal_of_other_data_is_refused(pool: RankPool, tmp_path: Path) -> None:
    pool.run(job, tmp_path, OWN, data={"rows": 45}, end=("raise", 0, 2), max_restarts=1, world_size=1)
    assert (tmp_path / "antdt" / "server.json").exists(), "it waits for the group to be started again"
    with pytest.raises(RankError, match="45"):
        pool.run(job, tmp_path, OWN, 1, data={"rows": 40}, world_size=1)
    assert not (tmp_path / "antdt" / "server.json").exists(), "nobody will start this group again"


class KillServer(Noisy):
    """Kills the service in the third step."""

    folder: Path

    def on_train_batch_end(self, *_: object) -> None:
        if self.trainer.global_step == 3 and self.trainer.is_global_zero:
            os.kill(json.loads((self.folder / "antdt" / "server.json").read_text())["pid"], signal.SIGKILL)


def lose_server(folder: Path) -> list[int]:
    module = KillServer()
    module.folder = folder
    trainer = trainer_of(AntDTStrategy(**{**OWN, "report_every": 1}), folder)
    trainer.fit(module, RowsData(rows=45))
    return [index for _, _, indices in module.seen for index in indices]


def test_a_server_that_is_killed_is_started_again_and_nothing_is_lost(pool: RankPool, tmp_path: Path) -> None:
    seen = pool.run(lose_server, tmp_path)
    assert sorted(index for each in seen for index in each) == sorted([*range(45)] * 2)
