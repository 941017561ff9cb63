"""Checkpoints of partitioned states: whole, in the form of one process, or sharded, read under any code and world size."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from strategies.paro.engine import PaROEngine
from strategies.paro.optimizer_state import is_flat, parameter_numbers
from strategies.paro.partition import Granularity
from zoo.base.checkpoint import read_plain
from zoo.base.shard_reader import ShardReader

__all__ = [
    "META_FILE",
    "ShardedWeights",
    "consolidate",
    "is_sharded",
    "load_sharded_weights",
    "names_of_weights",
    "read_sharded",
    "save_sharded",
    "weights",
]

META_FILE = "meta.pt"
_UNITS, _NUMBERS = "paro_units", "paro_numbers"


def weights(engine: PaROEngine, keep: bool = True) -> dict[str, Any]:
    """The module's own ``state_dict()``, with whole parameters in the format of the masters, on the CPU.

    A collective call; units are gathered one after the other.

    Args:
        engine: holds the parameters.
        keep: False: only take part; tensors are then on the device ``meta``.
    """
    with engine.full_parameters(device=torch.device("cpu"), keep=keep):
        state = engine.module.state_dict()
    return {name: _on_cpu(value) if keep else _on_meta(value) for name, value in state.items()}


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _on_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


# Sharded


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a folder, as `save_sharded` writes."""
    return (Path(path) / META_FILE).is_file()


def names_of_weights(engine: PaROEngine) -> dict[str, Any]:
    """The names of the module's ``state_dict()``, each with the name of its parameter, or a tensor that is none."""
    first = {id(slot.parameter): slot.name for unit in engine.units for slot in unit.slots}
    state = engine.module.state_dict(keep_vars=True)
    return {name: first[id(value)] if id(value) in first else _on_cpu(value) for name, value in state.items()}


def save_sharded(engine: PaROEngine, folder: str | Path, rest: Mapping[str, Any]) -> None:
    """Write every rank's own shards with ``torch.distributed.checkpoint``; a collective call.

    The folder holds ``weights/<unit>`` and ``optimizer/<unit>/<key>``, flat tensors, and a file `META_FILE` with ``rest`` and
    with names, shapes and offsets of the parameters in each unit.

    Args:
        engine: holds the states.
        folder: where; what it held of an earlier save is overwritten.
        rest: everything else, plain data and tensors, with `names_of_weights` as ``state_dict``; that of rank 0 is written.
    """
    tensors: dict[str, Any] = {}
    units: list[dict[str, Any]] = []
    partition = engine.partition
    for unit in engine.units:
        own, granularity = (unit.shard, partition.parameters) if unit.master is None else (unit.master, partition.optimizer)
        tensors[f"weights/{unit.plan.name}"] = _distributed(engine, own.detach(), granularity)
        state = engine.optimizer.state.get(unit.master, {}) if engine.optimizer is not None and unit.master is not None else {}
        flat = {key: value for key, value in state.items() if is_flat(value, unit)}
        for key, value in flat.items():
            tensors[f"optimizer/{unit.plan.name}/{key}"] = _distributed(engine, value.detach(), partition.optimizer)
        units.append({
            "name": unit.plan.name,
            "size": unit.size,
            "dtype": unit.master_dtype,
            "slots": [(slot.name, tuple(slot.shape), slot.start, slot.stop) for slot in unit.slots],
            "flat": list(flat),
            "other": {key: _on_cpu(value) for key, value in state.items() if key not in flat},
        })  # fmt: skip
    folder = Path(folder)
    if engine.grid.rank == 0 and folder.is_file():
        folder.unlink()
    if engine.grid.n > 1:
        dist.barrier(group=engine.grid.world)
    dcp.save(tensors, checkpoint_id=folder, process_group=engine.grid.world)
    if engine.grid.rank == 0:
        numbers = parameter_numbers(engine)
        named = {slot.name: numbers[id(slot.parameter)] for unit in engine.units if unit.trained for slot in unit.slots}
        torch.save({**rest, _UNITS: units, _NUMBERS: named}, folder / META_FILE)


def _distributed(engine: PaROEngine, own: Tensor, granularity: Granularity) -> DTensor:
    """A shard as a tensor of all ranks: G is ``[Shard(0), Shard(0)]`` on (intra, inter), I ``[Shard(0), Replicate()]``."""
    placements: dict[str, tuple[Placement, Placement]] = {
        "N": (Replicate(), Replicate()), "I": (Shard(0), Replicate()), "G": (Shard(0), Shard(0)),
    }  # fmt: skip
    return DTensor.from_local(own, engine.grid.mesh, placements[granularity], run_check=False)


class _Folder:
    """The units of a sharded checkpoint, of which one at a time is in memory."""

    def __init__(self, reader: ShardReader, units: list[dict[str, Any]], numbers: dict[str, int]) -> None:
        self.reader, self.units, self.numbers = reader, units, numbers
        self.place = {slot[0]: (unit, slot) for unit in units for slot in unit["slots"]}
        self._read: tuple[str, str] | None = None
        self._whole: dict[str, Tensor] = {}

    def flat(self, unit: dict[str, Any], kind: str) -> dict[str, Tensor]:
        """Whole flat tensors of a unit: ``{"": weights}`` of the kind ``weights``, by key of the kind ``optimizer``."""
        if self._read != (unit["name"], kind):
            keys = [""] if kind == "weights" else unit["flat"]
            places = {key: "/".join([kind, unit["name"], *([key] if key else [])]) for key in keys}
            self._whole = {}  # before the next, not after
            whole = {place: torch.empty(unit["size"], dtype=unit["dtype"]) for place in places.values()}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is wanted
                dcp.load(whole, storage_reader=self.reader, no_dist=True)
            self._read, self._whole = (unit["name"], kind), {key: whole[place] for key, place in places.items()}
        return self._whole


