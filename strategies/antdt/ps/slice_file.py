"""A server's part on disk, from which it goes on when it is started again."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from strategies.antdt.ps.slices import Slices

__all__ = ["SliceFile"]


class SliceFile:
    """A file that is written from a copy, in a thread, while gradients go on to be applied.

    Args:
        path: of the file; None: nothing is kept.

    Attributes:
        path: None once nothing is kept any more.
        saved_at: when the last copy was made (``time.monotonic``).
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.saved_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="antdt-ps-disk")
        self._saving: Future[None] | None = None

    def load(self) -> tuple[Slices, dict[str, Any]] | None:
        """What the former process has saved, see `Slices.load`; None if there is no file.

        Raises:
            ValueError: it is no file of a server.
        """
        return Slices.load(self.path) if self.path is not None and self.path.exists() else None

    def save(self, slices: Slices, about: Mapping[str, Any], wait: bool = False) -> bool:
        """Copy a part, and have it written.

        Args:
            slices: the part.
            about: JSON types, for `load`.
            wait: until it is on disk; else a copy that is still being written stays the newest.

        Returns:
            Whether a copy was made.

        Raises:
            OSError: the file, or the one before, could not be written.
        """
        if self.path is None:
            return False
        if self._saving is not None:
            if not (wait or self._saving.done()):
                return False
            self._written()
        copied = slices.copy_out(about)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._saving = self._thread.submit(Slices.write_file, self.path, *copied)
        self.saved_at = time.monotonic()
        if wait or self._saving.done():
            self._written()
        return True

    def _written(self) -> None:
        """Wait until the copy is written; a failure is told once."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    @property
    def failed(self) -> bool:
        """Whether the last copy could not be written; the next `save` says why."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def abandon(self) -> None:
        """Keep nothing any more; what is being written is written first, so that whoever removes the file removes it all."""
        self.path = None
        self._written()

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown(wait=True)
