"""Parameters that are synchronised together: the blocks of a network, in the order of their use."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

__all__ = ["Block", "SupportsSyncBlocks", "split_blocks", "sync_blocks"]

REST = "rest"


@runtime_checkable
class SupportsSyncBlocks(Protocol):
    """A module that says itself which of its parts are synchronised one after the other."""

    def sync_blocks(self) -> list[nn.Module]:
        """Parts in the order of the forward pass, none of them inside another; what is not called gets its weights before it."""
        ...


@dataclass(frozen=True)
class Block:
    """Parameters that are synchronised together.

    Attributes:
        name: path of the module, or ``rest``.
        module: whose call needs them; None for the rest, which must be there before the forward pass begins.
        parameters: names, of the whole network, and parameters that are trained.
        compiled: whether its call is part of compiled code, which takes no hooks.
    """

    name: str
    module: nn.Module | None
    parameters: tuple[tuple[str, nn.Parameter], ...]
    compiled: bool = False


def sync_blocks(root: nn.Module) -> list[nn.Module]:
    """The blocks of a network: those of its `SupportsSyncBlocks`, else the entries of its outermost module lists."""
    if isinstance(root, SupportsSyncBlocks):
        return list(root.sync_blocks())
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, SupportsSyncBlocks):
                found.extend(child.sync_blocks())
            elif isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                visit(child)

    visit(root)
    return found


def split_blocks(root: nn.Module, modules: Iterable[nn.Module] | None = None) -> list[Block]:
    """All trained parameters of a network, each in exactly one block; the rest comes first.

    A parameter that several blocks share, or that is used outside of its block too (tied weights), belongs to the rest.

    Args:
        root: the network.
        modules: its blocks; default is `sync_blocks`.

    Raises:
        ValueError: a block is not part of the network, or lies inside another one.
    """
    paths = {module: name for name, module in root.named_modules()}
    blocks = list(dict.fromkeys(sync_blocks(root) if modules is None else modules))
    chosen = set(blocks)
    owner: dict[nn.Module, nn.Module | None] = {}
    for block in blocks:
        if block not in paths:
            raise ValueError(f"sync_blocks of {type(root).__name__} names a {type(block).__name__} that is not a part of it.")
        for module in block.modules():
            if module in chosen and module is not block:
                raise ValueError(
                    f"sync_blocks of {type(root).__name__}: {paths[module]} lies inside {paths[block]}; name only one of them."
                )
            owner[module] = block if owner.get(module, block) is block else None
    users: dict[nn.Parameter, set[nn.Module | None]] = {}
    names: dict[nn.Parameter, str] = {}
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                users.setdefault(parameter, set()).add(owner.get(module))
                names.setdefault(parameter, f"{path}.{name}" if path else name)
    held: dict[nn.Module | None, list[tuple[str, nn.Parameter]]] = {}
    for parameter, of in users.items():
        held.setdefault(next(iter(of)) if len(of) == 1 else None, []).append((names[parameter], parameter))
    rest = [Block(REST, None, tuple(held[None]))] if None in held else []
    compiled = {part for module in root.modules() if module._compiled_call_impl is not None for part in module.modules()}
    return rest + [Block(paths[block], block, tuple(held[block]), block in compiled) for block in blocks if block in held]
