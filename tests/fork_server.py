"""One clean process that has imported everything: ranks and commands of the tests are forked from it in milliseconds."""

import importlib
import multiprocessing
import os
import socket
import sys
import threading
import traceback
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def start_fork_server() -> None:
    """Start the process unless it runs; it imports ``everything`` from this tree and uses one thread."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_address is not None:
        if server._forkserver_pid is None:  # this process is one of its forks: it serves them, too
            server.ensure_running = lambda: None
        return
    multiprocessing.get_context("forkserver").set_forkserver_preload(["everything"])
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    changes = {"PYTHONPATH": path.strip(os.pathsep), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def fork_server_here() -> None:
    """Fork the server from this process, which needs the same imports: for workers of the test run, before their first test."""
    sys.path[:0] = [path for path in (str(TESTS.parent), str(TESTS)) if path not in sys.path]
    importlib.import_module("everything")
    address = connection.arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive_r, alive_w = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(alive_w)
                _forget_pytest()
                forkserver.main(listener.detach(), alive_r, [])  # type: ignore[attr-defined]
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(1)
    os.close(alive_r)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid


def _forget_pytest() -> None:
    """Put back the streams, hooks and importers that pytest has replaced."""
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(0, closefd=False),
        os.fdopen(1, "w", closefd=False),
        os.fdopen(2, "w", closefd=False),
    )
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    sys.unraisablehook, sys.excepthook = sys.__unraisablehook__, sys.__excepthook__
    threading.excepthook = threading.__excepthook__
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
