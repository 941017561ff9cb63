"""Released weights <-> a `LingForCausalLM`: folders of Hugging Face's layout, whole or in shards, read tensor by tensor.

Names are the same but for routed experts: theirs are 3 E tensors a layer, ours two, gate and up rows in one. `released_tensors`
gives each released tensor as a view of our parameters, so that reading fills views and writing copies them.
"""

import contextlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.base.checkpoint import as_new_files_are, fetch_repository, read_plain, refuse_text
from zoo.base.hyperparameters import class_path
from zoo.base.weight_files import INDEX_FILE, weight_files
from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.experts import Backend
from zoo.ling.head import normalized_weight
from zoo.ling.official_config import (
    ARCHITECTURE,
    CONFIG_FILE,
    from_hf_config,
    read_hf_config,
    to_hf_config,
)

__all__ = [
    "infer_hf",
    "load_hf",
    "load_official",
    "load_weights",
    "read_hf_config",
    "released_tensors",
    "save_hf",
    "to_hf_state_dict",
]

#: Files of weights that `save_hf` replaces.
_WEIGHTS = re.compile(r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?")
#: What belongs to the weights of a folder and is none of them.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_HEAD = "lm_head.weight"
_EMBEDDING = "model.word_embeddings.weight"
_LISTED = 20
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


def released_tensors(network: LingForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the released format, by its name there: a view of our parameter, in the order of the layers.

    A head that is tied to the embedding is not among them.
    """
    for name, parameter in network.named_parameters():
        tensor = parameter.detach()
        experts, _, kind = name.rpartition(".")
        if not experts.endswith(".mlp.experts"):
            yield name, tensor
        elif kind == "gate_up_proj":
            for e, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                yield f"{experts}.{e}.gate_proj.weight", gate
                yield f"{experts}.{e}.up_proj.weight", up
        else:
            yield from ((f"{experts}.{e}.down_proj.weight", down) for e, down in enumerate(tensor))


# Reading


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Names and tensors of a file; their numbers stay on the disk until they are used."""
    if file.suffix != ".safetensors":
        content = read_plain(file, mmap=True)
        if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise ValueError(f"{file} is no dictionary of names and tensors: it is not a released file of weights.")
        yield iter(content.items())
        return
    refuse_text(file)
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): was the download complete?") from None
    with handle:
        yield ((name, handle.get_tensor(name)) for name in handle.keys())  # noqa: SIM118 (a handle is no dictionary)


def _is_skipped(name: str) -> bool:
    """Whether a tensor is none of the network's: a table that is computed, or the value head of a reward model."""
    return name.endswith("rotary_emb.inv_freq") or "v_head" in name.split(".")


def load_weights(
    network: LingForCausalLM, path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> None:
    """Fill a network with released weights, one tensor at a time, after comparing all names and shapes.

    Parameters on the meta device are allocated, once; the others keep their place and type.

    Args:
        network: on the meta device or not.
        path: a released folder, or one file of weights.
        dtype: of parameters that are allocated; None: as stored.
        device: Device of the weights.

    Raises:
        FileNotFoundError: see `weight_files`.
        ValueError: a file is unsafe or damaged, or its weights are not this network's; what differs is listed.
    """
    files = weight_files(path)
    stored: dict[str, _Stored] = {}
    for file in files:
        with _opened(file) as tensors:
            stored |= {name: _Stored(tuple(t.shape), t.dtype, file) for name, t in tensors if not _is_skipped(name)}
    _compare(network, stored, path)
    _allocate(network, stored, dtype, torch.device(device))
    views = dict(released_tensors(network))
    if network.config.tie_word_embeddings:
        views.setdefault(_HEAD, views[_EMBEDDING])
    tied = {_HEAD, _EMBEDDING} if network.config.tie_word_embeddings and _HEAD in stored else set()
    first: Tensor | None = None
    for file in files:
        with _opened(file) as tensors:
            for name, tensor in tensors:
                if name not in views:
                    continue
                if name in tied and first is not None and not torch.equal(first, tensor):
                    raise ValueError(f"{path}: tie_word_embeddings is on, but {_HEAD} and {_EMBEDDING} differ: set it to false.")
                first = tensor if name in tied else first
                with torch.no_grad():
                    views[name].copy_(tensor)


def _compare(network: LingForCausalLM, stored: Mapping[str, _Stored], path: str | Path) -> None:
    own = {name: tuple(view.shape) for name, view in released_tensors(network)}
    known = own | ({_HEAD: own[_EMBEDDING]} if network.config.tie_word_embeddings else {})
    found = {
        "missing": [name for name in own if name not in stored],
        "unknown": [name for name in stored if name not in known],
        "of another shape": [
            f"{name} {list(entry.shape)} instead of {list(known[name])}"
            for name, entry in stored.items()
            if name in known and entry.shape != known[name]
        ],
        "no floating-point numbers": [name for name, entry in stored.items() if not entry.dtype.is_floating_point],
    }
    parts = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in found.items() if names]
    if parts:
        raise ValueError(f"The weights of {path} do not fit its configuration: {'; '.join(parts)}.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _allocate(network: LingForCausalLM, stored: Mapping[str, _Stored], dtype: torch.dtype | None, device: torch.device) -> None:
    """Give parameters on the meta device memory, in the type that most of their numbers need."""
    types: dict[str, torch.dtype] = {}
    for name, view in released_tensors(network):
        owner = re.sub(r"(\.mlp\.experts)\.\d+\.(gate|up)_proj\.weight$", r"\1.gate_up_proj", name)
        owner = re.sub(r"(\.mlp\.experts)\.\d+\.down_proj\.weight$", r"\1.down_proj", owner)
        assert view.shape == stored[name].shape
        types[owner] = torch.promote_types(types.get(owner, stored[name].dtype), stored[name].dtype)
    for module_name, module in network.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{name}"
            if parameter.is_meta and full in types:
                empty = torch.empty(parameter.shape, dtype=dtype or types[full], device=device)
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    if network.config.tie_word_embeddings:
        network.lm_head.register_parameter("weight", network.model.word_embeddings.get_parameter("weight"))
    for moe in network.moe_layers:
        if moe.gate.running_mean.is_meta:
            moe.gate.running_mean = torch.zeros((), device=device)
            moe.gate.running_std = torch.ones((), device=device)


def local_folder(path: str | Path) -> Path:
    """A folder as it is; the name of a repository of the Hugging Face hub is fetched first, once: settings and safetensors.

    A path that begins with ``./`` or ``/``, or with a folder that there is, never means a repository.

    Raises:
        FileNotFoundError: it is no folder, and could not be fetched.
    """
    repository = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", str(path))
    if repository is None or Path(repository[1]).exists():
        return Path(path)
    return fetch_repository(str(path), ["*.json", "*.safetensors", "*.jinja", "*.txt"])


def load_hf(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    experts: Backend = "auto",
    accurate_router: bool = True,
    config_changes: Mapping[str, Any] | None = None,
) -> LingForCausalLM:
    """Build the network that a released folder describes, with its weights; memory holds them once.

    Args:
        path: the folder: ``config.json`` and safetensors or ``pytorch_model.bin``, whole or in shards; or the name of a
            repository of the Hugging Face hub (``"inclusionAI/Ling-lite"``) that has safetensors.
        dtype: of the weights; None: as stored.
        device: Device of the weights.
        experts: Computation of routed experts, see `Experts`.
        accurate_router: scores of the router in float32 whatever the weights' type.
        config_changes: values of the `LingConfig` that are other ones than in the folder, such as ``rope_theta``.

    Returns:
        The network in evaluation mode; `save_hf` writes the same files again.

    Raises:
        FileNotFoundError: ``config.json`` or weights are missing; missing shards are named. Or the hub cannot be reached.
        ValueError: the folder is of another architecture, or its files are unsafe, damaged or do not fit one another.
    """
    path = local_folder(path)
    config, entries = read_hf_config(path)
    with torch.device("meta"):
        network = LingForCausalLM(config.replace(**(config_changes or {})), experts, accurate_router)
    network.hf_config, network.hf_folder = entries, _folder_of(path)
    load_weights(network, path, dtype, device)
    return network.eval()


# Writing


def to_hf_state_dict(network: LingForCausalLM, normalized_head: bool = False) -> dict[str, Tensor]:
    """Weights by their released names: views of ours, but for a head that is normalised.

    Args:
        network: on any device.
        normalized_head: write the head's effective weight, for engines without NormHead.
    """
    weights = dict(released_tensors(network))
    if normalized_head and network.config.norm_head:
        weights[_HEAD] = normalized_weight(network.lm_head.weight.detach())
    return weights


def save_hf(
    network: LingForCausalLM,
    folder: str | Path,
    max_shard_size: int | str = "5GB",
    normalized_head: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a folder of the released layout: ``config.json`` and safetensors, in shards where one is not enough.

    Entries of an earlier ``config.json`` that say nothing about the architecture are kept. Tokenizer and settings of generation
    come from the folder that the network was read from, if it is still there. Statistics of the router's warm-up are none of
    the released tensors. Memory holds one shard beside the network.

    Args:
        network: whose weights.
        folder: Where to write; made if missing. Earlier weights in it are replaced once the new ones are written; a tokenizer
            in it stays.
        max_shard_size: bytes of a file, as a number or like "5GB" or "500MiB"; a tensor is never split.
        normalized_head: for engines that know no NormHead: write the head normalised, and ``norm_head: false``.
        dtype: type to write; None: as it is.

    Returns:
        The folder.

    Raises:
        ValueError: ``max_shard_size`` is no size, or the network is on the meta device.
    """
    limit = _num_bytes(max_shard_size)
    weights = to_hf_state_dict(network, normalized_head)
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError("save_hf: the network is on the meta device, so it has no weights: load some first.")
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in weights.items():
        num_bytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + num_bytes, total + num_bytes
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as beside:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            copies = {n: weights[n].to("cpu", dtype, copy=True, memory_format=torch.contiguous_format) for n in names}
            save_file(copies, Path(beside) / file, metadata={"format": "pt"})
            as_new_files_are(Path(beside) / file)
            del copies  # before those of the next file are made
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (Path(beside) / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        entries = _entries(network, normalized_head, dtype)
        (Path(beside) / CONFIG_FILE).write_text(json.dumps(entries, indent=2) + "\n")
        written = sorted(path.name for path in Path(beside).iterdir())
        for name in written:
            (Path(beside) / name).replace(folder / name)
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()
    sources = [] if network.hf_folder is None else [network.hf_folder / name for name in _COMPANIONS]
    for source in sources:
        if source.is_file() and not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)
    return folder


def _entries(network: LingForCausalLM, normalized_head: bool, dtype: torch.dtype | None) -> dict[str, Any]:
    config = network.config
    if normalized_head and config.norm_head:
        config = config.replace(norm_head=False, tie_word_embeddings=False)
    entries = to_hf_config(config, network.hf_config)
    stored = dtype or network.model.word_embeddings.weight.dtype
    entries["dtype" if "dtype" in entries else "torch_dtype"] = str(stored).removeprefix("torch.")
    return entries


def _num_bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", str(size), re.IGNORECASE)
    number = 0 if match is None else math.floor(float(match[1]) * _UNITS[(match[2] or "B").upper()])
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} must be a number of bytes, or a text such as '5GB' or '500MiB'.")
    return number


# A whole module


def load_official(network: LingForCausalLM, path: str | Path) -> None:
    """Fill a network from a released folder or file, see `load_weights`, and keep the entries of its ``config.json``.

    Args:
        network: of the same sizes.
        path: the folder, or one file of weights.
    """
    load_weights(network, path)
    with contextlib.suppress(FileNotFoundError):
        network.hf_config, network.hf_folder = read_hf_config(path)[1], _folder_of(path)


def _folder_of(path: str | Path) -> Path:
    path = Path(path).resolve()
    return path if path.is_dir() else path.parent


def infer_hf(cls: type, source: str | Path | Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``{"class_path", "init_args"}`` of the module that released weights are of; None if they are something else.

    Args:
        cls: the class to build; its argument ``config`` is a `LingConfig`.
        source: a released folder, a file of weights beside its ``config.json``, or that file's entries.

    Raises:
        ValueError: it is the configuration of a relative of Ling, or an entry is missing.
    """
    if isinstance(source, Mapping):
        entries, name = source, CONFIG_FILE
    else:
        path = Path(source)
        file = path / CONFIG_FILE if path.is_dir() else path.with_name(CONFIG_FILE)
        try:
            entries, name = json.loads(file.read_text()), str(file)
        except (OSError, ValueError):
            return None
    if not isinstance(entries, Mapping) or not (
        str(entries.get("model_type")).startswith("bailing") or ARCHITECTURE in (entries.get("architectures") or [])
    ):
        return None
    return {"class_path": class_path(cls), "init_args": {"config": asdict(from_hf_config(entries, name))}}
