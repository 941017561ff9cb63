"""Protection of a forked process from the garbage of the process that forked it."""

import gc
import os

__all__ = ["leave_inherited_garbage"]

_DONE: list[bool] = []


def leave_inherited_garbage() -> None:
    """Never collect, in a forked child, what its parent had left; to be called once, by whoever makes process groups.

    A finished run's process groups are often held by reference cycles, until some garbage collection ends them and joins their
    threads. Threads do not survive a fork. If the collection happens in a worker of a ``DataLoader`` that was forked meanwhile,
    the worker waits for threads that it does not have, or reads the memory where they were: it hangs, or dies of a segmentation
    fault. So a child moves all that it inherits to the collector's permanent generation (`gc.freeze`), first thing; its own
    garbage is collected as ever.
    """
    if not _DONE and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=gc.freeze)
        _DONE.append(True)
