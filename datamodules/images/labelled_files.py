"""A labelled list of picture files, small in memory, and how they are read."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, Self

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.functional import pil_to_tensor

from datamodules.images.center_crop import center_crop

__all__ = ["LabelledFiles", "read_rgb"]

_NAMED = 5
"""Number of files that a message names."""
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
"""Errors of Pillow on damaged files."""

_logger = logging.getLogger(__name__)


def read_rgb(path: str | Path, size: int) -> Tensor:
    """Read a picture as RGB, cut as `center_crop` does.

    Grey, palette and CMYK pictures are converted, an alpha channel is left out; a camera's note on orientation is not
    followed, as in the published preparation of ImageNet.

    Args:
        path: A file in a format that Pillow reads.
        size: Height and width to return.

    Returns:
        uint8 (3, size, size).

    Raises:
        ValueError: The file cannot be read, is damaged, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")
            transparent = opened.mode == "P" and opened.has_transparency_data
            picture = (opened.convert("RGBA") if transparent else opened).convert("RGB")
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is not a readable picture ({error}): replace it, take it out of the folder, or set on_error: skip."
        ) from error
    return pil_to_tensor(center_crop(picture, size))


class LabelledFiles:
    """The pictures of a folder of class folders, sorted by class and name.

    A million names as Python objects would be copied into every loading process; here they are one string of bytes.
    Which files could not be read is noted in shared memory, so that it is known in the main process too.

    Args:
        folder: The folder.
        classes: Names of the classes in the order of their labels.
        names: Files, relative to ``folder``.
        labels: int64 (N,).

    Attributes:
        labels: int64 (N,).
        unreadable: bool (N,), true for files that were met and could not be read.
    """

    def __init__(self, folder: Path, classes: Sequence[str], names: Sequence[str], labels: Tensor) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.folder = folder
        self.classes = classes
        self.labels = labels
        self.unreadable = torch.zeros(len(encoded), dtype=torch.bool).share_memory_()
        self._names = b"".join(encoded)
        self._ends = torch.tensor([0, *accumulate(map(len, encoded))])

    @classmethod
    def find(cls, folder: Path, classes: Sequence[str], found: Sequence[str]) -> Self:
        """List the pictures of a folder.

        Args:
            folder: The folder.
            classes: Names of the classes in the order of their labels.
            found: The class folders to read, all of them among ``classes``. Pictures may lie in folders below; files
                that are no pictures by their suffix are not looked at.

        Raises:
            FileNotFoundError: A class folder holds no picture.
        """
        label_of = {name: label for label, name in enumerate(classes)}
        files = make_dataset(str(folder), {name: label_of[name] for name in found}, IMG_EXTENSIONS, allow_empty=True)
        labels = torch.tensor([label for _, label in files], dtype=torch.long)
        counts = labels.bincount(minlength=len(classes))
        if empty := [name for name in found if not counts[label_of[name]]]:
            raise FileNotFoundError(
                f"{_listed([str(folder / name) for name in empty])} {'hold' if len(empty) > 1 else 'holds'} no picture "
                f"({', '.join(IMG_EXTENSIONS)}): put the pictures of the class there, or remove the folder."
            )
        return cls(folder, classes, [os.path.relpath(path, folder) for path, _ in files], labels)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The file of a picture."""
        start, end = self._ends[index : index + 2].tolist()
        return str(self.folder / os.fsdecode(self._names[start:end]))

    def subset(self, indices: Tensor) -> Self:
        """Some of the pictures.

        Args:
            indices: int64 (M,), in increasing order.
        """
        starts, ends = self._ends[indices].tolist(), self._ends[indices + 1].tolist()
        names = [os.fsdecode(self._names[start:end]) for start, end in zip(starts, ends, strict=True)]
        return type(self)(self.folder, self.classes, names, self.labels[indices])

    def read(self, indices: list[int], size: int, on_error: Literal["raise", "skip"]) -> tuple[list[int], Tensor]:
        """Read pictures.

        Args:
            indices: Numbers of the pictures.
            size: Height and width to return.
            on_error: Treatment of a picture that cannot be read: raise, or leave it out, note and log it.

        Returns:
            The indices of those that were read, and the pictures, uint8 (B, 3, size, size).

        Raises:
            ValueError: A picture cannot be read and ``on_error`` is ``"raise"``, or none of them can.
        """
        kept, images = [], []
        for index in indices:
            try:
                images.append(read_rgb(self.path(index), size))
                kept.append(index)
            except ValueError as error:
                if on_error == "raise":
                    raise
                self._note(index, error)
        if not images:
            raise ValueError(
                f"None of the {len(indices)} picture(s) of a batch can be read, {_listed([self.path(i) for i in indices])}: "
                "take these files out of the folder, or raise batch_size."
            )
        return kept, torch.stack(images)

    def skipped(self) -> str | None:
        """One sentence on the files that were left out so far: how many, and the first; ``None`` if there are none."""
        indices = self.unreadable.nonzero().squeeze(1).tolist()
        if not indices:
            return None
        names = _listed([self.path(index) for index in indices[:_NAMED]], len(indices))
        return f"{len(indices)} of {len(self)} pictures of {self.folder} could not be read and were left out: {names}."

    def _note(self, index: int, error: ValueError) -> None:
        if not self.unreadable[index]:
            self.unreadable[index] = True
            if self.unreadable.sum() <= _NAMED:
                _logger.warning("Left out: %s", error)


def _listed(names: list[str], total: int | None = None) -> str:
    more = (len(names) if total is None else total) - len(names[:_NAMED])
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more else "")
