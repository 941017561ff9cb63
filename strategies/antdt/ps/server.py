"""The process of a parameter server: ``python -m strategies.antdt.ps.server --folder runs/flights/antdt --index 0``.

One asyncio loop, and no threads but for the disk and for calls to the data-sharding server. In a folder of its own in that of the
run, ``ps0`` and so on, it keeps where it listens (``server.json``, with the token, readable by the owner only), its part of the
model (``slice.safetensors``) and how often it was started (``starts``), until the run is over.
"""

import argparse
import asyncio
import json
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from strategies.antdt.ps.parameter_server import FRAME_LIMIT, ParameterServer
from strategies.antdt.ps.steps import Delay
from strategies.antdt.service.address import SERVER_FILE, Address
from strategies.antdt.simulation.inject import SleepInjector, Slowdown

__all__ = ["ServerThread", "main", "serve"]

_SLICE_FILE, _STARTS_FILE = "slice.safetensors", "starts"


async def serve(
    server: ParameterServer,
    host: str = "127.0.0.1",
    port: int = 0,
    idle_timeout: float = 60.0,
    ready: Callable[[int], None] = lambda port: None,
    tick_every: float = 0.1,
) -> None:
    """Serve until it is told to end, or nobody has been there for a while.

    Args:
        server: what answers.
        host: to listen on: the network of the job, not of the world.
        port: 0: any that is free.
        idle_timeout: seconds without a connection, after which it ends.
        ready: called with the port when it listens.
        tick_every: seconds between two looks at what is due.

    Raises:
        OSError: it cannot listen there.
    """
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(server.dispatcher.connect, host, port)
    try:
        ready(listener.sockets[0].getsockname()[1])
        while not server.stopping:
            await asyncio.sleep(tick_every)
            server.tick()
            if time.monotonic() - server.last_client > idle_timeout:
                print(f"no client for {idle_timeout:g} s: ends", flush=True)
                break
        await asyncio.sleep(0)
    finally:
        listener.close()
        server.close()


class ServerThread:
    """A parameter server in a thread of this process, for tests and small runs.

    Args:
        index: its number.
        host: to listen on.
        options: of `ParameterServer`.

    Attributes:
        address: where it listens.
        server: what answers.
    """

    def __init__(self, index: int = 0, token: str | None = None, port: int = 0, **options: Any) -> None:
        self.token = token or secrets.token_urlsafe(24)
        self.server = ParameterServer(index, self.token, **options)
        started = threading.Event()
        found: list[int] = []
        failures: list[BaseException] = []

        def ready(chosen: int) -> None:
            found.append(chosen)
            started.set()

        def run() -> None:
            try:
                # Who has started it stops it, however long workers take to come.
                asyncio.run(serve(self.server, port=port, idle_timeout=math.inf, ready=ready, tick_every=0.02))
            except BaseException as failure:
                failures.append(failure)
            finally:
                started.set()

        self._thread = threading.Thread(target=run, name=f"antdt-ps-{index}", daemon=True)
        self._thread.start()
        started.wait()
        if failures:
            raise failures[0]
        self.address = Address("127.0.0.1", found[0], self.token)

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        self.server.stopping = True
        self._thread.join()

    def __enter__(self) -> "ServerThread":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def slow(schedule: str, index: int, restarted: bool) -> Delay | None:
    """How much longer a server takes to apply a gradient.

    Args:
        schedule: ``{"cost": seconds, "slowdowns": [...]}`` (JSON); empty: no longer.
        index: number of the server.
        restarted: whether its process replaces another one.
    """
    if not schedule:
        return None
    content = json.loads(schedule)
    injector = SleepInjector(0.0, [Slowdown(**each) for each in content.get("slowdowns", [])], float(content["cost"]))
    injector.begin(index, restarted)
    return injector.delay


def main(argv: Sequence[str] | None = None) -> int:
    """Run a parameter server.

    Args:
        argv: options.

    Returns:
        0: it has ended as it should; 1: it could not start, and has said why.
    """
    parser = argparse.ArgumentParser(prog="python -m strategies.antdt.ps.server", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for its address (with the token) and its part of the model")
    parser.add_argument("--index", type=int, required=True, help="number of this server; 0 is the clock")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on: the network of the job (default: this machine)"
    )
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument("--idle-timeout", type=float, default=60.0, help="end after so many seconds without a client (60)")
    parser.add_argument(
        "--grace", type=float, default=5.0, help="seconds for which a worker whose connection closed may come back"
    )
    parser.add_argument("--frame-limit", type=int, default=FRAME_LIMIT, help="largest message, in bytes")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for applying gradients (1)")
    parser.add_argument("--slow", default="", help='emulated slowness: {"cost": seconds a gradient, "slowdowns": [...]} (JSON)')
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    folder: Path = options.folder / f"ps{options.index}"
    folder.mkdir(parents=True, exist_ok=True)
    starts = _count_start(folder / _STARTS_FILE)
    former = Address.read(folder)
    token = os.environ.get("ANTDT_TOKEN") or (former.token if former is not None else secrets.token_urlsafe(24))

    def event(line: dict[str, Any]) -> None:
        with (options.folder / "ps-events.jsonl").open("a") as log:
            log.write(json.dumps({"t": time.time(), "pid": os.getpid(), **line}) + "\n")

    try:
        server = ParameterServer(
            options.index,
            token,
            folder / _SLICE_FILE,
            options.frame_limit,
            slow(options.slow, options.index, restarted=starts > 0),
            event,
            options.grace,
            lambda: _forget(folder),
        )
    except (ValueError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1

    def ready(port: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.interrupt)
        host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
        _announce(folder, Address(host, port, token, os.getpid(), socket.gethostname()))
        print(f"server {options.index} listens on {options.host}:{port}, process {os.getpid()}", flush=True)

    try:
        asyncio.run(serve(server, options.host, options.port, options.idle_timeout, ready))
    except OSError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if not server.restart:
        _forget(folder)
    return 0


def _count_start(path: Path) -> int:
    """How often a server of this run has been started before."""
    count = int(path.read_text()) if path.exists() else 0
    path.write_text(str(count + 1))
    return count


def _forget(folder: Path) -> None:
    """Remove what the next run must not find, unless another process has it already; the workers' checkpoints have all of it."""
    address = Address.read(folder)
    if address is not None and address.pid == os.getpid():
        for name in (SERVER_FILE, _SLICE_FILE, _STARTS_FILE):
            (folder / name).unlink(missing_ok=True)


def _announce(folder: Path, address: Address) -> None:
    beside = folder / f"{SERVER_FILE}.new"
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        json.dump(address._asdict(), stream)
    beside.replace(folder / SERVER_FILE)


if __name__ == "__main__":
    sys.exit(main())
