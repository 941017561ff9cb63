"""Members of the family that torch has too take the same steps: DDP, FSDP2 over all ranks, FSDP2 on a 2-D mesh."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from distributed import RankPool
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from strategies.paro import Collectives, PaROEngine, Partition, RankGrid

WIDTH, MICRO_BATCHES, STEPS = 9, 2, 3
Step = Callable[[Tensor, bool], None]


class Tower(nn.Module):
    """Layers, and a root; no size is a multiple of the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.out(x).square().mean() / MICRO_BATCHES


def train(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Step, after: Callable[[], None] = lambda: None) -> None:
    """Each rank on its own samples."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for part in range(MICRO_BATCHES):
            rows = torch.randn(get_world_size(), 2, WIDTH, generator=generator, dtype=torch.float64)
            backward(rows[get_rank()], part == MICRO_BATCHES - 1)
        optimizer.step()
        after()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def with_paro(code: str) -> list[Tensor]:
    model = Tower().double()
    optimizer = adamw(model)
    engine = PaROEngine(model, optimizer, Partition.of(code), Collectives(RankGrid(2)))

    def backward(rows: Tensor, last: bool) -> None:
        engine.last = last
        engine.begin_forward()
        model(rows).backward()
        engine.finish_backward()

    train(model, optimizer, backward, engine.sync_parameters)
    with engine.full_parameters():
        return [parameter.detach().clone() for parameter in model.parameters()]


def with_ddp() -> list[Tensor]:
    model = DistributedDataParallel(Tower().double())

    def backward(rows: Tensor, last: bool) -> None:
        with nullcontext() if last else model.no_sync():
            model(rows).backward()

    train(model, adamw(model), backward)
    return [parameter.detach().clone() for parameter in model.parameters()]


def with_fsdp2(replicas: int) -> list[Tensor]:
    model = Tower().double()
    ranks = get_world_size() // replicas
    mesh = init_device_mesh("cpu", (replicas, ranks), mesh_dim_names=("inter", "intra"))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh if replicas > 1 else mesh["intra"])
    fully_shard(model, mesh=mesh if replicas > 1 else mesh["intra"])

    def backward(rows: Tensor, last: bool) -> None:
        model.set_requires_all_reduce(last)  # type: ignore[operator]
        model(rows).backward()

    train(model, adamw(model), backward)
    whole = [parameter.full_tensor() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return [tensor.detach().clone() for tensor in whole]


def pair(code: str, peer: str) -> tuple[list[Tensor], list[Tensor]]:
    peers = {"DDP": with_ddp, "FSDP2": lambda: with_fsdp2(1), "HSDP": lambda: with_fsdp2(2)}
    return with_paro(code), peers[peer]()


@pytest.mark.parametrize(
    ("code", "peer"),
    [
        pytest.param("NNN", "DDP", marks=pytest.mark.slow),
        ("GGG", "FSDP2"),
        pytest.param("III", "HSDP", marks=pytest.mark.slow),
        pytest.param("IIG", "FSDP2", marks=pytest.mark.slow),
    ],
)
def test_a_code_takes_the_steps_of_its_peer(pool: RankPool, code: str, peer: str) -> None:
    for ours, theirs in pool.run(pair, code, peer, world_size=4):
        assert len(ours) == len(theirs) == 6
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
