"""State of a partitioned optimizer in the form of one process: whole tensors, by number of the user's parameter."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.paro.partition import Partition
from strategies.paro.units import FlatUnit

__all__ = [
    "PartitionedOptimizer",
    "is_flat",
    "load_optimizer_state",
    "optimizer_groups",
    "optimizer_state",
    "parameter_numbers",
]


class PartitionedOptimizer(Protocol):
    """The parts of an engine that hold an optimizer and its states; see `strategies.paro.engine.PaROEngine`."""

    optimizer: Optimizer | None
    groups: list[list[nn.Parameter]]
    units: list[FlatUnit]
    partition: Partition

    def whole(self, own: Tensor, source: Any, size: int) -> Tensor:
        """All ranks' parts of a flat buffer together, (size,); a collective call."""


def optimizer_groups(engine: PartitionedOptimizer) -> list[dict[str, Any]]:
    """The ``param_groups`` of the optimizer's ``state_dict()`` with the numbers of the user's parameters; no communication."""
    assert engine.optimizer is not None
    numbers = parameter_numbers(engine)
    groups = engine.optimizer.state_dict()["param_groups"]
    for group, parameters in zip(groups, engine.groups, strict=True):
        group["params"] = [numbers[id(parameter)] for parameter in parameters]
    return groups


def optimizer_state(engine: PartitionedOptimizer, keep: bool = True) -> dict[str, Any]:
    """The optimizer's ``state_dict()`` as one process would have it: whole tensors by number of the user's parameter.

    A collective call. A unit has one step count, which all of its parameters get.

    Args:
        engine: holds the optimizer.
        keep: False: only take part; the state is then empty.
    """
    assert engine.optimizer is not None
    numbers = parameter_numbers(engine)
    of_parameter: dict[int, dict[str, Any]] = {}
    for unit in engine.units:
        if unit.master is None:
            continue
        for key, value in engine.optimizer.state.get(unit.master, {}).items():
            flat = None
            if is_flat(value, unit):
                flat = engine.whole(value, engine.partition.optimizer, unit.size)
            for slot in unit.slots if keep else ():
                own = value.detach().cpu().clone() if isinstance(value, Tensor) else value
                if flat is not None:
                    own = flat[slot.start : slot.stop].view(slot.shape).cpu().clone()
                of_parameter.setdefault(numbers[id(slot.parameter)], {})[key] = own
    return {"state": dict(sorted(of_parameter.items())), "param_groups": optimizer_groups(engine)}


@torch.no_grad()
def load_optimizer_state(engine: PartitionedOptimizer, state: Mapping[str, Any]) -> None:
    """Take this rank's part of an optimizer's whole state; no communication.

    Where parameters of one unit have different step counts (some were not used in every step), the largest is taken.

    Args:
        engine: holds the optimizer.
        state: as `optimizer_state` gives it, of any strategy.

    Raises:
        ValueError: other groups, or other parameters in them.
    """
    assert engine.optimizer is not None
    groups = [dict(group) for group in state["param_groups"]]
    found, own = [len(group["params"]) for group in groups], [len(group) for group in engine.groups]
    if found != own:
        raise ValueError(
            f"The checkpoint's optimizer has groups of {found} parameters, this one groups of {own}: it is of another model, or"
            " its optimizer was made in another way."
        )
    saved = {id(p): n for group, of in zip(groups, engine.groups, strict=True) for n, p in zip(group["params"], of, strict=True)}
    values: dict[int, dict[str, Any]] = {}
    number = 0
    for index, group in enumerate(groups):
        group["params"] = []
        for unit in (unit for unit in engine.units if unit.plan.group == index):
            parts = {slot.name: state["state"].get(saved[id(slot.parameter)], {}) for slot in unit.slots}
            if any(parts.values()):
                values[number] = _unit_state(unit, parts)
            group["params"].append(number)
            number += 1
    engine.optimizer.load_state_dict({"state": values, "param_groups": groups})


def _unit_state(unit: FlatUnit, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    assert unit.master is not None
    shapes = {slot.name: slot.shape for slot in unit.slots}
    result: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts.values() for key in part):
        held = {name: part[key] for name, part in parts.items() if part.get(key) is not None}
        # A parameter of no dimension has moments of none, as a step count has: the others of the unit tell what it is.
        flat = key != "step" and all(isinstance(each, Tensor) for each in held.values())
        flat = flat and any(each.shape == shapes[name] for name, each in held.items())
        if not held:
            result[key] = None
        elif not flat:
            first = next(iter(held.values()))
            result[key] = max(held.values(), key=float) if key == "step" else first
        else:
            for name, each in held.items():
                if each.shape != shapes[name]:
                    raise ValueError(
                        f"The checkpoint's {key} of {name} has shape {tuple(each.shape)}, not {tuple(shapes[name])}."
                    )
            shard = torch.zeros_like(unit.master, requires_grad=False)
            for slot, source, target in unit.overlaps("optimizer"):
                if slot.name in held:
                    shard[target].copy_(held[slot.name].reshape(-1)[source])
            result[key] = shard
    return result


def parameter_numbers(engine: PartitionedOptimizer) -> dict[int, int]:
    """The number of each parameter of the optimizer in its ``state_dict()``, by identity."""
    return {id(parameter): number for number, parameter in enumerate(p for group in engine.groups for p in group)}


def is_flat(value: Any, unit: FlatUnit) -> bool:
    """Whether a value of the optimizer's state has an element for each of a unit's master on this rank."""
    return isinstance(value, Tensor) and unit.master is not None and value.shape == unit.master.shape
