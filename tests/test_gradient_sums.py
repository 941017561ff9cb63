"""Sums of gradients do not depend on the order of the passes, and keep what the parameters are."""

import torch
from torch import nn

from zoo.base.gradient_sums import GradientSums


def summed(order: list[int], dtype: torch.dtype = torch.float32, parts: int = 1) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    used, frozen, unused = (nn.Parameter(torch.randn(50, 3, dtype=dtype)) for _ in range(3))
    frozen.requires_grad_(False)
    inputs = torch.randn(8, 50, dtype=dtype) * torch.logspace(-4, 4, 8, dtype=dtype)[:, None]
    sums = [GradientSums([used, frozen, unused]) for _ in range(parts)]
    for place, row in enumerate(order):
        (inputs[row] @ used).sum().backward()
        sums[place % parts].add()
        assert used.grad is None
    sums[0].give(lambda total: [total.add_(other.total) for other in sums[1:]])
    return [used.grad, frozen.grad, unused.grad]


def test_order_and_division_do_not_matter() -> None:
    first = summed([*range(8)])[0]
    assert first is not None and first.dtype == torch.float32 and first.abs().max() > 0
    for parts in (1, 2, 4):
        other = summed([5, 2, 7, 0, 3, 6, 1, 4], parts=parts)[0]
        assert other is not None and torch.equal(first, other)


def test_gradients_stay_when_the_sum_begins_again() -> None:
    double, frozen, unused = summed([*range(8)], torch.float64)
    assert double is not None and double.abs().max() > 0 and frozen is None and unused is None


def test_a_parameter_that_another_process_used_has_its_gradient() -> None:
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    here, there = GradientSums([one]), GradientSums([other])
    (3 * other).sum().backward()
    here.add()
    there.add()
    here.give(lambda total: total.add_(there.total))
    assert one.grad is not None and one.grad.tolist() == [3.0, 3.0]
