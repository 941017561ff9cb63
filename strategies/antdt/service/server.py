"""The server process: ``python -m strategies.antdt.service.server --folder runs/flights/antdt``, or ``zoo serve-data``.

One asyncio process for one job, which outlives restarts of the workers. Its folder holds

==================  =================================================================================================
``server.json``     where it listens, its process and its token; readable by the owner only; gone when it ends
``journal.jsonl``   and ``ledger.json``: the ledger, see `strategies.antdt.sharding.journal`; gone when the job has ended
``generation``      the last generation of the job that has ended, with which the next job's go on
``events.jsonl``    a line for each decision, arrival, departure and restart
``server.log``      what it prints, when `find_or_start` has started it
==================  =================================================================================================
"""

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.antdt.control.controller import Controller
from strategies.antdt.service.address import SERVER_FILE, Address
from strategies.antdt.service.service import Service, SupportsControl
from strategies.antdt.service.wire import (
    AUTHENTICATED_LIMIT,
    LIMIT,
    Decoder,
    MessageTooLarge,
    WireError,
    encode,
    error,
    same_token,
)
from strategies.antdt.sharding.journal import Journal, JournalError, RecordedLedger

__all__ = ["ServerThread", "main", "serve"]

TOKEN_VARIABLE = "ANTDT_TOKEN"
_STRANGERS_TIME = 30.0  # seconds in which a connection must show the token

BuildController = Callable[[dict[str, Any]], SupportsControl]


def _clock() -> Callable[[], float]:
    """Seconds since 1970 that never jump while this process lives, and go on where another process's have been."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class _Connection(asyncio.Protocol):
    """One client. A message without the token, too large, or no message at all ends it."""

    def __init__(self, server: "_Server") -> None:
        self._server = server
        self._decoder = Decoder(LIMIT)
        self.known = False
        self.since = server.now()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.service.disconnected(self, self._server.now())

    def data_received(self, data: bytes) -> None:
        try:
            for request in self._decoder.feed(data):
                if not same_token(request.get("token"), self._server.token):
                    return self._refuse("token", "the token is wrong; it is in server.json of the server's folder.")
                self.known, self._decoder.limit = True, AUTHENTICATED_LIMIT
                self._server.requested()
                self._server.service.handle(request, self, self._server.now())
        except MessageTooLarge as refusal:
            self._refuse("too_large", str(refusal))
        except WireError as refusal:
            self._refuse("bad_request", str(refusal))
        except Exception as failure:  # a defect; the others must not suffer from it
            print(f"error in the server: {failure!r}", file=sys.stderr, flush=True)
            self._refuse("internal", f"the server failed: {failure!r}; its log says more.")
            raise
        finally:
            if self._server.service.stopping:
                self._server.stop()

    def _refuse(self, kind: str, message: str) -> None:
        self.send(error(kind, message))
        self.close()

    def send(self, message: dict[str, Any]) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(encode(message))

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class _Server:
    """Connections, clock and end of a service."""

    def __init__(self, service: Service, token: str, now: Callable[[], float], idle_timeout: float) -> None:
        self.service, self.token, self.now = service, token, now
        self.connections: set[_Connection] = set()
        self._idle_timeout, self._last = idle_timeout, now()
        self._end = asyncio.Event()

    def requested(self) -> None:
        self._last = self.now()

    def stop(self) -> None:
        self._end.set()

    async def run(self) -> None:
        """Until `stop`, or nobody has been there for the idle time."""
        while not self._end.is_set():
            now = self.now()
            for connection in list(self.connections):
                if not connection.known and now - connection.since > _STRANGERS_TIME:
                    connection.close()
            self.service.tick(now)
            if any(connection.known for connection in self.connections):
                self._last = now
            elif now - self._last > self._idle_timeout:
                print(f"no client for {self._idle_timeout:g} s: ends; the journal stays", flush=True)
                return
            try:
                await asyncio.wait_for(self._end.wait(), min(1.0, self._idle_timeout))
            except TimeoutError:
                continue


async def serve(
    build_controller: BuildController,
    token: str,
    *,
    journal: Journal | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    idle_timeout: float = 900.0,
    event: Callable[[dict[str, Any]], None] = lambda line: None,
    ready: Callable[[Address, Callable[[], None]], None] = lambda address, stop: None,
) -> None:
    """Serve one job until someone asks for the end, or nobody comes.

    Args:
        build_controller: see `Service`.
        token: that all requests must carry.
        journal: to replay and to write; None: the ledger lives as long as this process.
        host: to listen on: the network of the job, not of the world.
        port: 0: any that is free.
        idle_timeout: seconds without a client, after which it ends.
        event: takes lines of the log.
        ready: called when it listens, with its address and with what stops it.

    Raises:
        OSError: it cannot listen there.
        JournalError: the journal is damaged.
    """
    now = _clock()
    service = Service(RecordedLedger(journal), build_controller, event, now())
    state = _Server(service, token, now, idle_timeout)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: _Connection(state), host, port)
    try:
        chosen = listener.sockets[0].getsockname()[1]
        ready(Address(host, chosen, token), lambda: loop.call_soon_threadsafe(state.stop))  # type: ignore[arg-type]
        await state.run()
    finally:
        listener.close()
        for connection in list(state.connections):
            connection.close()
        service.close(job_is_over=service.stopping)


class ServerThread:
    """A server in a thread of this process: the light mode, whose ledger lives in the checkpoints alone; and tests.

    Args:
        build_controller: see `Service`.
        options: of `serve`.

    Attributes:
        address: where it listens.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, build_controller: BuildController = Controller.from_settings, **options: Any) -> None:
        started = threading.Event()
        found: list[Any] = []
        self._failure: BaseException | None = None

        def ready(address: Address, stop: Callable[[], None]) -> None:
            found[:] = [address, stop]
            started.set()

        def run() -> None:
            try:
                asyncio.run(serve(build_controller, secrets.token_urlsafe(24), ready=ready, **options))
            except BaseException as failure:
                self._failure = failure
            finally:
                started.set()

        self._thread = threading.Thread(target=run, name="antdt-server", daemon=True)
        self._thread.start()
        started.wait()
        if not found:
            assert self._failure is not None
            raise self._failure
        self.address: Address = found[0]
        self._stop: Callable[[], None] = found[1]

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        if self._thread.is_alive():
            self._stop()
        self._thread.join()

    def __enter__(self) -> "ServerThread":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@dataclass(frozen=True)
