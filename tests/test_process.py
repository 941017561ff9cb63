"""What the command line sets in its process: waiting threads and freed memory."""

import os
import platform
import subprocess
import sys

import pytest

CHILD = """
import ctypes, os, sys
from zoo.cli.process import tune_process
if sys.argv[1] == "tuned":
    tune_process()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def pages():
    return int(open("/proc/self/statm").read().split()[1])
block = libc.malloc(24 << 20)
ctypes.memset(block, 1, 24 << 20)
before = pages()
libc.free(block)
print(before - pages(), os.environ.get("GOMP_SPINCOUNT"))
"""


def run(mode, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP", "MALLOC", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode], env={**kept, **environment}, check=True, capture_output=True, text=True
    )
    returned, spin = done.stdout.split()
    return int(returned), spin


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library is tuned")
def test_freed_memory_is_kept_and_threads_soon_sleep():
    pages = (24 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert run("plain")[0] > 0.9 * pages
    returned, spin = run("tuned")
    assert returned < 0.1 * pages
    assert spin == "3000"


def test_choices_of_the_user_stay():
    assert run("tuned", GOMP_SPINCOUNT="7")[1] == "7"
    assert run("tuned", OMP_WAIT_POLICY="passive")[1] == "None"
