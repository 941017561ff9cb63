"""The official file formats of MNIST and CIFAR-10, read without running anything that a file holds."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["cifar_folder", "find_idx", "read_cifar", "read_idx"]

_CIFAR_RECORD = 1 + 3 * 32 * 32


def find_idx(folders: list[Path], name: str) -> Path | None:
    """Find an idx file as it is distributed: gzipped or not, ``name-idx3-ubyte`` or ``name.idx3-ubyte``.

    Args:
        folders: Folders to search, in order.
        name: Official name without ``.gz``, for example ``train-images-idx3-ubyte``.

    Returns:
        The file, or ``None``.
    """
    names = (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz")
    return next((path for folder in folders for spelled in names if (path := folder / spelled).is_file()), None)


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an idx file of bytes, gzipped or not (the format is described on the home page of MNIST).

    Args:
        path: The file.
        dims: Number of dimensions it must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of the shape that the file's head states.

    Raises:
        ValueError: The file is cut short or has another head; it is named.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again.") from error
    magic = bytes((0, 0, 8, dims))
    if content[:4] != magic:
        raise ValueError(
            f"{path} is not an idx file of bytes with {dims} dimension(s): it starts with "
            f"{content[:4].hex() or 'nothing'} instead of {magic.hex()}."
        )
    head = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", content[4:head]) if len(content) >= head else (1,)
    if len(content) != head + math.prod(shape):
        raise ValueError(
            f"{path} is truncated: it holds {len(content)} bytes instead of {head + math.prod(shape)}; fetch it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[head:].reshape(shape)


def cifar_folder(root: Path) -> Path | None:
    """The folder with CIFAR-10's batches in or at ``root``: the binary version is preferred to the pickled one."""
    candidates = [root / "cifar-10-batches-bin", root, root / "cifar-10-batches-py"]
    return next((path for path in candidates for name in ("test_batch.bin", "test_batch") if (path / name).is_file()), None)


def read_cifar(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read the training or test set of CIFAR-10.

    Args:
        folder: ``cifar-10-batches-bin`` (records of a label byte and 3072 pixel bytes) or ``cifar-10-batches-py``
            (pickles, of which only containers and numpy arrays are admitted).
        train: The five training batches, or the test batch.

    Returns:
        Images uint8 (N, 3, 32, 32) and labels int64 (N,).

    Raises:
        FileNotFoundError: A batch is missing.
        ValueError: A batch is cut short, has another layout, or holds code.
    """
    binary = (folder / "test_batch.bin").is_file()
    names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    read: Callable[[Path], tuple[Tensor, Tensor]] = _read_binary_batch if binary else _read_pickled_batch
    parts = []
    for name in names:
        path = folder / (f"{name}.bin" if binary else name)
        if not path.is_file():
            raise FileNotFoundError(f"CIFAR-10's file {path} is missing: unpack the whole official archive there.")
        images, labels = read(path)
        if labels.numel() and labels.max() > 9:
            raise ValueError(f"{path} has label {int(labels.max())}, CIFAR-10 has 0 to 9: it is another data set.")
        parts.append((images, labels))
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _read_binary_batch(path: Path) -> tuple[Tensor, Tensor]:
    content = bytearray(path.read_bytes())
    if not content or len(content) % _CIFAR_RECORD:
        raise ValueError(
            f"{path} is truncated: {len(content)} bytes are no whole number of records of {_CIFAR_RECORD} bytes; fetch it again."
        )
    records = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, _CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).clone(), records[:, 0].long()


def _read_pickled_batch(path: Path) -> tuple[Tensor, Tensor]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(
            f"{path} was refused: it names {error}, and only containers and numpy arrays are admitted; use the "
            f"official binary version (cifar-10-binary.tar.gz)."
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again.") from error
    data, labels = (batch.get(b"data"), batch.get(b"labels")) if isinstance(batch, dict) else (None, None)
    if not isinstance(data, np.ndarray) or not isinstance(labels, list) or data.shape != (len(labels), _CIFAR_RECORD - 1):
        raise ValueError(f"{path} is not a batch of CIFAR-10: it lacks `data` (N, 3072) or as many `labels`.")
    return torch.from_numpy(data.astype(np.uint8).reshape(-1, 3, 32, 32)), torch.tensor(labels, dtype=torch.int64)


class _Refused(Exception):
    """A pickle names something else than a container or an array."""


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, strings and numpy arrays; anything else that a file names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return np.zeros(0).__reduce__()[0]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise _Refused(f"{module}.{name}")
