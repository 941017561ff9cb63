"""Ids of documents on disk, memory-mapped: the files ``NAME.bin`` of language data.

==================  ==========================================================================================================
``NAME.bin``        the ids of all documents, one after another, little-endian, no header; each document ends with the eos id
``NAME.idx.npy``    where each document ends: int64 (documents,), ascending, counted in ids; the eos belongs to its document
``NAME.json``       ``dtype`` (``uint16`` or ``int32``), ``num_tokens``, ``num_documents``, ``vocab_size``, ``eos_id``,
                    ``max_id``, ``tokenizer`` (fingerprint) and ``sha256`` of the ids
==================  ==========================================================================================================

:func:`write_token_file` writes the three. Files of other programs may come without the last two: then ids are ``uint16`` where
the tokenizer's vocabulary fits, else ``int32``; every eos ends a document; and the ids are read once to be checked.

Shape suffixes: N ids, D documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.text.tokenizer import Tokenizer

__all__ = ["TokenFile", "open_token_file", "write_token_file"]

_BLOCK = 1 << 24


class TokenFile:
    """A stretch of whole documents of a ``.bin`` file.

    Args:
        path: The file.
        dtype: Type of its ids.
        ends: End of each document, int64 (D,), counted from ``begin``.
        begin: Beginning of the first document, counted in ids of the file.
    """

    def __init__(self, path: Path, dtype: str, ends: np.ndarray, begin: int = 0) -> None:
        self.path = path
        self.dtype = dtype
        self.ends = ends
        self.begin = begin

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def tokens(self) -> np.ndarray:
        """The ids (N,), on disk until they are asked for."""
        if not len(self):
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.path, self.dtype, mode="r")[self.begin : self.begin + len(self)]

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked opens the file itself, instead of being sent the ids.
        return {name: value for name, value in vars(self).items() if name != "tokens"}

    def split(self, share: float) -> tuple[TokenFile, TokenFile]:
        """Take whole documents from the end.

        Args:
            share: Share of the ids that the second part has at least, if there are two documents or more; 0: none.

        Returns:
            What remains, and what was taken.
        """
        if not share or len(self.ends) < 2:
            return self, TokenFile(self.path, self.dtype, self.ends[:0])
        kept = int(np.searchsorted(self.ends, (1 - share) * len(self), side="right"))
        kept = min(max(kept, 1), len(self.ends) - 1)
        middle = int(self.ends[kept - 1])
        rest = TokenFile(self.path, self.dtype, self.ends[kept:] - middle, self.begin + middle)
        return TokenFile(self.path, self.dtype, self.ends[:kept], self.begin), rest

    def num_bytes(self, token_bytes: np.ndarray) -> int:
        """Bytes of text that the ids stand for.

        Args:
            token_bytes: Bytes of each id, int64 (vocabulary,).
        """
        return sum(int(token_bytes[self.tokens[start : start + _BLOCK]].sum()) for start in range(0, len(self), _BLOCK))


def write_token_file(path: Path, documents: Iterable[Iterable[int] | np.ndarray], tokenizer: Tokenizer) -> TokenFile:
    """Write a ``.bin`` file and what belongs beside it; an interrupted call leaves no ``.bin`` that is not whole.

    The ids are written to ``NAME.bin.partial``; a file of before stays until they are all there.

    Args:
        path: Name of the file, ending in ``.bin``.
        documents: Ids of each document, without eos, which is added.
        tokenizer: Whose ids they are.

    Returns:
        The file.

    Raises:
        ValueError: The name ends otherwise, or an id is not of the vocabulary.

    Example:
        >>> import tempfile
        >>> from datamodules.text.tokenizer import ByteTokenizer
        >>> tokenizer = ByteTokenizer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = write_token_file(Path(folder, "two.bin"), map(tokenizer.encode, ["ab", "c"]), tokenizer)
        ...     file.tokens.tolist(), file.ends.tolist()
        ([97, 98, 257, 99, 257], [3, 5])
    """
    if path.suffix != ".bin":
        raise ValueError(f"{path} must end in .bin.")
    facts_path, ends_path = _beside(path)
    partial = path.with_name(f"{path.name}.partial")
    dtype = _dtype(tokenizer.vocab_size)
    sha, ends, place, largest = hashlib.sha256(), [], 0, 0
    with partial.open("wb") as file:
        for number, document in enumerate(documents):
            ids = np.asarray(document if isinstance(document, np.ndarray) else list(document), dtype=np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                foreign = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
                raise ValueError(f"Document {number} holds the id {foreign}; the vocabulary has {tokenizer.vocab_size} ids.")
            largest = max(largest, int(ids.max(initial=0)), tokenizer.eos_id)
            raw = np.append(ids, tokenizer.eos_id).astype(dtype).tobytes()
            file.write(raw)
            sha.update(raw)
            place += len(ids) + 1
            ends.append(place)
    path.unlink(missing_ok=True)  # what is written beside it now is not of a file of before
    np.save(ends_path, np.asarray(ends, dtype=np.int64))
    facts = {
        "dtype": str(np.dtype(dtype)),
        "num_tokens": place,
        "num_documents": len(ends),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "max_id": largest,
        "tokenizer": tokenizer.fingerprint,
        "sha256": sha.hexdigest(),
    }
    facts_path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return TokenFile(path, dtype, np.asarray(ends, dtype=np.int64))


def open_token_file(path: Path, tokenizer: Tokenizer) -> tuple[TokenFile, str]:
    """Open a ``.bin`` file and check that it fits.

    Args:
        path: The file.
        tokenizer: Whose ids they should be.

    Returns:
        The file, and the SHA-256 of its ids.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is empty or cut off, or written with another tokenizer; an id is not of the vocabulary; the document
            ends do not fit; a document does not end with eos.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file of ids, as datamodules.text.token_files describes.")
    facts_path, ends_path = _beside(path)
    facts = json.loads(facts_path.read_text(encoding="utf-8")) if facts_path.is_file() else {}
    if facts.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ValueError(
            f"{path} was written with another tokenizer ({facts['vocab_size']} ids, {facts['tokenizer'][:12]}) than this "
            f"run's ({tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}): write it again, or set `tokenizer`."
        )
    dtype = {"uint16": "<u2", "int32": "<i4"}.get(facts.get("dtype", ""), _dtype(tokenizer.vocab_size))
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if not size or size % width or facts.get("num_tokens", size // width) != size // width:
        expected = f"{facts['num_tokens']:,} ids of {width} bytes" if facts else f"some ids of {width} bytes"
        raise ValueError(f"{path} has {size:,} bytes, and should hold {expected}: it is empty or cut off, write it again.")
    tokens = np.memmap(path, dtype, mode="r")
    max_id, sha = facts.get("max_id"), facts.get("sha256")
    if max_id is None or sha is None:
        max_id, sha = _scan(tokens)
    if max_id >= tokenizer.vocab_size:
        raise ValueError(
            f"{path} holds the id {max_id}, and the tokenizer has ids from 0 to {tokenizer.vocab_size - 1}: it is of another "
            f"tokenizer."
        )
    if ends_path.is_file():
        ends = np.load(ends_path).astype(np.int64)
        if ends.ndim != 1 or not len(ends) or ends[0] < 1 or (np.diff(ends) < 1).any() or ends[-1] != len(tokens):
            raise ValueError(f"The document ends in {ends_path} do not ascend to the {len(tokens):,} ids of {path.name}.")
        if (wrong := np.flatnonzero(tokens[ends - 1] != tokenizer.eos_id)).size:
            raise ValueError(
                f"{wrong.size} of {len(ends)} documents of {path} do not end with the eos id {tokenizer.eos_id}, first the one "
                f"that ends at {int(ends[wrong[0]])}: write it again with "
                f"datamodules.text.token_files.write_token_file, which adds it."
            )
    else:
        ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
        if not len(ends) or ends[-1] != len(tokens):
            raise ValueError(
                f"{path} has no {ends_path.name} beside it and does not end with the eos id {tokenizer.eos_id}, which should "
                f"end each document: write it with datamodules.text.token_files.write_token_file."
            )
    return TokenFile(path, dtype, ends), sha


def _scan(tokens: np.ndarray) -> tuple[int, str]:
    """The largest id, and the SHA-256 of all."""
    sha, largest = hashlib.sha256(), 0
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        sha.update(block.tobytes())
        largest = max(largest, int(block.view(f"<u{block.itemsize}").max()))  # negative ones are huge then
    return largest, sha.hexdigest()


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<i4"


def _beside(path: Path) -> tuple[Path, Path]:
    """Paths of the facts and of the documents' ends."""
    return path.with_suffix(".json"), path.with_suffix(".idx.npy")
