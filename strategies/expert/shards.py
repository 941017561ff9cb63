"""Who holds which experts: a module's experts divided among the ranks of a group, and made whole again."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from strategies.divided_rows import DividedRows
from strategies.expert.dispatch import Dispatcher, ExpertLayer

__all__ = ["ExpertShards", "HasExperts"]


@runtime_checkable
class HasExperts(Protocol):
    """A module that tells which of its parameters belong to routed experts."""

    def expert_parameters(self) -> Iterable[nn.Parameter]:
        """All parameters of its layers of experts, each of which is an `ExpertLayer` and holds no others."""


class ExpertShards(DividedRows):
    """The experts of a module, of which each rank of a group holds an equal part: rank p the p-th along dim 0.

    Args:
        module: has ``expert_parameters()``.
        group: the ranks.
        device: where tensors must lie to be communicated.

    Raises:
        ValueError: the module has no experts, they are not in layers of the expected kind, or their number is no multiple of
            the group's size.
        RuntimeError: they are divided already.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        parameters = _expert_parameters(module)
        self.dispatcher: Dispatcher | None = None
        self.layers = _expert_layers(module, parameters)
        for layer in self.layers:
            if "forward" in vars(layer):
                raise RuntimeError(
                    f"The experts of this {type(module).__name__} are divided already, by a run that did not end well: build the"
                    " module anew, or load it from a checkpoint."
                )
            size = dist.get_world_size(group)
            if layer.num_experts % size:
                raise ValueError(
                    f"expert_parallel_size={size} does not divide the {layer.num_experts} experts of a layer: choose a divisor of"
                    f" {layer.num_experts}."
                )
        super().__init__(module, parameters, group, device)

    @override
    def divide(self) -> None:
        """Keep this rank's part of the experts as the first of all ranks has them, and let the layers exchange tokens."""
        super().divide()
        for layer in self.layers:
            layer.num_experts //= self.size
        self.dispatcher = Dispatcher(self.layers, self.group)
        self.dispatcher.install()

    @override
    @torch.no_grad()
    def unite(self) -> None:
        """Give every rank all experts again, and the layers their own ``forward``; copies made of them meanwhile too."""
        if self.dispatcher is None:
            return
        layers = self.dispatcher.remove()
        self.dispatcher = None
        while layers:
            layer = layers.pop()  # so that a copy which nobody else holds is gone before the next one is made whole
            layer.num_experts *= self.size
            for parameter in (layer.gate_up_proj, layer.down_proj):
                self.unite_parameter(parameter, layer.num_experts)


def _expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    given = list(module.expert_parameters()) if isinstance(module, HasExperts) else []
    if not given:
        raise ValueError(
            f"{type(module).__name__} has no experts to divide: expert parallelism needs a module whose expert_parameters() gives"
            " them when the run begins (built in __init__, not in configure_model). For other modules take the strategy ddp."
        )
    return list({id(parameter): parameter for parameter in given}.values())


def _expert_layers(module: nn.Module, parameters: list[nn.Parameter]) -> list[ExpertLayer]:
    """The modules that hold the parameters."""
    of_experts = {id(parameter) for parameter in parameters}
    layers = [layer for layer in module.modules() if of_experts & {id(p) for p in layer.parameters(recurse=False)}]
    held: set[int] = set()
    for layer in layers:
        own = {id(getattr(layer, name, None)) for name in ("gate_up_proj", "down_proj")}
        E = getattr(layer, "num_experts", None)
        if own != {id(p) for p in layer.parameters()} or any(len(p) != E for p in layer.parameters()):
            raise ValueError(
                f"{type(layer).__name__} is no layer of experts that can be divided: it must have num_experts, and"
                " gate_up_proj and down_proj of that length as its only parameters."
            )
        held |= own
    if held != of_experts:
        raise ValueError(
            f"expert_parameters() of {type(module).__name__} gives parameters that are not its layers', or leaves some out."
        )
    return layers  # type: ignore[return-value]
