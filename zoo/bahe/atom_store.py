"""Vectors of texts on disk: raw float16 rows, memory-mapped, and an index from text to row; section 5 of the method's notes.

======================  =================================================================================================
``manifest.json``       format, dimension, rows of a shard, and the fingerprint of everything that the vectors depend on
``vectors-00000.f16``   rows, little-endian, one after another; row 0 of the first shard is zeros, for padding
``index.sqlite``        table ``atoms``: row, 16-byte blake2b of the text, text; read only while texts are looked up
======================  =================================================================================================

A row exists once the index names it. An append writes rows behind the last one that is named, syncs them to disk, and names
them in one transaction, so that a kill at any moment leaves the rows of before or those of after; the next append overwrites what
it had written.

Shape suffixes: N texts or rows, D dimension.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["AtomStore"]

_FORMAT = 1
_SHARD_ROWS = 1 << 20
_WAIT = 30.0  # seconds that a reader waits for a transaction to end, and a transaction for readers
_ASKED = 500  # keys in a question to the index


class AtomStore:
    """Vectors of distinct texts by row; row 0 is zeros and stands for the empty text.

    Readers may be many, writers one. :meth:`create` makes a store, :meth:`open` opens one.

    Attributes:
        folder: Folder of the store.
        dim: Dimension D of the vectors.
        fingerprint: Everything that the vectors depend on, as plain data.

    Example:
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     store = AtomStore.create(Path(cache, "atoms"), dim=2, fingerprint={"encoder": "tiny"})
        ...     rows = store.append(["tea", "milk"], np.array([[1.0, 2.0], [3.0, 4.0]]))
        ...     rows.tolist(), store.missing(["milk", "tea", "jam"]), store.read(store.rows(["milk", ""])).tolist()
        ([1, 2], ['jam'], [[3.0, 4.0], [0.0, 0.0]])
    """

    def __init__(self, folder: Path, dim: int, fingerprint: Mapping[str, Any], shard_rows: int) -> None:
        self.folder, self.dim, self.fingerprint = folder, dim, dict(fingerprint)
        self._shard_rows = shard_rows
        self._map()

    @classmethod
    def create(cls, folder: str | Path, dim: int, fingerprint: Mapping[str, Any], shard_rows: int = _SHARD_ROWS) -> AtomStore:
        """Make an empty store, at once or not at all.

        Args:
            folder: Its folder, which does not exist or is empty.
            dim: Dimension of the vectors.
            fingerprint: Everything that the vectors depend on, as plain data.
            shard_rows: Rows of a file.

        Raises:
            FileExistsError: Something is in the folder.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        manifest = {"format": _FORMAT, "dim": dim, "dtype": "float16", "shard_rows": shard_rows, "fingerprint": dict(fingerprint)}
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            np.zeros((1, dim), "<f2").tofile(partial / _shard(0))
            with closing(sqlite3.connect(partial / "index.sqlite")) as index:
                index.execute("CREATE TABLE atoms (row INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, text TEXT NOT NULL)")
            partial.chmod(0o755)
            partial.rename(folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if folder.exists():
                raise FileExistsError(f"{folder} is not empty: open it if it is a store, or name another folder.") from error
            raise
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, fingerprint: Mapping[str, Any] | None = None) -> AtomStore:
        """Open a store.

        Args:
            folder: Its folder.
            fingerprint: Fingerprint that it must have. ``None``: any.

        Raises:
            FileNotFoundError: There is no store.
            ValueError: It is damaged, or has another fingerprint.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no store of atoms: build one with `zoo store build -c CONFIG`.")
        try:
            manifest = json.loads(path.read_text())
            dim, shard_rows, own = int(manifest["dim"]), int(manifest["shard_rows"]), dict(manifest["fingerprint"])
            if manifest["format"] != _FORMAT or manifest["dtype"] != "float16" or min(dim, shard_rows) < 1:
                raise ValueError(f"its format is not {_FORMAT}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete the folder and build the store again.") from error
        if fingerprint is not None and own != json.loads(json.dumps(dict(fingerprint))):
            names = [name for name in {**own, **fingerprint} if own.get(name) != fingerprint.get(name)]
            has, wants = (", ".join(f"{name}={str(each.get(name))[:24]}" for name in names[:3]) for each in (own, fingerprint))
            raise ValueError(f"{folder} holds vectors of {has}, and those of {wants} are needed: name another folder.")
        return cls(folder, dim, own, shard_rows)

    def __len__(self) -> int:
        """Number of texts; row 0 is none of them."""
        return self._ask("SELECT COALESCE(MAX(row), 0) FROM atoms")[0][0]

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Distinct texts that have no row, in their order."""
        keys = {_key(text): text for text in texts if text}
        found = self._find(keys)
        return [text for key, text in keys.items() if key not in found]

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of texts, int64 (N,); that of the empty text is 0.

        Raises:
            KeyError: A text is missing.
        """
        keys = [_key(text) for text in texts]
        found = {_key(""): 0, **self._find(keys)}
        if unknown := next((text for text, key in zip(texts, keys, strict=True) if key not in found), None):
            raise KeyError(f"{self.folder} has no row for {unknown[:80]!r}: append it first.")
        return np.array([found[key] for key in keys], dtype=np.int64)

    def append(self, texts: Sequence[str], vectors: Tensor | np.ndarray) -> np.ndarray:
        """Add texts, all or none; those that have a row keep it.

        Args:
            texts: N texts, normalised.
            vectors: Their vectors (N, D).

        Returns:
            Rows of the texts, int64 (N,).

        Raises:
            ValueError: A text is empty or white space, or vectors have another shape or are not finite as float16.
            BlockingIOError: Another process appends.
            OSError: The disk is full or broken; the store is as it was.
        """
        if blank := [place for place, text in enumerate(texts) if not text.strip()]:
            raise ValueError(
                f"{len(blank)} of {len(texts)} texts are only white space (the first is number {blank[0]}): drop them."
            )
        with np.errstate(over="ignore"):
            vector_ND = np.asarray(torch.as_tensor(vectors).detach().cpu().to(torch.float16)).astype("<f2")
        if vector_ND.shape != (len(texts), self.dim) or not np.isfinite(vector_ND).all():
            raise ValueError(
                f"{self.folder} takes finite float16 vectors of shape ({len(texts)}, {self.dim}); given are some of shape"
                f" {vector_ND.shape} with {int((~np.isfinite(vector_ND)).sum())} values that are not finite."
            )
        keys = [_key(text) for text in texts]
        with closing(self._index()) as index:
            try:
                index.execute("PRAGMA busy_timeout = 0")
                index.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise BlockingIOError(f"{self.folder}: another process appends ({error}): wait until it has finished.") from error
            index.execute(f"PRAGMA busy_timeout = {int(_WAIT * 1000)}")
            self._map()
            end, known = self._num_rows, self._find(keys)
            places = list({key: place for place, key in enumerate(keys) if key not in known}.values())
            try:
                self._write_rows(end, vector_ND[places])
                named = ((row, keys[place], texts[place]) for row, place in enumerate(places, end))
                index.executemany("INSERT INTO atoms VALUES (?, ?, ?)", named)
                index.execute("COMMIT")
            except (OSError, sqlite3.OperationalError) as error:
                with suppress(OSError):
                    self._cut(end)
                raise OSError(
                    f"{self.folder}: {len(places)} rows could not be written ({error}): the store is as it was; make room on the"
                    " disk and append again."
                ) from error
        self._map()
        return self.rows(texts)

    def read(self, rows: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Vectors of rows.

        Args:
            rows: Integers (...).
            out: float16 (..., D) on the CPU, contiguous, to read into. ``None``: a new tensor.

        Returns:
            float16 (..., D).

        Raises:
            IndexError: A row does not exist.
        """
        row_N = np.asarray(rows).reshape(-1)
        if out is None:
            out = torch.empty((*rows.shape, self.dim), dtype=torch.float16)
        if not row_N.size:
            return out
        out_ND = out.view(-1, self.dim).numpy()
        low, high = int(row_N.min()), int(row_N.max())
        if high >= self._num_rows:
            self._map()  # another process may have appended
        if low < 0 or high >= self._num_rows:
            raise IndexError(f"{self.folder} has the rows 0 to {self._num_rows - 1}, not {low if low < 0 else high}.")
        # The bounds are checked: without "raise", numpy needs no buffer.
        if len(self._shards) == 1:
            np.take(self._shards[0], row_N, axis=0, out=out_ND, mode="clip")
            return out
        shard_N = row_N // self._shard_rows
        for shard in np.unique(shard_N).tolist():
            place = np.flatnonzero(shard_N == shard)
            out_ND[place] = self._shards[shard].take(row_N[place] - shard * self._shard_rows, axis=0, mode="clip")
        return out

    def verify(self) -> int:
        """Check that index and rows belong together and all values are finite; returns the number of texts.

        Raises:
            ValueError: Something is damaged.
        """
        self._map()
        atoms = enumerate(self._ask("SELECT row, key, text FROM atoms ORDER BY row"), start=1)
        wrong = next((number for number, (row, key, text) in atoms if row != number or key != _key(text)), None)
        damage = None if wrong is None else f"row {wrong} of the index has another number or another text"
        for number, shard_ND in enumerate(self._shards):
            finite_N = np.isfinite(shard_ND).all(axis=1)
            if not finite_N.all():
                damage = f"row {number * self._shard_rows + int(np.argmin(finite_N))} is not finite"
        if self._shards[0][0].any():
            damage = "row 0 is not zeros"
        if damage:
            raise self._damaged(damage)
        return self._num_rows - 1

    def stats(self) -> dict[str, Any]:
        """Numbers of texts, characters and shards, bytes of rows and index, and the fingerprint."""
        return {
            "texts": len(self),
            "characters": self._ask("SELECT COALESCE(SUM(LENGTH(text)), 0) FROM atoms")[0][0],
            "shards": len(self._shards),
            "vector_bytes": sum(path.stat().st_size for path in self.folder.glob("vectors-*.f16")),
            "index_bytes": (self.folder / "index.sqlite").stat().st_size,
            "fingerprint": self.fingerprint,
        }

    def _index(self) -> sqlite3.Connection:
        """A connection of its own for each use, which no fork and no thread shares."""
        path = (self.folder / "index.sqlite").absolute()
        return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=_WAIT, isolation_level=None)

    def _ask(self, question: str, values: Sequence[bytes] = ()) -> list[Any]:
        try:
            with closing(self._index()) as index:
                return index.execute(question, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._damaged(f"index.sqlite: {error}") from error

    def _find(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Rows of those keys that are there."""
        asked = list(keys)
        found: dict[bytes, int] = {}
        for start in range(0, len(asked), _ASKED):
            part = asked[start : start + _ASKED]
            found |= dict(self._ask(f"SELECT key, row FROM atoms WHERE key IN ({', '.join('?' * len(part))})", part))
        return found

    def _map(self) -> None:
        """Map the rows that the index names."""
        self._num_rows = len(self) + 1
        self._shards: list[np.ndarray] = []
        for start in range(0, self._num_rows, self._shard_rows):
            path = self.folder / _shard(len(self._shards))
            shape = (min(self._shard_rows, self._num_rows - start), self.dim)
            size = path.stat().st_size if path.is_file() else 0
            if size < 2 * shape[0] * self.dim:
                raise self._damaged(f"{path.name} has {size} bytes, its rows {2 * shape[0] * self.dim}")
            self._shards.append(np.memmap(path, "<f2", "r", shape=shape).view(np.ndarray))

    def _write_rows(self, row: int, vector_ND: np.ndarray) -> None:
        """Write rows behind those that are there, and sync them to the disk."""
        while len(vector_ND):
            shard, place = divmod(row, self._shard_rows)
            part_ND = vector_ND[: self._shard_rows - place]
            # The name of a new file is synced with that of SQLite's journal, which is made later in the same folder.
            with (self.folder / _shard(shard)).open("r+b" if place else "wb") as file:
                file.seek(2 * place * self.dim)
                file.write(part_ND.tobytes())
                file.flush()
                os.fsync(file.fileno())
            row, vector_ND = row + len(part_ND), vector_ND[len(part_ND) :]

    def _cut(self, row: int) -> None:
        """Take back what lies behind the rows that are there."""
        for number, path in enumerate(sorted(self.folder.glob("vectors-*.f16"))):
            kept = row - number * self._shard_rows
            if kept <= 0:
                path.unlink()
            else:
                os.truncate(path, 2 * min(kept, self._shard_rows) * self.dim)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.folder} is damaged ({what}): delete the folder and build the store again.")


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _shard(number: int) -> str:
    return f"vectors-{number:05d}.f16"
