"""Whole states of models and optimizers that ranks divide (FSDP2), for checkpoints that any number of ranks can read."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

__all__ = ["divided_like", "divided_state", "whole"]


def whole(state: Any) -> Any:
    """A state with whole tensors on the CPU; a collective call of the ranks that divide them."""
    return tree_map_only(Tensor, lambda t: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu(), state)


def divided_like(value: Any, like: Any) -> Any:
    """This rank's part of a whole tensor, where it has the shape of one that is divided; without communication."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def divided_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A whole state of an optimizer as this rank's part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owner = dict(zip((number for group in state["param_groups"] for number in group["params"]), parameters, strict=True))
    parts = {
        number: {name: divided_like(value, owner[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}
