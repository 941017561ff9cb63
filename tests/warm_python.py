"""``python ...`` without the wait for its imports: processes forked from one that has imported torch, Lightning and the zoo.

Each is a process of its own, with its folder, environment, pipes, signals and exit status, and it reads the words of the real
interpreter: ``-m MODULE``, ``-c CODE`` or a script. :class:`Popen` and :func:`run` stand in for those of ``subprocess``.
Processes that torchrun starts are forked from torchrun's in the same way, so they are its children. The packages of this tree
are imported already: a test that needs others under the same names starts a real interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import reduction
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fork_server import start_fork_server

_LIBRARY = tuple({sys.prefix, sys.base_prefix})


class _Descriptor:
    """A file descriptor that is handed to a new process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(duplicate: Any) -> int:
    return duplicate.detach()


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` of ``[sys.executable, *words]`` that forks."""

    def _execute_child(self, args: Sequence[object], _executable: Any, _preexec: Any, _close: Any, _pass: Any, cwd: Any, env: Any,
                       _startup: Any, _flags: Any, _shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
                       errread: int, errwrite: int, _signals: Any, _gid: Any, _gids: Any, _uid: Any, _umask: Any,
                       start_new_session: bool, _group: Any) -> None:  # fmt: skip
        streams = [theirs if theirs >= 0 else own for own, theirs in enumerate((p2cread, c2pwrite, errwrite))]
        self._start(_words(args), str(cwd or Path.cwd()), dict(os.environ if env is None else env), streams, start_new_session)
        self._child_created = True
        for theirs, ours in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if ours >= 0:
                os.close(theirs)
        self._closed_child_pipe_fds = True

    def _start(self, words: list[str], cwd: str, environment: dict[str, str], streams: list[int], session: bool) -> None:
        start_fork_server()
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_become, args=(words, cwd, environment, [_Descriptor(stream) for stream in streams], session)
        )
        self._process.start()
        self.pid = self._process.pid

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode


class _Child(Popen):
    """The same of a process that is a warm one itself, such as torchrun: its own fork, and so its own child."""

    def _start(self, words: list[str], cwd: str, environment: dict[str, str], streams: list[int], session: bool) -> None:
        _flush()
        self.pid = os.fork()
        if not self.pid:
            _become(words, cwd, environment, streams, session)

    _internal_poll = subprocess.Popen._internal_poll
    _wait = subprocess.Popen._wait


def run(
    args: Sequence[object],
    *,
    input: str | None = None,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of ``[sys.executable, *words]`` with its output captured as text."""
    pipes = {"stdin": None if input is None else subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options.pop("capture_output", None)
    with Popen(args, **{**pipes, "text": True, **options}) as process:  # type: ignore[call-overload]
        try:
            out, error = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, error)
    if check:
        done.check_returncode()
    return done


def _words(args: Sequence[object]) -> list[str]:
    """Words after the interpreter's name."""
    executable, *words = map(str, args)
    if executable != sys.executable:
        raise ValueError(f"Only {sys.executable} can be started warm, not {executable}.")
    return words


def _become(words: list[str], cwd: str, environment: dict[str, str], streams: list[int], new_session: bool) -> None:
    """Turn this fresh fork into ``python words``, and end it as the interpreter would."""
    status = 1
    try:
        _take_over(cwd, environment, streams, new_session)
        status = _interpret(words)
    except KeyboardInterrupt:
        traceback.print_exc()
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _take_over(cwd: str, environment: dict[str, str], streams: list[int], new_session: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if new_session:
        os.setsid()
    # Above the three numbers first: one of them may be the target of another.
    for number, copy in enumerate([os.dup(stream) for stream in streams]):
        os.dup2(copy, number)
        os.close(copy)
    for stream in streams:
        if stream > 2:
            os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))


def _interpret(words: list[str]) -> int:
    """Run the words as the interpreter does and return its exit status."""
    words = list(words)
    while words[0] in ("-u", "-B"):
        if words.pop(0) == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    kind, *rest = words if words[0] in ("-m", "-c") else ["", *words]
    name, *arguments = rest
    sys.argv = [kind or name, *arguments]
    first = {"-m": str(Path.cwd()), "-c": ""}.get(kind, str(Path(name).resolve().parent))
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *added, *(path for path in sys.path if path.startswith(_LIBRARY))]
    sys.path_importer_cache.clear()
    try:
        if kind == "-m":
            if name == "torch.distributed.run":
                from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

                subprocess_handler.Popen = _Child
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(name, "<string>", "exec"), main.__dict__)
        else:
            runpy.run_path(str(Path(name).resolve()), run_name="__main__")
        status: object = 0
    except SystemExit as stop:
        status = stop.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        return 1
    return status or 0


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
