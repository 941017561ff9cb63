"""Checkpoints that are folders of shards, of PaRO and of Lightning's own strategies, read without running what they hold."""

import pickle
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.serialization import safe_globals

from zoo.base.checkpoint import read_plain

__all__ = ["ShardReader", "check_folder"]

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_METADATA, name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip
_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaleProfile",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Refused(Exception):
    """A pickle names something that is not metadata of tensors."""


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, text and metadata of tensors; anything else that a file names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module.split(".")[0] == "pathlib" and name in ("Path", "PosixPath", "WindowsPath"):  # place of the save
            return PurePath
        raise _Refused(f"{module}.{name}")


class _PlainPlanner(DefaultLoadPlanner):
    """Reads entries that are not tensors as plain data, where torch would unpickle them."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        try:
            torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _Refused(f"an object as {read_item.dest_index.fqn}") from error


class ShardReader(FileSystemReader):
    """Reader of ``torch.distributed.checkpoint`` for folders from anywhere.

    torch unpickles ``.metadata`` and all entries that are not tensors, which may run code. Here both are checked before anything
    else is read, so that every later reader of the same folder is safe too.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        super().__init__(folder)
        self._checked: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, shapes and places of the tensors; read once.

        Raises:
            ValueError: The folder names anything but metadata of tensors and plain data, or is damaged.
        """
        if self._checked is None:
            path = Path(self._get_metadata_path(kwargs.get("rank")))
            try:
                with path.open("rb") as file:
                    metadata = _MetadataUnpickler(file).load()
                self._check_bytes(metadata)
            except _Refused as error:
                raise ValueError(
                    f"{path} was refused: it names {str(error)[:80]}, which is not a tensor or plain data and could run code when"
                    " loaded; ask its author for a safetensors file, or write the checkpoint again."
                ) from error
            except FileNotFoundError:
                raise
            except Exception as error:  # a damaged pickle may raise anything
                raise ValueError(f"{path} is damaged or of another format ({type(error).__name__}): use another one.") from error
            self._checked = metadata
        return self._checked

    def _check_bytes(self, metadata: Metadata) -> None:
        names = [name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]
        places, zero = [MetadataIndex(name) for name in names], torch.Size([0])
        self.set_up_storage_reader(metadata, is_coordinator=True)
        items = [ReadItem(LoadItemType.BYTE_IO, place, zero, place, zero, zero) for place in places]
        self.read_data(LoadPlan(items), _PlainPlanner())


def check_folder(folder: str | PathLike[str]) -> None:
    """Refuse a folder of shards whose files could run code when Lightning's own strategies read it.

    Args:
        folder: A checkpoint of PaRO, of FSDP or ModelParallel, or of DeepSpeed.

    Raises:
        ValueError: A file holds something that is neither a tensor nor plain data.
    """
    folder = Path(folder)
    for path in folder.glob("*.metadata"):  # of all ranks, or of one: __0.metadata
        number = path.name.removesuffix(".metadata").removeprefix("__")
        ShardReader(folder).read_metadata(rank=number or None)
    latest = folder / "latest"
    if latest.exists() and not (folder / latest.read_text().strip()).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{latest} was refused: it names a folder outside of the checkpoint; let it name one inside.")
    with safe_globals([(type(name, (_StandIn,), {}), name) for name in _DEEPSPEED]):
        for path in sorted(folder.rglob("*.pt")):
            read_plain(path, mmap=True)


class _StandIn:
    """Any of DeepSpeed's own objects, which hold numbers."""

    def __init__(self, *args: Any) -> None:
        pass
