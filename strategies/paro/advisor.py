"""Choice of the partition of a model that fits a cluster best."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from strategies.paro.collectives import Method
from strategies.paro.cost_model import Cluster, Cost, Job, rank_partitions
from strategies.paro.precision import StatePrecision
from strategies.paro.units import UnitPlan

__all__ = ["job_of", "rank_fitting", "states_per_element"]

_STATES = {"Rprop": 2, "Adagrad": 1, "ASGD": 1}
"""Tensors that an optimizer keeps for a parameter, where it is not as `states_per_element` says."""


def states_per_element(optimizer: Optimizer | None) -> int:
    """Numbers that an optimizer keeps for each element that it trains.

    Args:
        optimizer: one that works element by element; None: nothing is trained.

    Example:
        >>> states_per_element(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
        1
    """
    if optimizer is None:
        return 0
    kind, options = type(optimizer).__name__, optimizer.defaults
    if kind == "SGD":
        return int(options["momentum"] > 0)
    if kind == "RMSprop":
        return 1 + int(options["momentum"] > 0) + int(options["centered"])
    return _STATES.get(kind, 2) + int(options.get("amsgrad", False))


def job_of(plans: Sequence[UnitPlan], optimizer: Optimizer | None, precision: StatePrecision, micro_batches: int = 1) -> Job:
    """Facts of a model and its optimizer for the cost model.

    Args:
        plans: the model's units.
        optimizer: that trains them.
        precision: formats of the states.
        micro_batches: of a step.
    """
    every = [(parameter, plan) for plan in plans for _, parameter in plan.parameters]
    trained = [parameter for parameter, plan in every if plan.group is not None]
    kept = states_per_element(optimizer)

    def bytes_of_states(dtype: torch.dtype) -> int:
        master = precision.master(dtype)
        return master.itemsize * (kept + (master != precision.compute(dtype)))  # else the master is a part of the parameters

    return Job(
        parameters=sum(parameter.numel() for parameter, _ in every),
        trainable=sum(parameter.numel() for parameter in trained),
        micro_batches=micro_batches,
        units=len(plans),
        root=sum(parameter.numel() for parameter, plan in every if plan.block is None),
        parameter_bytes=_mean([parameter for parameter, _ in every], lambda dtype: precision.compute(dtype).itemsize),
        gradient_bytes=_mean(trained, lambda dtype: precision.wire(dtype).itemsize),
        accumulator_bytes=_mean(trained, lambda dtype: precision.accumulator(dtype).itemsize),
        state_bytes=_mean(trained, bytes_of_states),
    )


def _mean(parameters: Sequence[Tensor], num_bytes: Callable[[torch.dtype], int]) -> float:
    """Bytes of an element, over parameters of different formats."""
    total = sum(parameter.numel() for parameter in parameters)
    return sum(parameter.numel() * num_bytes(parameter.dtype) for parameter in parameters) / max(total, 1)


def rank_fitting(cluster: Cluster, job: Job, method: Method = "overlapped") -> list[Cost]:
    """The partitions that fit into a device, the best first.

    Args:
        cluster: where.
        job: what is trained.
        method: how collectives over all devices run.

    Raises:
        ValueError: none fits.
    """
    costs = rank_partitions(cluster, job, method)
    fitting = [cost for cost in costs if cost.fits]
    if not fitting:
        least = min(costs, key=lambda cost: cost.memory)
        assert cluster.memory is not None
        raise ValueError(
            f"partition auto: no partition fits into {cluster.memory / 1e9:.3g} GB a device; {least.partition} needs the least,"
            f" {least.memory / 1e9:.3g} GB: use more devices, or raise memory_limit_gb."
        )
    return fitting
