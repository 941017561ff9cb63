"""Text of the letters a to z and the space, as ids; the files that hold it; and a user's lines with gaps.

Shape suffixes: N characters of a text, S lines, L characters of a window.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["ALPHABET", "decode", "encode", "read_converted", "read_lines_with_gaps", "read_text8"]

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
"""The character of each id: the space is 0, a to z are 1 to 26."""

_FOREIGN = 255
_ID_OF_BYTE = np.full(256, _FOREIGN, dtype=np.uint8)
_ID_OF_BYTE[list(ALPHABET.encode())] = np.arange(len(ALPHABET))
_BYTE_OF_ID = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)


def encode(text: bytes | str, source: str = "the text") -> Tensor:
    """Characters as ids.

    Args:
        text: Characters of :data:`ALPHABET`.
        source: Its name in the error.

    Returns:
        uint8 (N,).

    Raises:
        ValueError: A character is not of the alphabet; the first one is named, with its place.
    """
    raw = text.encode() if isinstance(text, str) else text
    ids = _ID_OF_BYTE[np.frombuffer(raw, dtype=np.uint8)]
    foreign = ids == _FOREIGN
    if foreign.any():
        place = int(foreign.argmax())
        character = raw[place : place + 4].decode(errors="replace")[0]
        raise ValueError(
            f"{source} holds the character {character!r} at position {place} (counted in bytes from 0), and "
            f"{int(foreign.sum())} bytes in all that are neither a to z nor space: write it in these characters only."
        )
    return torch.from_numpy(ids)


def decode(ids: Tensor) -> str:
    """Ids (N,), integers from 0 to 26, as characters.

    Example:
        >>> decode(torch.tensor([1, 0, 26]))
        'a z'
    """
    return _BYTE_OF_ID[ids.cpu().numpy()].tobytes().decode()


def read_text8(path: Path, num_characters: int) -> Tensor:
    """Read the official file ``text8``, plain or zipped.

    Args:
        path: The file; ``.zip`` is opened as an archive with one member ``text8``.
        num_characters: Number of characters that it must hold.

    Returns:
        Ids uint8 (N,).

    Raises:
        ValueError: The archive is broken or is another one, the size is wrong, or a character is foreign.
    """
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                raw = archive.read("text8")
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise ValueError(f"{path} is not the official text8.zip ({error}): download it again.") from error
    else:
        raw = path.read_bytes()
    if len(raw) != num_characters:
        raise ValueError(
            f"{path} holds {len(raw):,} characters, and text8 has {num_characters:,}: the download may have been cut off; "
            f"fetch it again."
        )
    return encode(raw, str(path))


def read_converted(path: Path, num_characters: int) -> Tensor:
    """Read a part of text8 converted to ids, as the published BFN code stores it: uint16, little-endian, no header.

    Args:
        path: ``train.bin``, ``val.bin`` or ``test.bin``.
        num_characters: Number of ids that it must hold.

    Returns:
        Ids uint8 (N,).

    Raises:
        ValueError: The size is wrong, or an id is larger than 26.
    """
    size = path.stat().st_size
    if size != 2 * num_characters:
        raise ValueError(
            f"{path} holds {size:,} bytes, and this part of text8 has {num_characters:,} ids of 2 bytes: convert it again, "
            f"or give the folder of the official file text8."
        )
    ids = np.fromfile(path, dtype="<u2")
    foreign = ids >= len(ALPHABET)
    if foreign.any():
        place = int(foreign.argmax())
        raise ValueError(
            f"{path} holds the id {ids[place]} at position {place} (counted from 0), and ids go from 0 (space) to "
            f"{len(ALPHABET) - 1} (z): it is no converted text8."
        )
    return torch.from_numpy(ids.astype(np.uint8))


def read_lines_with_gaps(path: Path, seq_len: int, unknown: str) -> tuple[Tensor, Tensor]:
    """Read a user's text in which characters are to be filled in, one sample a line.

    Args:
        path: UTF-8 file of lines of a to z, space, and the character ``unknown``.
        seq_len: Characters L of a sample; shorter lines are continued with unknown characters.
        unknown: Character that stands for one to fill in.

    Returns:
        Ids uint8 (S, L), 0 where unknown; and bool (S, L), true where a character is known.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file holds no line or is not UTF-8; a line is too long, or holds another character.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The text to fill in, {path}, does not exist: give a file with one sample a line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as plain text.") from error
    if lines[-1] == "":
        lines.pop()  # the end of the last line starts no other
    if not lines:
        raise ValueError(f"{path} is empty: write one sample a line, with {unknown} for each character to fill in.")
    for number, line in enumerate(lines, start=1):
        if len(line) > seq_len:
            raise ValueError(
                f"{path}, line {number} has {len(line)} characters, more than seq_len={seq_len}: shorten or divide it."
            )
        for column, character in enumerate(line, start=1):
            if character not in ALPHABET and character != unknown:
                advice = (
                    f"write {character.lower()!r} instead"
                    if character.lower() in ALPHABET
                    else f"only a to z, space, and {unknown!r} for what is to be filled in are possible"
                )
                raise ValueError(f"{path}, line {number}, column {column} holds {character!r}: {advice}.")
    full = [line.ljust(seq_len, unknown) for line in lines]
    ids = torch.stack([encode(line.replace(unknown, " ")) for line in full])
    known = torch.tensor([[character != unknown for character in line] for line in full])
    return ids, known
