"""Weights used outside of their block under PaRO: an error that names them, and the way to read them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import LightningModule, Trainer
from sweep import sweep_tuples
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.utils.data import DataLoader

from strategies import PaROStrategy
from strategies.paro import Collectives, PaROEngine, Partition, RankGrid

WIDTH, ROWS = 5, 16
USES: dict[str, Callable[[nn.Module], Any]] = {
    "a norm": lambda block: block.weight.norm(),
    "norms of many": lambda block: torch._foreach_norm(list(block.parameters())),
    "a penalty": lambda block: sum(p.pow(2).sum() for p in block.parameters()),
    "a vector": lambda block: nn.utils.parameters_to_vector(block.parameters()),
    "a product": lambda block: nn.functional.linear(torch.ones(1, WIDTH), block.weight),
    "data": lambda block: block.weight.data,
    "a transpose": lambda block: block.weight.T,
    "detached": lambda block: block.weight.detach(),
    "a list": lambda block: block.weight.tolist(),
    "an array": lambda block: block.weight.numpy(),
    "text": lambda block: str(block.weight),
    "a copy": lambda block: copy.deepcopy(block),
    "a new value": lambda block: nn.init.zeros_(block.weight),
    "other data": lambda block: setattr(block.weight, "data", torch.ones(WIDTH, WIDTH)),
    "states": lambda block: block.state_dict(),
}


class Net(LightningModule):
    """Blocks in a list; its loss has an L2 penalty over all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norms: list[float] = []

    def whole(self) -> Any:
        return self.trainer.strategy.summon_full_params()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        h = batch
        for block in self.blocks:
            h = h + block(h).tanh()
        with self.whole():
            penalty = sum(p.pow(2).sum() for p in self.parameters())
        return (h - batch.roll(1, 1)).square().mean() + 0.05 * penalty

    def on_train_batch_end(self, *_: Any) -> None:
        with self.whole():
            self.norms.append(float(torch.stack([p.norm() for p in self.parameters()]).norm()))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def uses(code: str) -> dict[str, str]:
    torch.manual_seed(0)
    net = Net()
    engine = PaROEngine(net, net.configure_optimizers(), Partition.of(code), Collectives(RankGrid(1)))
    said = {}
    for name, use in USES.items():
        with pytest.raises(RuntimeError) as error:
            use(net.blocks[1])
        said[name] = str(error.value)
    weight = net.blocks[1].weight
    assert isinstance(weight, nn.Parameter) and weight.requires_grad and weight.grad is None and weight.is_leaf
    assert (weight.shape, weight.numel(), weight.dim(), weight.size(0)) == ((WIDTH, WIDTH), WIDTH**2, 2, WIDTH)
    assert (weight.dtype, weight.device, weight.is_floating_point()) == (torch.float32, torch.device("cpu"), True)
    engine.begin_forward()
    net.blocks[1](torch.ones(1, WIDTH)).sum().backward()
    engine.finish_backward()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.weight"):
        weight.norm()
    engine.gather_all()
    assert weight.norm() > 0
    engine.close(restore=True)
    assert weight.norm() > 0 and type(weight) is nn.Parameter
    return said


@pytest.mark.parametrize(("code", "world_size"), [("GGG", 2), ("IIG", 4)])
def test_use_outside_of_the_block_is_an_error_on_all_ranks(pool: RankPool, code: str, world_size: int) -> None:
    for said in pool.run(uses, code, world_size=world_size):
        for use, message in said.items():
            assert "blocks.1." in message and "summon_full_params" in message, use
            assert len(message) < 300


def fit(strategy: str, accumulate: int = 1, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net, world = Net(), get_world_size()
    if strategy == "auto":
        net.whole = torch.enable_grad  # type: ignore[method-assign]
    made: Any = "auto" if strategy == "auto" else PaROStrategy(strategy, group_size=2, **options)
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=made, precision="64-true", max_epochs=1, logger=False,
        accumulate_grad_batches=accumulate, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    size = 4 // world
    trainer.fit(net, DataLoader(rows.view(-1, world, size, WIDTH)[:, get_rank()].reshape(-1, WIDTH), batch_size=size))
    return net.norms, {name: value.detach().clone() for name, value in net.named_parameters()}


@pytest.mark.parametrize(
    ("code", "world_size", "accumulate"), sweep_tuples([("GGG", 2, 1), ("IIG", 4, 2), ("NIG", 4, 1)], quick=(0, 1))
)
def test_norms_and_penalties_of_summoned_weights_are_those_of_one_process(
    pool: RankPool, code: str, world_size: int, accumulate: int
) -> None:
    ((norms, weights),) = pool.run(fit, "auto", accumulate, world_size=1)
    for found, values in pool.run(fit, code, accumulate, world_size=world_size):
        assert found == pytest.approx(norms, rel=1e-10)
        for name, value in values.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-10, atol=1e-10)
