"""Read checkpoints safely, and say in one sentence what is wrong with one that does not fit."""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from zoo.base.shared_folder import CONFIG_FILE, WEIGHTS_FILE, fetch_repository, is_pretrained_folder

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "as_new_files_are",
    "check_weights",
    "fetch_repository",
    "is_pretrained_folder",
    "read_checkpoint",
    "read_plain",
    "read_pretrained",
    "refuse_text",
    "take_types",
    "write_pretrained",
]


def as_new_files_are(path: Path) -> None:
    """Give a file the permissions that the user's new files have; safetensors makes files that nobody else can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a Lightning ``.ckpt`` with ``weights_only=True``: tensors and plain data, never code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds code or foreign objects, is damaged, or is no Lightning checkpoint.
    """
    checkpoint = read_plain(path, map_location)
    for key in ("state_dict", "pytorch-lightning_version"):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise ValueError(
                f"{path} is not a Lightning checkpoint (it has no {key}): give the file that the Trainer wrote; convert"
                " officially released weights with `zoo convert FILE FOLDER --config NAME`."
            )
    return checkpoint


def read_plain(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a file of ``torch.save`` or a ``.safetensors`` file: tensors and plain data, never code.

    Args:
        path: the file.
        map_location: where tensors go.
        mmap: leave tensors of ``torch.save`` on the disk until they are used; files of torch before 1.6 are read at once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds code or foreign objects, is damaged, or is text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    refuse_text(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(map_location))
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        culprit = next(iter(str(error).partition("GLOBAL ")[2].split()), "an object")
        raise ValueError(
            f"{path} holds {culprit}, which is not a tensor or plain data and could run code when loaded, so it was refused:"
            " ask its author for a safetensors file or folder (save_pretrained), or save it again as tensors and plain data."
        ) from error
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or is not a checkpoint ({type(error).__name__}): use an earlier one.") from error


def read_pretrained(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a safetensors folder: its configuration and its weights.

    Raises:
        FileNotFoundError: ``config.json`` or ``model.safetensors`` is missing.
        ValueError: one of them is damaged.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a pretrained folder: {name} is missing in it.")
    refuse_text(folder / WEIGHTS_FILE)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        weights = load_file(folder / WEIGHTS_FILE)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {error}.") from error
    if "_class_path" not in config:
        raise ValueError(f"{folder / CONFIG_FILE} names no class (_class_path): it was not written by save_pretrained.")
    return config, weights


def write_pretrained(module: nn.Module, folder: Path, config: Mapping[str, Any], half: bool = False) -> Path:
    """Write a safetensors folder, as `read_pretrained` reads it.

    Args:
        module: the weights.
        folder: made if missing.
        config: for ``config.json``.
        half: store float32 weights in float16, and say so in ``config.json`` (``_half``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "_half": True} if half else config
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    path = folder / WEIGHTS_FILE
    save_model(module, str(path))
    if half:
        weights = load_file(path)
        halved = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in weights.items()}
        save_file(halved, path)
    as_new_files_are(path)
    return folder


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str, strict: bool = True) -> None:
    """Compare names and shapes of weights with a module before any of them is copied.

    Args:
        module: the module that the weights are for.
        weights: name to tensor.
        source: where the weights come from, for the message.
        strict: whether missing and unknown names are errors too; a wrong shape always is.

    Raises:
        ValueError: with all unknown, missing and misshapen names (the first five of each).
    """
    own = module.state_dict(keep_vars=True)
    # Tied tensors are stored once; an alias that is absent is not missing. Without memory (on meta), the object tells.
    place = {name: tensor.data_ptr() or id(tensor) for name, tensor in own.items()}
    stored = {place[name] for name in weights if name in own}
    missing = [name for name in own if name not in weights and place[name] not in stored] if strict else []
    unknown = [n for n in weights if n not in own] if strict else []
    misshapen = [
        f"{n} {tuple(weights[n].shape)} instead of {tuple(own[n].shape)}"
        for n in weights
        if n in own and weights[n].shape != own[n].shape
    ]
    parts = [f"{kind}: {_first(names)}" for kind, names in
             (("of another shape", misshapen), ("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
    if parts:
        raise ValueError(
            f"The weights of {source} do not fit {type(module).__name__} ({'; '.join(parts)}):"
            " build the module with the hyperparameters that the weights were made with."
        )


def take_types(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Convert parameters to the types of the weights that they are about to get."""
    for name, parameter in module.state_dict(keep_vars=True).items():
        if isinstance(parameter, nn.Parameter) and name in weights and weights[name].is_floating_point():
            parameter.data = parameter.data.to(weights[name].dtype)


def refuse_text(path: Path) -> None:
    """A download that went wrong leaves a text: a pointer of Git LFS, a web page, a message.

    Raises:
        ValueError: the file is such a text.
    """
    with path.open("rb") as file:
        head = file.read(40).decode("ascii", "replace")
    if head and all(char.isascii() and (char.isprintable() or char.isspace()) for char in head):
        raise ValueError(
            f"{path} is not a file of weights (it begins with {' '.join(head.split())!r}): was the download complete, or is it"
            " a Git LFS pointer or a web page?"
        )


def _first(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
