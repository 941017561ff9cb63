"""How a worker finds the services of its run, starts them if nobody has, and leaves them."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from strategies.antdt.ps.collectives import Collectives
from strategies.antdt.ps.launch import find_or_start_server, find_server
from strategies.antdt.ps.worker import ParameterClient
from strategies.antdt.service.address import Address
from strategies.antdt.service.client import Client
from strategies.antdt.service.launch import find, find_or_start
from strategies.antdt.service.wire import ServiceError
from strategies.antdt.simulation.inject import Slowdown
from zoo.base.torchrun import is_torchrun, restart_count, run_id

__all__ = ["Rendezvous", "begin_anew", "leave", "num_restarts", "run_to_join", "unless_over"]

TOKEN_VARIABLE = "ANTDT_TOKEN"
RUN_VARIABLE = "ANTDT_RUN"  # for a process that takes the place of another
RESTARTS_VARIABLE = "ANTDT_RESTARTS"


@dataclass(frozen=True)
class Rendezvous:
    """Where the services of a run are, for one of its workers.

    Attributes:
        folder: of services on this machine.
        rank: of the worker.
        world_size: W.
        num_nodes: machines.
        heartbeat_timeout: seconds after which a silent worker is held for lost.
    """

    folder: Path
    rank: int
    world_size: int
    num_nodes: int
    heartbeat_timeout: float

    def connect(
        self,
        servers: int | list[str],
        joins: str,
        frame_limit: int,
        grace: float,
        cost: float = 0.0,
        slowdowns: Sequence[Slowdown] = (),
    ) -> ParameterClient:
        """Come to the parameter servers.

        Args:
            servers: how many to start on this machine; or where they are, ``[host:port, ...]``.
            joins: run that this process is to join while others train; empty: any, and it may begin one.
            frame_limit: largest message, in bytes.
            grace: seconds for which a worker whose connection has closed may come back.
            cost: seconds that servers take longer for each gradient, and
            slowdowns: when they take a multiple of that.

        Raises:
            ValueError: servers on this machine, where those of other machines do not find them.
            ConnectionError: there are none.
            ServiceError: they refuse.
        """
        client: ParameterClient | None = None
        resolve: Callable[[int], Address] | None = None
        find_running: Callable[[int], Address] | None = None
        if isinstance(servers, list):
            token = os.environ.get(TOKEN_VARIABLE, "")
            addresses = [Address.parse(text, token) for text in servers]
        else:
            if self.num_nodes > 1:
                raise ValueError(
                    f"ParameterServerStrategy: servers={servers} starts parameter servers on this machine, where others do not"
                    " find them: start each (python -m strategies.antdt.ps.server --folder ... --index j --host 0.0.0.0"
                    " --port ...) and give servers=[host:port, ...] and $ANTDT_TOKEN to all."
                )
            slow = {"cost": cost, "slowdowns": [asdict(each) for each in slowdowns]}
            options = ["--frame-limit", str(frame_limit), "--grace", str(grace)]
            options += ["--slow", json.dumps(slow)] if cost else []

            def find_or_start_one(index: int) -> Address:
                # Who is to join a run must not begin another one.
                alone = bool(joins) or (client is not None and client.late)
                return find_server(self.folder, index) if alone else find_or_start_server(self.folder, index, options=options)

            resolve, find_running = find_or_start_one, partial(find_server, self.folder)
            addresses = [resolve(index) for index in range(servers)]
        client = ParameterClient(
            addresses, self.rank, self.world_size, resolve=resolve, find=find_running, frame_limit=frame_limit,
            pulse_every=self.heartbeat_timeout / 6, group=self._group(), joins=joins,
        )  # fmt: skip
        return client

    def _group(self) -> str:
        """Names the processes that were started together: when torchrun starts all again, the former ones are dead."""
        if self.num_nodes > 1 or not is_torchrun():
            return ""
        return f"{run_id()}/{restart_count()}"

    def come_to_data(self, server: str, may_start: Callable[[], bool], job: Mapping[str, Any]) -> Client:
        """Come to the data-sharding server, and say what the job is.

        Args:
            server: ``auto``: a process of its own; or ``host:port``, its token in $ANTDT_TOKEN.
            may_start: whether it may be started when nobody answers: who is to join a run must not begin another one.
            job: arguments of `Client.configure`.

        Raises:
            ValueError: ``auto`` on several machines.
            ConnectionError: there is none.
            ServiceError: it refuses.
        """
        if server == "auto":
            if self.num_nodes > 1:
                raise ValueError("ParameterServerStrategy: give server=host:port of a zoo serve-data on several machines.")

            def resolve() -> Address:
                return find_or_start(self.folder) if may_start() else find(self.folder, timeout=5.0)

            client = Client(resolve(), self.rank, resolve=resolve)
        else:
            client = Client(Address.parse(server, os.environ.get(TOKEN_VARIABLE, "")), self.rank)
        client.configure(**job, world_size=self.world_size, heartbeat_timeout=self.heartbeat_timeout)
        client.keep_alive(self.heartbeat_timeout / 6)
        return client


@contextmanager
def unless_over(collectives: Collectives, late: bool) -> Iterator[None]:
    """Let a worker that comes late find that the others have done: that is no failure.

    Args:
        collectives: from which it parts then.
        late: whether it does.

    Raises:
        SystemExit: the services are gone, or let nobody in.
    """
    try:
        yield
    except (ServiceError, ConnectionError) as failure:
        if not late:
            raise
        print(f"worker {collectives.rank} came when the others had done ({failure})", flush=True)
        collectives.parted = True
        raise SystemExit(0) from failure


def leave(
    collectives: Collectives,
    client: ParameterClient,
    data: Client | None,
    *,
    error: Mapping[str, str] | None,
    step: int,
    ends_servers: bool,
    ends_data: bool,
) -> None:
    """Leave the services of a run, whether they still answer or not; in good order unless the worker has parted from the others.

    Args:
        collectives: of the workers.
        client: of the parameter servers.
        data: of the data-sharding server, if this worker has been there.
        error: why it has parted, if by an error of its own.
        step: batches that it has trained.
        ends_servers: whether parameter servers end with the run, and this worker is the one that says so.
        ends_data: the same of the data-sharding server.
    """
    failed = collectives.parted
    if not failed:
        client.patience = 10.0
        with suppress(OSError, ServiceError):  # who is gone has nothing to say
            collectives.gather(None, "a barrier")  # none leaves while another could take it for lost
    if data is not None:
        data.patience = 0.5
        with suppress(OSError, ServiceError):
            if failed:
                if error is not None:
                    data.report(step, [], version=0, errors=[error], node={"alive": False})
                data.leave(graceful=False)
            elif ends_data:
                data.shutdown()
        data.close()
    client.patience = 0.0
    with suppress(OSError, ServiceError):
        if ends_servers and not failed:
            client.shutdown()
            client.close()
        else:
            client.leave(over=not failed)


def run_to_join() -> str:
    """Name of the run that this process is to join, by whoever started it; asked once. Empty: any."""
    return os.environ.pop(RUN_VARIABLE, "")


def begin_anew(run: str) -> None:
    """Put a fresh process in place of this one, that joins a run."""
    os.environ[RUN_VARIABLE] = run
    os.environ[RESTARTS_VARIABLE] = str(num_restarts() + 1)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def num_restarts() -> int:
    """How often this process has begun anew."""
    return int(os.environ.get(RESTARTS_VARIABLE, 0))
