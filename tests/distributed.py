"""One warm pool of gloo ranks for the whole test run.

A test asks for the fixture ``pool`` and calls ``pool.run(function, world_size=2)``: every rank runs ``function`` inside
a fresh process group, and the results come back in rank order. Ranks are kept between calls, because importing torch
and Lightning takes longer than most tests; they are forked from one clean server process that has imported all, so a
new rank costs milliseconds and a rank that hung or died is simply replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fork_server import start_fork_server
from torch import distributed

MAX_RANKS = 8
GRACE_S = 10.0
"""Seconds a rank has to die by itself after its time-out (it writes its stacks first) before it is killed."""
LAST_WORDS_S = 2.0
"""Seconds that are waited for news of the others when a rank has lost a connection."""


class RankError(RuntimeError):
    """A rank raised, died or did not answer; the message carries its real traceback or its stacks."""


@dataclass(frozen=True)
class _Call:
    """What one rank needs to know before the arguments can be unpickled."""

    path: str
    module: str
    packages: dict[str, list[str]]
    qualname: str
    world_size: int
    port: int
    timeout_s: float
    deadline: float
    folder: str
    environment: dict[str, str]


class _Rank:
    """The parent's end of one rank."""

    def __init__(self, rank: int, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self.log = log
        log.touch()
        self.connection, theirs = context.Pipe()
        # By path: the name tests.distributed exists under pytest only (an installed package may be called tests, too).
        self.process = context.Process(
            target=runpy.run_path,
            args=(__file__, {"_as_rank": (rank, theirs, str(log))}, __name__),
            name=f"rank {rank}",
        )
        self.process.start()
        theirs.close()

    def send(self, message: object) -> None:
        # Plain pickle: multiprocessing's own would pass tensors as shared memory that dies with the sender.
        self.connection.send_bytes(pickle.dumps(message))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()

    def end(self) -> str:
        """How the process ended, in words."""
        self.process.join(GRACE_S)
        code = self.process.exitcode
        if code is None:
            return "closed its connection"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def wrote(self) -> str:
        """The end of what the rank wrote to stdout and stderr during the current call."""
        text = self.log.read_text(errors="replace").strip()
        return text[-8000:]


class RankPool:
    """At most :data:`MAX_RANKS` warm processes that run functions as the ranks of a gloo group."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._logs = tempfile.TemporaryDirectory(prefix="ranks-")
        atexit.register(self.close)

    def run(
        self, function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Run ``function(*args, **kwargs)`` on every rank of a new process group.

        Inside, ``torch.distributed`` is initialised (gloo, loopback) and the environment is torch elastic's, so a
        ``lightning.Trainer(accelerator="cpu", devices=world_size, strategy="ddp")`` joins this group and launches
        nothing.

        Args:
            function: A function or static method at the top of a file; ranks load that file by its path.
            *args: Its arguments, pickled.
            world_size: Number of ranks, 1 to :data:`MAX_RANKS`.
            timeout: Seconds until every rank that has not answered is killed.
            **kwargs: Its keyword arguments, pickled.

        Returns:
            The results, pickled back, in rank order.

        Raises:
            RankError: A rank raised (the first one's traceback is the message), died, or did not answer in time.
            ValueError: The function cannot be found by file and name, or the world size is out of range.
        """
        __tracebackhide__ = True
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size must be between 1 and {MAX_RANKS}, got {world_size}.")
        if "<" in function.__qualname__:
            raise ValueError(
                f"{function.__qualname__} cannot run on a rank: ranks load it by file and name, so move it to the top "
                "of its file and pass what it closes over as arguments."
            )
        path = inspect.getfile(inspect.unwrap(function))
        where = f"{Path(path).name}::{function.__qualname__}"
        self._grow(world_size)
        ranks = self._ranks[:world_size]
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        call = _Call(
            path=path,
            module=function.__module__,
            packages=_packages(function.__module__),
            qualname=function.__qualname__,
            world_size=world_size,
            port=store.port,
            timeout_s=timeout,
            deadline=time.monotonic() + timeout,
            folder=str(Path.cwd()),
            environment=dict(os.environ),
        )
        try:
            for rank in ranks:
                os.truncate(rank.log, 0)
                rank.send(call)
                rank.send((args, kwargs))
            results = _answers(ranks, call.deadline, timeout, where)
            for rank in ranks:
                rank.send("all ranks have answered")
            _answers(ranks, call.deadline + GRACE_S, timeout + GRACE_S, f"the end of {where}")
        except BaseException:
            self.close()
            raise
        return results

    def close(self) -> None:
        """Kill every rank, and what it started; the next :meth:`run` starts new ones."""
        while self._ranks:
            self._ranks.pop().kill()

    def _grow(self, world_size: int) -> None:
        """Start the ranks that are missing; replace all if one died between two calls."""
        if any(rank.process.exitcode is not None for rank in self._ranks):
            self.close()
        start_fork_server()
        for rank in range(len(self._ranks), world_size):
            self._ranks.append(_Rank(rank, Path(self._logs.name) / f"rank{rank}.log"))


def _packages(module: str) -> dict[str, list[str]]:
    """The packages above a module of this process, with the folders that each stands for."""
    names = [module[:end] for end, letter in enumerate(module) if letter == "."]
    return {name: list(getattr(sys.modules.get(name), "__path__", [])) for name in names}


def _answers(ranks: list[_Rank], deadline: float, timeout: float, where: str) -> list[Any]:
    """Wait for one answer of every rank.

    Raises:
        RankError: As :meth:`RankPool.run`.
    """
    __tracebackhide__ = True
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    dead: list[int] = []
    end = deadline + GRACE_S
    while not dead:
        settled = {*results, *(number for _, number, _ in failures)}
        waiting = {number: rank for number, rank in enumerate(ranks) if number not in settled}
        if not waiting or (failures and not any("onnection" in text for *_, text in failures)):
            break
        if failures:  # a lost connection is what a peer's death looks like from outside, and may be heard of before it
            end = min(end, max(failures)[0] + LAST_WORDS_S)
        handles = [handle for rank in waiting.values() for handle in (rank.connection, rank.process.sentinel)]
        ready = connection.wait(handles, timeout=max(0.0, end - time.monotonic()))
        if not ready:
            break
        for number, rank in waiting.items():
            try:
                if rank.connection.poll():
                    failed_at, answer = rank.connection.recv()
                    if failed_at is None:
                        results[number] = answer
                    else:
                        failures.append((failed_at, number, answer))
                elif rank.process.sentinel in ready:
                    dead.append(number)
            except (EOFError, ConnectionError):
                dead.append(number)

    if len(results) == len(ranks):
        return [results[number] for number in range(len(ranks))]
    of = f"of {len(ranks)}"
    if failures and not dead:
        _, number, text = min(failures)
        raise RankError(f"rank {number} {of} failed in {where}:\n{text}{_written(number, ranks)}")
    if time.monotonic() >= deadline:
        failed = [number for _, number, _ in failures]
        silent = [number for number in range(len(ranks)) if number not in results and number not in failed]
        ends = {number: ranks[number].end() for number in silent}
        raise RankError(
            f"{where} did not answer within {timeout:g} s on rank {', '.join(map(str, silent))} {of}; all ranks are "
            "killed. Where they stood:" + "".join(_written(number, ranks) or f"\n{ends[number]}" for number in silent)
        )
    number = dead[0]
    raise RankError(
        f"rank {number} {of} died in {where}: {ranks[number].end()}.{_written(number, ranks)}"
        + "".join(f"\nrank {other} then failed:\n{text}" for _, other, text in sorted(failures))
    )


def _written(number: int, ranks: list[_Rank]) -> str:
    text = ranks[number].wrote()
    return f"\n--- written by rank {number} ---\n{text}" if text else ""


def _serve(rank: int, parent: connection.Connection, log: str) -> None:
    """Body of a rank: answer calls until the parent is gone."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            call: _Call = parent.recv()
            parent.send_bytes(_perform(rank, call, parent))
            parent.recv()
            # Only now, that every rank has answered, may the sockets be closed: a peer could still read from them.
            if distributed.is_initialized():
                distributed.destroy_process_group()
            parent.send_bytes(pickle.dumps((None, None)))


def _die_with_parent() -> None:
    """Take the rank and what it started down when the parent is gone, whatever the rank is doing."""
    process = multiprocessing.parent_process()
    assert process is not None
    connection.wait([process.sentinel])
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _perform(rank: int, call: _Call, parent: connection.Connection) -> bytes:
    """Run one call and pickle ``(None, result)`` or ``(time of the failure, its traceback)``."""
    faulthandler.dump_traceback_later(max(0.01, call.deadline - time.monotonic()), exit=True)
    try:
        os.environ.clear()
        os.environ.update(call.environment | _elastic_environment(rank, call))
        os.chdir(call.folder)
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        function: Any = _load(call)
        args, kwargs = parent.recv()
        distributed.init_process_group("gloo", timeout=timedelta(seconds=call.timeout_s))
        return pickle.dumps((None, function(*args, **kwargs)))
    except BaseException as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
        return pickle.dumps((time.monotonic(), text))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _load(call: _Call) -> object:
    """The function itself: from the module under the name it has in the parent, so that its classes pickle."""
    module = sys.modules.get(call.module) or _import(call)
    found: object = module
    for name in call.qualname.split("."):
        found = getattr(found, name)
    return found


def _import(call: _Call) -> ModuleType:
    for name, folders in call.packages.items():
        package = sys.modules.setdefault(name, ModuleType(name))
        package.__path__ = folders
    spec = importlib.util.spec_from_file_location(call.module, call.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[call.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[call.module]
        raise
    return module


def _elastic_environment(rank: int, call: _Call) -> dict[str, str]:
    """What torchrun sets on one node, with the parent as the agent that hosts the store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(rank),
        "WORLD_SIZE": str(call.world_size),
        "LOCAL_WORLD_SIZE": str(call.world_size),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(call.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(call.port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }


if "_as_rank" in globals():
    _serve(*globals()["_as_rank"])
