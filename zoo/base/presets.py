"""Configurations that have names."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Self, get_args, runtime_checkable

import jsonargparse._parameter_resolvers as _resolvers

from zoo.base.parsing import our_parsing

__all__ = ["SupportsPresets", "presets_of", "spelled_out"]


@runtime_checkable
class SupportsPresets(Protocol):
    """A dataclass of which some instances have names, such as the published sizes of an architecture.

    An argument of type ``Config | Literal["small", "large"]`` takes a name on the command line; ``--model.config.depth 2``
    then changes this one entry.
    """

    @classmethod
    def presets(cls) -> Mapping[str, Self]:
        """The instances that have names."""


def presets_of(typehint: Any) -> Mapping[str, Any]:
    """Instances that have names, of the classes in a type."""
    classes = [kind for kind in (typehint, *get_args(typehint)) if isinstance(kind, type)]
    return {name: found for kind in classes if issubclass(kind, SupportsPresets) for name, found in kind.presets().items()}


def spelled_out(cls: type, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a class, with the entries of each preset in place of its name."""
    arguments = dict(arguments or {})
    with our_parsing():
        hints = {parameter.name: parameter.annotation for parameter in _resolvers.get_signature_parameters(cls)}
    for name, value in arguments.items():
        if isinstance(value, str) and value in (presets := presets_of(hints.get(name))):
            arguments[name] = dataclasses.asdict(presets[value])
    return arguments