class _Folder:
    """Files of a server that lives in a folder."""

    path: Path

    def token(self) -> str:
        """That of the environment, or of the former server here, whose clients are to find this one; or a new one."""
        given = os.environ.get(TOKEN_VARIABLE)
        former = Address.read(self.path)
        return given or (former.token if former is not None else secrets.token_urlsafe(24))

    def announce(self, address: Address, host: str) -> None:
        reachable = socket.gethostname() if host in ("0.0.0.0", "::") else host
        content = {
            "host": reachable,
            "port": address.port,
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "token": address.token,
        }
        beside = self.path / f"{SERVER_FILE}.new"
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(file, "w") as stream:
            json.dump(content, stream)
        beside.replace(self.path / SERVER_FILE)

    def event(self, line: dict[str, Any]) -> None:
        """One write for a line, so that a worker may write to the same file."""
        file = os.open(self.path / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, json.dumps(line).encode() + b"\n")
        os.close(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server of a folder.

    Args:
        argv: options; the process's by default.

    Returns:
        0: it has ended as it should; 1: it could not start, and has said why.
    """
    parser = argparse.ArgumentParser(
        prog="zoo serve-data",
        description="Serve the ledger of samples and the controller of one job (AntDT). Workers find it by the folder, or by"
        f" host:port and the token, which is in {SERVER_FILE} of the folder, or given to both in ${TOKEN_VARIABLE}.",
    )
    parser.add_argument("--folder", type=Path, required=True, help="journal, events and server.json; the same one continues")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on: the network of the job (default: this machine)"
    )
    parser.add_argument("--port", type=int, default=0, help="default: the former server's here if it is free, or any")
    parser.add_argument("--idle-timeout", type=float, default=900.0, help="end after so many seconds without a client (900)")
    options = parser.parse_args(argv)
    try:
        journal = Journal(options.folder)
    except (JournalError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    folder = _Folder(options.folder)
    former = Address.read(options.folder)
    port = options.port or (former.port if former is not None and _is_free(options.host, former.port) else 0)

    def ready(address: Address, stop: Callable[[], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        folder.announce(address, options.host)
        print(f"serves {options.folder} on {options.host}:{address.port}, process {os.getpid()}", flush=True)

    try:
        asyncio.run(
            serve(
                Controller.from_settings,
                folder.token(),
                journal=journal,
                host=options.host,
                port=port,
                idle_timeout=options.idle_timeout,
                event=folder.event,
                ready=ready,
            )
        )
    except (JournalError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        mine = Address.read(options.folder)
        if mine is not None and mine.pid == os.getpid():
            (options.folder / SERVER_FILE).unlink(missing_ok=True)
        journal.close()
    return 0


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    sys.exit(main())