class ShardedWeights(Mapping[str, Tensor]):
    """The ``state_dict`` in a sharded checkpoint; a unit is read when one of its parameters is asked for."""

    def __init__(self, folder: _Folder, names: Mapping[str, Any]) -> None:
        self._folder, self._names = folder, names

    def __getitem__(self, name: str) -> Tensor:
        of = self._names[name]
        return self.parameter(of) if isinstance(of, str) else of

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each parameter, by its name in the module; nothing is read."""
        return {name: torch.Size(shape) for name, (_, (_, shape, _, _)) in self._folder.place.items()}

    def others(self) -> dict[str, Any]:
        """Entries that are not parameters, such as buffers."""
        return {name: of for name, of in self._names.items() if not isinstance(of, str)}

    def parameter(self, name: str) -> Tensor:
        """A parameter by its name in the module."""
        unit, (_, shape, start, stop) = self._folder.place[name]
        return self._folder.flat(unit, "weights")[""][start:stop].view(shape).clone()


class _ShardedStates(Mapping[int, dict[str, Any]]):
    """An optimizer's states by number of the parameter, likewise."""

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder
        named = {folder.numbers[name]: name for name in folder.place if name in folder.numbers}
        held = {number: folder.place[name][0] for number, name in named.items()}
        self._named = {number: named[number] for number in sorted(named) if held[number]["flat"] or held[number]["other"]}

    def __getitem__(self, number: int) -> dict[str, Any]:
        unit, (_, shape, start, stop) = self._folder.place[self._named[number]]
        other = {key: value.clone() if isinstance(value, Tensor) else value for key, value in unit["other"].items()}
        flat = self._folder.flat(unit, "optimizer") if unit["flat"] else {}
        return {**other, **{key: value[start:stop].view(shape).clone() for key, value in flat.items()}}

    def __iter__(self) -> Iterator[int]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def read_sharded(folder: str | Path) -> dict[str, Any]:
    """A sharded checkpoint in the form of an ordinary one, on the CPU; any process reads it, for itself.

    Its weights (`ShardedWeights`) and optimizer states are mappings that read a unit when it is asked for and keep only the
    last one in memory, so that a model need not fit there as a whole.

    Args:
        folder: what `save_sharded` wrote, under any partition, number of ranks and division into units.

    Raises:
        FileNotFoundError: the folder is no such checkpoint.
        ValueError: it is one of another strategy, or holds something that could run code.
    """
    folder = Path(folder)
    if not is_sharded(folder):
        raise FileNotFoundError(f"{folder} is no sharded checkpoint: it has no {META_FILE}.")
    meta: dict[str, Any] = read_plain(folder / META_FILE)
    if _UNITS not in meta:
        raise ValueError(f"{folder} is a sharded checkpoint of another strategy: continue it under that one.")
    reader = ShardReader(folder)
    reader.read_metadata()
    units = _Folder(reader, meta.pop(_UNITS), meta.pop(_NUMBERS))
    meta["state_dict"] = ShardedWeights(units, meta["state_dict"])
    for optimizer in meta.get("optimizer_states", ()):
        optimizer["state"] = _ShardedStates(units)
    return meta


@torch.no_grad()
def load_sharded_weights(engine: PaROEngine, weights: ShardedWeights, strict: bool = True) -> None:
    """Take this rank's part of the weights in a sharded checkpoint, unit by unit; no communication.

    Args:
        engine: holds the parameters.
        weights: of `read_sharded`.
        strict: whether missing and unknown names are errors.

    Raises:
        ValueError: names or shapes differ; all of them are listed.
    """
    found, own = weights.shapes(), {slot.name: torch.Size(slot.shape) for unit in engine.units for slot in unit.slots}
    names = names_of_weights(engine)
    lists = {
        "missing": [name for name in names if name not in weights] if strict else [],
        "unknown": [name for name in weights if name not in names] if strict else [],
        "of another shape": [
            f"{name} {tuple(shape)} instead of {tuple(own[name])}"
            for name, shape in found.items()
            if own.get(name, shape) != shape
        ],
    }
    if any(lists.values()):
        told = "; ".join(f"{kind}: {', '.join(each)}" for kind, each in lists.items() if each)
        raise ValueError(f"The weights in the sharded checkpoint are of another model: {told}.")
    for unit in engine.units:
        held = [slot for slot in unit.slots if slot.name in found]
        flat = engine.read(unit) if len(held) < len(unit.slots) else torch.zeros(unit.size, dtype=unit.master_dtype)
        for slot in held:
            flat[slot.start : slot.stop].copy_(weights.parameter(slot.name).reshape(-1))
        unit.write(flat.to(unit.full.device))
    nn.Module.load_state_dict(engine.module, weights.others(), strict=False)


def consolidate(folder: str | Path, path: str | Path) -> Path:
    """Make of a sharded checkpoint an ordinary one, a file that any strategy and a single process load; needs no ranks.

    Args:
        folder: the sharded checkpoint.
        path: the file to write.

    Returns:
        The path of the file.
    """
    checkpoint = read_sharded(folder)
    checkpoint["state_dict"] = dict(checkpoint["state_dict"])
    for optimizer in checkpoint.get("optimizer_states", ()):
        optimizer["state"] = dict(optimizer["state"])
    torch.save(checkpoint, path)
    return Path(path)
