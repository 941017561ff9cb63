"""The gradient of unequal batches is that of their union, whichever way it is weighted; the plain mean is not."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from hypothesis import given
from hypothesis import strategies as st
from sweep import sweep
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies.antdt.rank.weighting import GradientReduction, Weighting, loss_scale, reduce_gradients, split_evenly

PLAN = [(5, 2, 9), (1, 14, 1), (0, 8, 8), (6, 5, 5)]  # samples of three ranks; one of them has none in the third step
STEPS = 12


@given(count=st.integers(0, 500), cap=st.one_of(st.none(), st.integers(1, 60)))
def test_micro_batches_are_few_and_even(count: int, cap: int | None) -> None:
    sizes = split_evenly(count, cap)
    assert sum(sizes) == count
    assert len(sizes) == (0 if not count else 1 if cap is None else -(-count // cap))
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert cap is None or all(1 <= size <= cap for size in sizes)


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def step_data(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return x, x.sin().sum(1, keepdim=True)


def train(weighting: Weighting | None, cap: int | None, dtype: torch.dtype, tokens: bool) -> list[Tensor]:
    """Adam on this rank's parts of the batches; with None, as DDP does it by itself."""
    torch.set_default_dtype(dtype)
    world, rank = dist.get_world_size(), dist.get_rank()
    model = DistributedDataParallel(network(), bucket_cap_mb=1e-3)
    handed = []
    reduction = GradientReduction(weighting or "loss", handed_over=lambda: handed.append(1))
    model.register_comm_hook(reduction, reduce_gradients)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(STEPS):
        counts = PLAN[step % len(PLAN)] if world > 1 else (16,)
        x, y = (part.split(counts)[rank] for part in step_data(step))
        shadow = len(x) == 0
        if shadow:
            x, y = (part[:1] for part in step_data(step))
        sizes = split_evenly(len(x), cap)
        micros = list(zip(x.split(sizes), y.split(sizes), strict=True))
        # Where the loss is a mean over tokens, a sample has as many as its first number says.
        weights = [0.0 if shadow else float(weigh(a).sum()) if tokens else float(len(a)) for a, _ in micros]
        total = torch.tensor(sum(weights), dtype=torch.float64)
        dist.all_reduce(total)
        own = sum(weights)
        reduction.share = own / float(total)
        optimizer.zero_grad()
        for number, (a, b) in enumerate(micros):
            model.require_backward_grad_sync = number == len(micros) - 1
            errors = (model(a) - b).square().squeeze(1)
            loss = (errors * weigh(a)).sum() / weigh(a).sum() if tokens else errors.mean()
            scale = 1.0 if weighting is None else loss_scale(weights[number], own, float(total), world, weighting)
            (loss * scale).backward()
        optimizer.step()
    assert len(handed) == STEPS
    return [parameter.detach().clone() for parameter in model.parameters()]


def weigh(x: Tensor) -> Tensor:
    return (x[:, 0].abs() * 5).floor() + 1


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tokens", sweep([False, True], quick=(1,)), ids=["samples", "tokens"])
def test_unequal_batches_give_the_gradient_of_their_union(pool: RankPool, tokens: bool) -> None:
    def ranks(*settings: Any, world_size: int = 3) -> list[list[Tensor]]:
        return pool.run(train, *settings, tokens, world_size=world_size)

    (one,) = ranks("loss", None, torch.float64, world_size=1)
    for weighting in ("loss", "hook"):
        for cap in (None, 3):
            for rank in ranks(weighting, cap, torch.float64):
                assert distance(rank, one) < 1e-12, (weighting, cap)
    assert distance(ranks(None, None, torch.float64)[0], one) > 1e-3


def test_float32_to_rounding(pool: RankPool) -> None:
    (one,) = pool.run(train, "loss", None, torch.float32, False, world_size=1)
    for weighting in ("loss", "hook"):
        assert distance(pool.run(train, weighting, 3, torch.float32, False, world_size=3)[0], one) < 2e-5


def test_shadow_has_no_weight() -> None:
    assert loss_scale(0, 0, 16, 3, "loss") == loss_scale(0, 0, 16, 3, "hook") == 0


def test_one_process_is_not_changed() -> None:
    assert loss_scale(16, 16, 16, 1, "loss") == loss_scale(16, 16, 16, 1, "hook") == 1
