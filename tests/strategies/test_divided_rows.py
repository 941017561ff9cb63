"""Rows divided over ranks, evenly or not, train and are stored as whole ones."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from strategies.divided_rows import DividedRows, Layout

CPU = torch.device("cpu")
CLIP, STEPS = 0.5, 3


class Tables(nn.Module):
    """Two tables of different length, one of them with a number a row, and a layer that every rank has."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(num_rows)
        weight = torch.randn(num_rows, 3, generator=draw, dtype=torch.float64)
        self.network = nn.ModuleDict({"table": nn.Embedding.from_pretrained(weight, freeze=False)})
        self.bias = nn.Parameter(torch.randn(num_rows + 1, generator=draw, dtype=torch.float64))
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.constant_(self.layer.bias, 0.1)

    @property
    def tables(self) -> list[nn.Parameter]:
        return [self.network["table"].weight, self.bias]


def rows(num_rows: int, layout: Layout) -> tuple[list[list[int]], bool]:
    """The rows of each rank; whether dividing and uniting give back what the first rank had, and a second time nothing."""
    module = Tables(num_rows)
    first = [parameter.detach().clone() for parameter in module.tables]
    if dist.get_rank():
        nn.init.zeros_(module.tables[0])
    divided = DividedRows(module, module.tables, dist.group.WORLD, CPU, layout)
    divided.divide()
    parts = zip(module.tables, first, strict=True)
    kept = all(torch.equal(part, whole[divided.rows(len(whole), divided.rank)]) for part, whole in parts)
    divided.unite()
    divided.unite()
    same = all(torch.equal(again, whole) for again, whole in zip(module.tables, first, strict=True))
    return [list(range(num_rows))[divided.rows(num_rows, rank)] for rank in range(divided.size)], kept and same


@pytest.mark.parametrize("layout", ["block", "mod"])
@pytest.mark.parametrize(("world_size", "num_rows"), [(2, 4), (2, 7), (3, 8), (3, 3)])
def test_united_rows_are_those_that_were_divided(pool: RankPool, world_size: int, num_rows: int, layout: Layout) -> None:
    for parts, same in pool.run(rows, num_rows, layout, world_size=world_size):
        assert same
        assert sorted(row for part in parts for row in part) == list(range(num_rows))
        assert [len(part) for part in parts] == [len(range(rank, num_rows, world_size)) for rank in range(world_size)]
        for rank, part in enumerate(parts):
            assert part == (list(range(rank, num_rows, world_size)) if layout == "mod" else list(range(part[0], part[-1] + 1)))


def train(num_rows: int, layout: Layout | None, checkpoint: dict[str, Any] | None) -> tuple[dict[str, Any], list[float]]:
    """Some steps, in one process (None) or with divided rows; a checkpoint, whole on rank 0, and the norms of the gradients."""
    module, divided = Tables(num_rows), None
    mine = [slice(None), slice(None)]
    if layout is not None:
        divided = DividedRows(module, module.tables, dist.group.WORLD, CPU, layout)
        divided.divide()
        mine = [divided.rows(num_rows + more, divided.rank) for more in (0, 1)]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    if checkpoint is not None:
        checkpoint = copy.deepcopy(checkpoint)  # an optimizer goes on with the tensors that it is given
        weights, state = checkpoint, checkpoint["optimizer"]
        if divided is not None:
            weights, state = divided.part_of_weights(checkpoint), divided.part_of_state(optimizer, state)
        module.load_state_dict(weights["state_dict"])
        optimizer.load_state_dict(state)
    targets = [torch.arange(num_rows * 3, dtype=torch.float64).view(-1, 3), torch.arange(num_rows + 1, dtype=torch.float64)]
    norms: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        terms = [(table - target[part]).square().sum() for table, target, part in zip(module.tables, targets, mine, strict=True)]
        torch.stack([*terms, module.layer(torch.ones(3, dtype=torch.float64)).square().sum()]).sum().backward()
        if divided is None:
            norms.append(float(clip_grad_norm_(module.parameters(), CLIP)))
        else:
            norms.append(float(divided.gradient_norm(module.parameters())))
            divided.clip_gradients(module.parameters(), CLIP)
        optimizer.step()
    saved = {"state_dict": {name: value.clone() for name, value in module.state_dict().items()}}
    # An average, beside the weights and by names of a part of the module.
    saved["average"] = {"table.weight": module.tables[0].detach() / 2}
    state = optimizer.state_dict()
    if divided is not None:
        saved, state = divided.whole_weights(saved), divided.whole_state(optimizer, state)
    return {**saved, "optimizer": state}, norms


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("layout", ["block", "mod"])
def test_a_checkpoint_is_that_of_one_process_and_continues_under_any_number_of_ranks(pool: RankPool, layout: Layout) -> None:
    num_rows = 7
    half, norms = train(num_rows, None, None)
    end, more_norms = train(num_rows, None, half)
    assert min(norms + more_norms) > CLIP
    for world_size, other in ((2, 3), (3, 2)):
        ranks = pool.run(train, num_rows, layout, None, world_size=world_size)
        assert_same(ranks[0][0], half)
        for rank in pool.run(train, num_rows, layout, ranks[0][0], world_size=other):
            assert rank[1] == pytest.approx(more_norms, rel=1e-10)
        assert_same(pool.run(train, num_rows, layout, ranks[0][0], world_size=other)[0][0], end)
        resumed_whole, _ = train(num_rows, None, ranks[0][0])
        assert_same(resumed_whole, end)


def reduced_by_ddp() -> list[bool]:
    """Whether the gradients of a divided table and of a whole layer are the same on all ranks, whose losses differ."""
    module = Tables(4)
    divided = DividedRows(module, module.tables[:1], dist.group.WORLD, CPU)
    divided.divide()
    divided.hide_from_ddp(module)
    module.forward = lambda factor: factor * sum(parameter.sum() for parameter in module.parameters())  # type: ignore[method-assign]
    wrapped = nn.parallel.DistributedDataParallel(module)
    wrapped(1.0 + dist.get_rank()).backward()
    divided.show_to_ddp(module)
    assert "_ddp_params_and_buffers_to_ignore" not in vars(module)
    gradients = [parameter.grad for parameter in (module.tables[0], module.layer.weight)]
    return [bool((gradient == 1.5).all()) for gradient in gradients if gradient is not None]


def test_ddp_reduces_what_is_not_divided(pool: RankPool) -> None:
    assert pool.run(reduced_by_ddp) == [[False, True]] * 2


def test_a_table_with_fewer_rows_than_ranks_is_refused(pool: RankPool) -> None:
    assert all("network.table.weight has 1 rows" in said for said in pool.run(refused))


def refused() -> str:
    module = Tables(1)
    with pytest.raises(ValueError) as error:
        DividedRows(module, module.tables, dist.group.WORLD, CPU)
    return str(error.value)
