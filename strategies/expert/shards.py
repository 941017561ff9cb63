"""Who holds which experts: a module's experts divided among the ranks of a group, and made whole again."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.expert.dispatch import Dispatcher, ExpertLayer

__all__ = ["ExpertShards", "HasExperts"]


@runtime_checkable
class HasExperts(Protocol):
    """A module that tells which of its parameters belong to routed experts."""

    def expert_parameters(self) -> Iterable[nn.Parameter]:
        """All parameters of its layers of experts, each of which is an `ExpertLayer` and holds no others."""


class ExpertShards:
    """The experts of a module, of which each rank of a group holds an equal part: rank p the p-th along dim 0.

    What is written to and read from disk is whole; `whole_weights` and `whole_state` make it so, `part_of_weights` and
    `part_of_state` take this rank's part of it.

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
        self.group = group
        self.device = device
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.dispatcher: Dispatcher | None = None
        self.parameters = _expert_parameters(module)
        self.layers = _expert_layers(module, self.parameters)
        for layer in self.layers:
            if "forward" in vars(layer):
                raise RuntimeError(
                    f"The experts of this {type(module).__name__} are divided already, by a run that did not end well: build the"
                    " module anew, or load it from a checkpoint."
                )
            if layer.num_experts % self.size:
                raise ValueError(
                    f"expert_parallel_size={self.size} does not divide the {layer.num_experts} experts of a layer: choose a"
                    f" divisor of {layer.num_experts}."
                )
        self._num_experts = {id(parameter): len(parameter) for parameter in self.parameters}
        self._num_experts_of = {
            name: self._num_experts[id(parameter)]
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if self.holds(parameter)
        }

    @property
    def names(self) -> list[str]:
        """Names of the parameters that are divided."""
        return list(self._num_experts_of)

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter is divided."""
        return id(parameter) in self._num_experts

    @torch.no_grad()
    def divide(self) -> None:
        """Keep this rank's part of the experts as the first of all ranks has them, and let the layers exchange tokens."""
        for parameter in self.parameters:
            place = parameter.device
            whole = parameter.detach().to(self.device).contiguous()
            dist.broadcast(whole, src=0)
            parameter.grad = None
            parameter.data = self._part(whole).to(place)
        for layer in self.layers:
            layer.num_experts //= self.size
        self.dispatcher = Dispatcher(self.layers, self.group)
        self.dispatcher.install()

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
                if len(parameter) < layer.num_experts:
                    self._unite(parameter)

    def _unite(self, parameter: nn.Parameter) -> None:
        place = parameter.device
        part = parameter.detach().to(self.device).contiguous()
        whole = part.new_empty(self.size * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(whole, part, group=self.group)
        parameter.grad = None
        parameter.data = whole.to(place)

    def part_of_weights(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint with this rank's part of the experts, wherever it has weights by name, of the module or a part of it."""
        return self._map_weights(checkpoint, lambda x, E: self._part(x) if len(x) == E else x)

    def whole_weights(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint with all experts in the group's first rank (the others keep theirs); a collective of the group."""
        return self._map_weights(checkpoint, lambda x, E: self._whole(x) if len(x) * self.size == E else x)

    def _map_weights(self, checkpoint: Mapping[str, Any], convert: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
        # Averages and references are stored beside the weights, some by a part of the module with names of its own.
        ends = {name[start:]: E for name, E in self._num_experts_of.items() for start in _starts(name)}
        return {
            key: {name: convert(x, ends[name]) if name in ends and isinstance(x, Tensor) else x for name, x in value.items()}
            if isinstance(value, dict) and ends.keys() & value.keys()
            else value
            for key, value in checkpoint.items()
        }

    def part_of_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """State of an optimizer, with this rank's part of what belongs to experts."""
        return self._map_state(optimizer, state, lambda x, E: self._part(x) if len(x) == E else x)

    def whole_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """State of an optimizer, whole in the group's first rank (the others keep theirs); a collective of the group."""
        return self._map_state(optimizer, state, lambda x, E: self._whole(x) if len(x) * self.size == E else x)

    def _map_state(
        self, optimizer: Optimizer, state: Mapping[str, Any], convert: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        of_parameter = dict(state["state"])
        for number, parameter in enumerate(parameters):
            if self.holds(parameter) and number in of_parameter:
                E = self._num_experts[id(parameter)]
                of_parameter[number] = {
                    key: convert(value, E) if isinstance(value, Tensor) and value.dim() > 1 else value
                    for key, value in of_parameter[number].items()
                }
        return {**state, "state": of_parameter}

    def _part(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.size)[self.rank].clone()

    def _whole(self, part: Tensor) -> Tensor:
        local = part.detach().to(self.device).contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(local, parts, group=self.group, group_dst=0)
        return part if parts is None else torch.cat([each.cpu() for each in parts])


def _starts(name: str) -> list[int]:
    """Where the name of a parameter may begin for a part of the module: at each module above it."""
    starts = [0, *(i + 1 for i, char in enumerate(name) if char == ".")]
    return starts[:-1] or starts


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
