"""What the advisor knows of a model, and what it chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from strategies.paro.advisor import job_of, rank_fitting, states_per_element
from strategies.paro.cost_model import Cluster, LinkSpeed
from strategies.paro.precision import StatePrecision
from strategies.paro.units import plan_units

SLOW = Cluster(8, 4, LinkSpeed(1e11), LinkSpeed(1e8))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.frozen = nn.Linear(8, 2).requires_grad_(False)


def plans_of(net: Net) -> list[Any]:
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return plan_units(net, list(net.layers), [trained])


def test_a_model_is_counted_with_what_is_frozen_and_what_stays_gathered() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(parameter for parameter in net.parameters() if parameter.requires_grad)
    job = job_of(plans_of(net), optimizer, StatePrecision(), micro_batches=3)
    assert (job.parameters, job.trainable) == (80 + 3 * 72 + 18, 80 + 3 * 72)
    assert job.root == 80 + 18
    assert job.units == 3 + 2  # layers; what else is trained; what is frozen
    assert (job.parameter_bytes, job.gradient_bytes, job.accumulator_bytes, job.state_bytes) == (4, 4, 4, 8)
    half = job_of(plans_of(net), optimizer, StatePrecision("bfloat16", "bfloat16", "float32"))
    assert (half.parameter_bytes, half.gradient_bytes, half.accumulator_bytes, half.state_bytes) == (2, 2, 4, 12)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=1.0), 0),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), 1),
        (lambda p: torch.optim.RMSprop(p), 1),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), 3),
        (lambda p: torch.optim.Adagrad(p), 1),
        (lambda p: torch.optim.Adadelta(p), 2),
        (lambda p: torch.optim.Adam(p), 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
        (lambda p: torch.optim.Adamax(p), 2),
        (lambda p: torch.optim.NAdam(p), 2),
        (lambda p: torch.optim.RAdam(p), 2),
        (lambda p: torch.optim.Rprop(p), 2),
    ],
)
def test_states_are_as_many_as_the_optimizer_makes(make: Any, expected: int) -> None:
    parameter = nn.Parameter(torch.ones(5))
    optimizer = make([parameter])
    parameter.grad = torch.ones(5)
    optimizer.step()
    kept = sum(isinstance(value, torch.Tensor) and value.shape == (5,) for value in optimizer.state[parameter].values())
    assert states_per_element(optimizer) == kept == expected


def test_memory_decides_where_links_alone_would_not() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(parameter for parameter in net.parameters() if parameter.requires_grad)
    job = job_of(plans_of(net), optimizer, StatePrecision(), micro_batches=4)
    free = rank_fitting(SLOW, job)[0]
    tight, *others = rank_fitting(Cluster(8, 4, SLOW.intra, SLOW.inter, memory=0.3 * free.memory), job)
    assert tight.memory < 0.3 * free.memory < free.memory
    assert tight.step_seconds > free.step_seconds
    assert all(cost.memory < 0.3 * free.memory and cost.step_seconds >= tight.step_seconds for cost in others)
    with pytest.raises(ValueError, match=r"no partition fits .* GGG needs the least"):
        rank_fitting(Cluster(8, 4, SLOW.intra, SLOW.inter, memory=10.0), job)
