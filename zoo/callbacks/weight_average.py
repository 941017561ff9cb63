"""Average of a module's weights that each process keeps whole."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage", "named_part"]


def named_part(module: nn.Module, patterns: list[str]) -> dict[str, nn.Parameter]:
    """Parameters of the parts of a module that patterns name, by their full names.

    Args:
        module: the whole module.
        patterns: names of its modules or parameters, with ``*`` and ``?`` as in file names.

    Raises:
        ValueError: If a pattern matches no parameter.

    Example:
        >>> list(named_part(nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)}), ["two"]))
        ['two.weight', 'two.bias']
    """
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in parameters):
            children = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
            raise ValueError(
                f"EMA: modules={pattern!r} names no parameter of {type(module).__name__}: give names of its parts, such as"
                f" {children[:150]}."
            )
    return {name: p for name, p in parameters.items() if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


class WeightAverage:
    """Average of some parameters of a module, in float32 or wider, so that small steps are not rounded away.

    Args:
        parameters: the averaged parameters by name; the average begins at their values. Those without gradient are left out.
        device: where the average lies; None: beside the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device | str | None = None) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        #: The averaged weights by name.
        self.tensors = {
            name: p.detach().to(device or p.device, torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }
        self._kept: dict[str, Tensor] | None = None  # the current weights while the average is in their place

    @torch.no_grad()
    def update(self, decay: float, names: Iterable[str] | None = None) -> None:
        """``average <- decay * average + (1 - decay) * weights``, of all parameters or of those named."""
        chosen = [name for name in (self.tensors if names is None else names) if name in self.tensors]
        average = [self.tensors[name] for name in chosen]
        current = [self._parameters[name].detach().to(self.tensors[name]) for name in chosen]
        if average:
            torch._foreach_lerp_(average, current, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average into the module; at the next call, give the module its own weights back, bit for bit."""
        if self._kept is None:
            self._kept = {
                name: parameter.detach().to(self.tensors[name].device, copy=True) for name, parameter in self._parameters.items()
            }
            self.leave()
        else:
            for name, parameter in self._parameters.items():
                parameter.data.copy_(self._kept[name])
            self._kept = None

    @torch.no_grad()
    def leave(self) -> None:
        """Copy the average into the module."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self.tensors[name])

    def restart(self, weights: Mapping[str, Any] | None = None) -> None:
        """Begin again at given weights, which may be narrower or wider; at the present ones where none are given."""
        self._kept = None
        for name, parameter in self._parameters.items():
            self.tensors[name].copy_((weights or {}).get(name, parameter.detach()))

    def weights(self, module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A ``state_dict`` with the average in the place of the averaged parameters, under all names of tied ones."""
        name_of = {id(parameter): name for name, parameter in self._parameters.items()}
        aliases = {
            alias: self.tensors[name_of[id(parameter)]]
            for alias, parameter in module.named_parameters(remove_duplicate=False)
            if id(parameter) in name_of
        }
        return {name: aliases.get(name, value) for name, value in state_dict.items()}
