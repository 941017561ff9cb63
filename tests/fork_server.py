"""One clean process that has imported everything: ranks and commands of the tests are forked from it in milliseconds."""

import multiprocessing
import os
from multiprocessing import forkserver
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
