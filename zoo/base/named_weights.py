"""Weights that a checkpoint names instead of storing: those that are frozen and come from a named source."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["NamedSource", "NamesWeights", "check_sources", "leave_out", "with_named"]

ENTRY = "zoo_named_weights"
STATES = ("state_dict", "current_model_state", "averaged_model_state")


@dataclass(frozen=True)
class NamedSource:
    """Origin of weights.

    Attributes:
        name: A folder, a repository of a hub, a file or an asset.
        sha256: SHA-256 of its files of weights, in hexadecimal.
    """

    name: str
    sha256: str


@runtime_checkable
class NamesWeights(Protocol):
    """A part of a module, some weights of which are frozen and come from a named source."""

    def named_source(self) -> NamedSource | None:
        """The source; None where all weights are stored."""

    def named_weights(self) -> list[str]:
        """Names, within the part, of the weights that the source gives and that are frozen."""

    def store_all(self) -> None:
        """Store all weights from here on: some are not the source's any more."""


def _parts(module: nn.Module) -> Iterator[tuple[str, NamesWeights, NamedSource]]:
    for path, part in module.named_modules():
        if isinstance(part, NamesWeights) and (source := part.named_source()) is not None:
            yield f"{path}." if path else "", part, source


def leave_out(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Remove named weights from a checkpoint, and write their sources and types into it.

    Args:
        module: The module that is saved.
        checkpoint: As Lightning writes it; entries of states that are no tensors stay.
    """
    entries: list[dict[str, Any]] = []
    for prefix, part, source in _parts(module):
        names, types = [prefix + name for name in part.named_weights()], {}
        for state in {id(checkpoint[key]): checkpoint[key] for key in STATES if key in checkpoint}.values():
            for name in names:
                if isinstance(state.get(name), Tensor):
                    types[name] = str(state.pop(name).dtype).removeprefix("torch.")
        entries.append({"part": prefix.rstrip("."), "name": source.name, "sha256": source.sha256, "weights": types})
    if entries:
        checkpoint[ENTRY] = entries


def check_sources(module: nn.Module, checkpoint: Mapping[str, Any], convert: bool | None) -> None:
    """Compare the sources that a checkpoint names with those of a module, before its weights are loaded.

    Args:
        module: The module that takes the weights.
        checkpoint: As read.
        convert: Whether named weights take the types that they had when the checkpoint was written (True), or keep their own
            and are rounded to those (False). None: they are left alone.

    Raises:
        ValueError: If a source has another SHA-256, or the module has none.
    """
    own = {prefix.rstrip("."): source for prefix, _, source in _parts(module)}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for entry in checkpoint.get(ENTRY, ()):
        found = own.get(entry["part"])
        if found is None or found.sha256 != entry["sha256"]:
            has = "none" if found is None else f"{found.name} ({found.sha256[:12]})"
            raise ValueError(
                f"The checkpoint leaves the frozen weights of {entry['part'] or 'the model'} to {entry['name']} (SHA-256"
                f" {entry['sha256'][:12]}), but this model has {has} for them: build it with that source."
            )
        for name, dtype in entry["weights"].items() if convert is not None else ():
            data = parameters[name].data
            rounded = data.to(getattr(torch, dtype))
            parameters[name].data = rounded if convert else rounded.to(data.dtype)


def with_named(module: nn.Module, weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights for a module, those that its sources give included where they are missing.

    A part that gets other weights than its source's stores them from here on.

    Args:
        module: The module that takes the weights.
        weights: Of a checkpoint.
    """
    added: dict[str, Any] = {}
    for prefix, part, _ in _parts(module):
        own = dict(_own(module, prefix, part.named_weights()))
        given = [name for name in own if name in weights]
        if any(not torch.equal(weights[name].to(own[name]), own[name]) for name in given):
            part.store_all()
        added.update({name: value for name, value in own.items() if name not in weights})
    return {**weights, **added} if added else weights


def _own(module: nn.Module, prefix: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return ((prefix + name, parameters[prefix + name].detach()) for name in names)
