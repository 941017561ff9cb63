"""Find the parameter servers of a run's folder, or start them: processes that race for one end up with the same."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from strategies.antdt.ps.frames import Connection
from strategies.antdt.service.address import Address
from strategies.antdt.service.launch import ServerNotStarted, is_running, start_lock
from strategies.antdt.service.wire import ServiceError, WireError

__all__ = ["find_or_start_server", "find_server", "is_alive"]

_LOOK_EVERY = 0.05


def is_alive(address: Address, index: int, timeout: float = 5.0) -> bool:
    """Whether a parameter server of this number, which knows the token, answers at an address."""
    if address.hostname == socket.gethostname() and address.pid and not is_running(address.pid):
        return False
    try:
        connection = Connection(address.host, address.port, 2**20, timeout)
    except OSError:
        return False
    try:
        connection.send({"op": "hello", "token": address.token, "worker": -1, "session": "", "role": "guest"}, wait=timeout)
        return bool(connection.receive(timeout).header["server"] == index)
    except (OSError, ServiceError, WireError):
        return False
    finally:
        connection.close()


def find_server(folder: Path, index: int) -> Address:
    """A server of a folder that runs.

    Raises:
        ServerNotStarted: there is none.
    """
    address = Address.read(folder / f"ps{index}")
    if address is None or not is_alive(address, index):
        raise ServerNotStarted(f"parameter server {index} of {folder} does not run any more.")
    return address


def find_or_start_server(folder: Path, index: int, *, timeout: float = 120.0, options: Sequence[str] = ()) -> Address:
    """A server of a folder: the one that runs, or a new one, which goes on from the file of the one before.

    Args:
        folder: of the run; made if there is none.
        index: number of the server.
        timeout: seconds to wait.
        options: further words for ``python -m strategies.antdt.ps.server``.

    Raises:
        ServerNotStarted: it ended at once, or does not answer.
    """
    own = folder / f"ps{index}"
    own.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + timeout
    process: subprocess.Popen[bytes] | None = None
    with start_lock(own / "start.lock", end):
        while True:
            address = Address.read(own)
            if address is not None and is_alive(address, index):
                return address
            if process is None:
                process = _start(folder, index, options)
            if process is not None and process.poll() is not None:
                raise ServerNotStarted(f"parameter server {index} of {folder} ended at once.{_log_end(own)}")
            if time.monotonic() > end:
                if process is not None:
                    process.kill()
                    process.wait()
                raise ServerNotStarted(f"parameter server {index} of {folder} did not come up in {timeout:g} s.{_log_end(own)}")
            time.sleep(_LOOK_EVERY)


def _start(folder: Path, index: int, options: Sequence[str]) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)}
    with (folder / f"ps{index}" / "server.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "strategies.antdt.ps.server", "--folder", str(folder), "--index", str(index), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def _log_end(folder: Path) -> str:
    log = folder / "server.log"
    if not log.exists():
        return " It has written no log."
    return f" The end of {log}: " + " | ".join(log.read_text(errors="replace").splitlines()[-5:])
