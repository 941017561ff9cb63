"""Find the server of a run's folder, or start it: processes that race for it end up with one server.

The server is started detached, in a session of its own, so that it outlives the group of workers that torchrun ends and starts
again; it is found again by the file that it writes into the folder.
"""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from strategies.antdt.service.address import SERVER_FILE, Address
from strategies.antdt.service.client import Client
from strategies.antdt.service.wire import ServiceError

__all__ = ["ServerNotStarted", "find", "find_or_start", "is_alive", "is_running", "revive", "start_lock"]

_LOOK_EVERY = 0.05
_started: list["subprocess.Popen[bytes]"] = []
"""Servers that this process has started: those that have ended are asked for their status, else they would stay as zombies."""


class ServerNotStarted(ConnectionError):
    """There is no server, and none could be started; the message holds the end of its log."""


def is_alive(address: Address, timeout: float = 5.0) -> bool:
    """Whether a server that knows the token answers at an address."""
    if address.hostname == socket.gethostname() and address.pid and not is_running(address.pid):
        return False
    try:
        with Client(address, worker=-1, patience=0.0, answer_timeout=timeout) as client:
            client.status()
    except (OSError, ServiceError):
        return False
    return True


def find(folder: Path, timeout: float = 60.0) -> Address:
    """Wait until another process has started the server of a folder.

    Args:
        folder: of the server.
        timeout: seconds to wait.

    Raises:
        ServerNotStarted: nobody has, in that time.
    """
    end = time.monotonic() + timeout
    while True:
        address = Address.read(folder)
        if address is not None and is_alive(address):
            return address
        if time.monotonic() > end:
            raise ServerNotStarted(f"no data-sharding server has come up in {folder} within {timeout:g} s.{_log_end(folder)}")
        time.sleep(_LOOK_EVERY)


def find_or_start(
    folder: Path, *, host: str = "127.0.0.1", idle_timeout: float = 900.0, timeout: float = 60.0, options: Sequence[str] = ()
) -> Address:
    """The server of a folder: the one that runs, or a new one, which goes on from the journal there.

    Any number of processes may call this at once: a lock lets one of them start it, and the others find it.

    Args:
        folder: of the run; made if there is none.
        host: for a new server to listen on.
        idle_timeout: seconds without a client after which a new server ends.
        timeout: seconds to wait for the server to come up.
        options: further words for ``python -m strategies.antdt.service.server``.

    Raises:
        ServerNotStarted: it ended at once, or does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _started[:] = [process for process in _started if process.poll() is None]
    end = time.monotonic() + timeout
    with start_lock(folder / "start.lock", end):
        address = Address.read(folder)
        if address is not None and is_alive(address):
            return address
        process = _start(folder, ["--host", host, "--idle-timeout", str(idle_timeout), *options])
        while True:
            address = Address.read(folder)
            if address is not None and address.pid == process.pid and is_alive(address):
                return address
            if process.poll() is not None:
                raise ServerNotStarted(f"the data-sharding server of {folder} ended at once.{_log_end(folder)}")
            if time.monotonic() > end:
                process.kill()
                process.wait()
                raise ServerNotStarted(
                    f"the data-sharding server of {folder} did not come up in {timeout:g} s.{_log_end(folder)}"
                )
            time.sleep(_LOOK_EVERY)


def revive(folder: Path) -> Address:
    """The server of a folder for a client that has lost it: the one that runs, or a new one if it was killed.

    A server that has ended in order takes its file with it and is not started again: the job is over, or someone has stopped it.

    Args:
        folder: of the run.

    Raises:
        ServerNotStarted: it has ended in order, or a new one could not be started.
    """
    if Address.read(folder) is None:
        raise ServerNotStarted(f"the data-sharding server of {folder} has ended in order: the job is over, or it was stopped.")
    return find_or_start(folder)


def _start(folder: Path, options: list[str]) -> "subprocess.Popen[bytes]":
    # What can be imported here can be there: solutions of the user's own folder too.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "strategies.antdt.service.server", "--folder", str(folder), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    _started.append(process)
    return process


@contextlib.contextmanager
def start_lock(path: Path, end: float) -> Iterator[None]:
    """Hold the lock of a file, with which one process at a time starts a server; it falls with the process.

    Args:
        path: of the file; made if there is none.
        end: until when to wait for it (``time.monotonic``).

    Raises:
        ServerNotStarted: another process holds it for longer.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as cause:
                if time.monotonic() > end:
                    raise ServerNotStarted(
                        f"another process has held {path} for long, starting the server; look at server.log beside it."
                    ) from cause
                time.sleep(_LOOK_EVERY)
        yield
    finally:
        os.close(file)


def is_running(pid: int) -> bool:
    """Whether there is such a process on this machine; one that has ended counts until its parent has noticed."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _log_end(folder: Path) -> str:
    log = folder / "server.log"
    if not log.exists():
        return f" There is no {SERVER_FILE} and no log in that folder."
    lines = log.read_text(errors="replace").splitlines()[-5:]
    return f" The end of {log}: " + " | ".join(lines)
