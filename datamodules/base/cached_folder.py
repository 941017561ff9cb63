"""A folder of the cache that is prepared once: under another name, then renamed, under a lock.

An interrupted run leaves nothing half done, and of two processes the second finds what the first has made.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

__all__ = ["Preparing", "prepare"]


class Preparing:
    """Holds the lock of a folder ``<cache>/<kind>/<name>``, and gives an empty folder to prepare it in.

    Once inside, look whether the folder is there by now; if not, fill the empty one and rename it (``partial.replace(folder)``).

    Args:
        folder: Folder to make.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     folder = Path(cache, "numbers", "one")
        ...     with Preparing(folder) as partial:
        ...         _ = (partial / "one.txt").write_text("1")
        ...         _ = partial.replace(folder)
        ...     [path.name for path in folder.iterdir()]
        ['one.txt']
    """

    def __init__(self, folder: Path) -> None:
        cache, kind = folder.parent.parent, folder.parent.name
        for part in (kind, "locks", "partial"):
            (cache / part).mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(cache / "locks" / f"{kind}-{folder.name}.lock")
        self.partial = cache / "partial" / f"{kind}-{folder.name}"

    def __enter__(self) -> Path:
        self.lock.acquire()
        # The lock is ours: what lies here was left by a process that was killed.
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        return self.partial

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.lock.release()


def prepare(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a folder of the cache, unless it is there; returns the folder."""
    if not folder.is_dir():
        with Preparing(folder) as partial:
            if not folder.is_dir():
                write(partial)
                partial.replace(folder)
    return folder
