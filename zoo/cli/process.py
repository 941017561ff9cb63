"""Use of threads and memory by this process; call before torch is imported."""

import ctypes
import os

__all__ = ["tune_process"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers, malloc.h of the GNU C library
_KEEP_ALL, _LARGEST_MMAP_THRESHOLD = -1, 2**25


def tune_process() -> None:
    """Let waiting threads sleep soon, and keep the memory that tensors have freed for the next ones.

    - GNU's OpenMP lets threads that wait for one another spin for long, which beside any other busy process slows small
      networks down several times; here they spin for a moment only.
    - GNU's C library gives freed memory back to the system after nearly every step of a network and fetches it again, page
      by page; here the process keeps its largest amount until it ends.

    Whoever has set ``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT``, a ``MALLOC_*_THRESHOLD_`` or ``GLIBC_TUNABLES`` keeps that choice.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another system or C library
        return
    mallopt(_TRIM_THRESHOLD, _KEEP_ALL)
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
