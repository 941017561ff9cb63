"""A process that looks after the one that trains, and puts another in its place when it is killed (section 9, hot restart).

torch elastic ends the whole group when one of the processes that it has started ends badly. So the process that it has started
does not train. When all is imported and built, and before anything runs, it splits off a copy of itself (fork) which trains, and
waits. It is itself the warm spare: a copy takes milliseconds, and memory only for what it changes.
"""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

__all__ = ["REPLACE_EXIT_CODE", "RankKeeper"]

REPLACE_EXIT_CODE = 75  # of sysexits.h: try again
"""Exit code of a process that wants to be replaced."""

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5


class RankKeeper:
    """Splits off processes, one after the other, that go on where `split` was called.

    A process is replaced if a signal has killed it, or it ended with `REPLACE_EXIT_CODE`, as long as there are spares, nobody
    has told this process to end, and the replaced one had not called `finished`. Else this process ends as that one did, which
    torch elastic sees. Signals are passed on, and what a killed process leaves behind, such as workers that load data, is ended:
    as long as they live, the connections of the killed process are open.

    Args:
        spares: how many processes may be replaced.
        name: of the process, for messages.

    Attributes:
        number: in a process that was split off: how many came before it.
    """

    def __init__(self, spares: int, name: str) -> None:
        self.spares, self.name = spares, name
        self.number = 0
        self._process = 0
        self._told_to_end = False
        self._finished: tuple[int, int] | None = None

    @property
    def left(self) -> int:
        """Spares that are left."""
        return self.spares - self.number

    def split(self) -> None:
        """Return in the process that trains; the calling one stays behind, and ends when it is not needed any more.

        Raises:
            RuntimeError: threads run, or a process group or a GPU is in use, which copies would not have.
        """
        _check_and_prepare()
        self._finished = os.pipe()
        former = {number: signal.getsignal(number) for number in _FORWARDED}
        for number in _FORWARDED:
            signal.signal(number, self._pass_on)
        own = os.getpid()
        while True:
            signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
            self._process = os.fork()
            if self._process == 0:
                self._begin(own, former)
                return
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
            ended = os.waitid(os.P_PID, self._process, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            replaced = self._replaces(code)
            if code < 0 or replaced:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            if not replaced:
                _end_as(code)
            self.number += 1

    def ask_for_another(self) -> NoReturn:
        """End this process, to be replaced."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(REPLACE_EXIT_CODE)

    def finished(self) -> None:
        """This process has trained to the end: what it does from now on cannot be taken over by another."""
        if self._finished is not None:
            os.write(self._finished[1], b".")

    def _begin(self, keeper: int, former: dict[signal.Signals, Any]) -> None:
        os.setpgid(0, 0)  # so that what it starts can be found
        _end_with_parent(keeper)
        torch.set_num_threads(torch.get_num_threads())  # torch's other pool sees that it is a copy, and starts its threads anew
        for number, handler in former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._told_to_end = True
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, number)

    def _replaces(self, code: int) -> bool:
        """Whether another process comes; says so."""
        if (code >= 0 and code != REPLACE_EXIT_CODE) or self._told_to_end or self._has_finished():
            return False
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else "is to be replaced"
        if self.left > 0:
            _say(f"{self.name} (process {self._process}) {why}; a spare takes its place ({self.number + 1} of {self.spares}).")
            return True
        _say(
            f"{self.name} (process {self._process}) {why}, and its {self.spares} spares are used up: all ranks end, and torchrun"
            " starts them again from the last checkpoint, if --max-restarts allows it."
        )
        return False

    def _has_finished(self) -> bool:
        assert self._finished is not None
        os.set_blocking(self._finished[0], False)
        try:
            return bool(os.read(self._finished[0], 1))
        except BlockingIOError:
            return False


def _check_and_prepare() -> None:
    """Make this process fit for copies."""
    _end_monitors_of_progress_bars()
    others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if others or threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "AntDT: with restart=hot, this process copies itself, but threads run that copies would not have"
            f" ({', '.join(others)}): start them when training begins (on_fit_start), or use restart=group."
        )
    if dist.is_initialized():
        raise RuntimeError(
            "AntDT: with restart=hot, this process copies itself, but it has joined a process group: let trainer.fit be the first"
            " that needs one, or use restart=group."
        )
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "AntDT: with restart=hot, this process copies itself, which is not possible once it uses a GPU: do not touch CUDA"
            " before trainer.fit, or use restart=group."
        )
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _end_openmp_threads()
    gc.freeze()  # what was built is not looked through again, which would copy it into each process, and take half a second


def _end_monitors_of_progress_bars() -> None:
    """Bars that have ended, such as of a download, leave a thread, which the next bar starts anew."""
    if (tqdm := sys.modules.get("tqdm")) is None:
        return
    for thread in threading.enumerate():
        if isinstance(thread, tqdm.TMonitor):
            thread.exit()


def _end_openmp_threads() -> None:
    """OpenMP's idle threads have no copies either, and GNU's would be waited for; they are started anew when needed."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if path.startswith("/") and "omp" in Path(path).name and hasattr(library := ctypes.CDLL(path), "omp_pause_resource_all"):
            library.omp_pause_resource_all(_PAUSE_HARD)


def _end_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent ends."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _end_as(code: int) -> NoReturn:
    """End as another process did; nothing that was registered to be done at the end is this process's to do."""
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"AntDT: {message}\n".encode())
