"""Optimizers that servers run in a worker's place.

They must treat each element for itself, so that a part is updated as in the whole.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["ELEMENTWISE", "OptimizerSpec", "RemoteOptimizer", "hyperparameters", "set_hyperparameters"]

ELEMENTWISE: dict[str, type[Optimizer]] = {
    kind.__name__: kind
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop)
}
_OF_THE_PROCESS = ("foreach", "fused", "capturable", "differentiable")  # how, not what, is computed: the server chooses


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer as plain data.

    Attributes:
        kind: name of its class.
        groups: for each group of parameters, its numbers (learning rate, momentum, ...).
    """

    kind: str
    groups: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> "OptimizerSpec":
        """Describe an optimizer.

        Raises:
            ValueError: it mixes elements of a parameter, or is not known to be free of that.
        """
        kind = type(optimizer)
        if ELEMENTWISE.get(kind.__name__) is not kind:
            raise ValueError(
                f"parameter servers cannot run {kind.__module__}.{kind.__qualname__}: each holds a part of a parameter, so the"
                f" optimizer must treat elements one by one. Take one of {', '.join(ELEMENTWISE)}, or another strategy."
            )
        return cls(kind.__name__, hyperparameters(optimizer))

    def build(self, parameters: Sequence[Sequence[nn.Parameter]]) -> Optimizer:
        """The optimizer of a server's parameters, group by group; groups of which it holds nothing get one of no elements."""
        groups = [
            {**group, "params": list(own) or [nn.Parameter(torch.empty(0))]}
            for own, group in zip(parameters, self.groups, strict=True)
        ]
        kind = ELEMENTWISE[self.kind]
        # Adagrad fills what it keeps by the argument, not by the group's number.
        arguments = {key: value for key, value in self.groups[0].items() if key in inspect.signature(kind).parameters}
        return kind(groups, **arguments)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind, "groups": [dict(group) for group in self.groups]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "OptimizerSpec":
        """What `to_json` has made.

        Raises:
            ValueError: an optimizer that servers cannot run.
        """
        if data["kind"] not in ELEMENTWISE:
            raise ValueError(f"there is no optimizer {data['kind']!r} on parameter servers; there are {', '.join(ELEMENTWISE)}.")
        return cls(data["kind"], tuple(_plain(group) for group in data["groups"]))


class RemoteOptimizer:
    """An optimizer whose step is made by the servers.

    Args:
        optimizer: the one of this process, for everything else.
        push: sends the gradients.
    """

    def __init__(self, optimizer: Optimizer, push: Callable[[], None]) -> None:
        self._optimizer, self._push = optimizer, push

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any]) -> Any:
        """Run the passes, and send what came of them."""
        with torch.enable_grad():
            result = closure()
        self._push()
        return result


def hyperparameters(optimizer: Optimizer) -> tuple[dict[str, Any], ...]:
    """For each group, what the optimizer's class takes as numbers."""
    return tuple(
        _plain({key: value for key, value in group.items() if key in optimizer.defaults and key not in _OF_THE_PROCESS})
        for group in optimizer.param_groups
    )


def set_hyperparameters(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Let an optimizer go on with these numbers."""
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        group.update(_plain(given))


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as numbers, lists (of JSON) as tuples."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) else tuple(value) if isinstance(value, list) else value
        for key, value in group.items()
    }
