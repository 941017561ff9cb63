"""Whole states of divided models and optimizers, for checkpoints that any placement can read."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

__all__ = ["divided_like", "divided_state", "from_rank", "whole"]


def whole(state: Any) -> Any:
    """A state with whole tensors, which do not stay on the device; a collective call of the ranks that divide them."""
    return tree_map(lambda value: value.full_tensor().cpu() if isinstance(value, DTensor) else value, state)


def divided_like(value: Any, like: Any) -> Any:
    """A whole tensor as this rank's part of one that is divided; without communication."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    part = value.to(like.device, like.dtype)
    return distribute_tensor(part, like.device_mesh, like.placements, src_data_rank=None)


def divided_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A whole state of an optimizer as this rank's part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {name: divided_like(value, parameters[int(number)]) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": parts}


def from_rank(value: Any, rank: int) -> Any:
    """Something that one rank has, on all ranks; a collective call."""
    if rank == 0 or not dist.is_initialized():
        return value
    held = [tree_map(lambda each: each.cpu() if isinstance(each, torch.Tensor) else each, value)]
    dist.broadcast_object_list(held, rank)
    return held[0]
