"""Collectives on the grid of ranks give what their definitions say, and the same bits each time, in whatever order one waits."""

import gc
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from sweep import sweep
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from strategies.paro import Collectives, FlatRing, Granularity, HORing, RankGrid
from strategies.paro.collectives import Method
from strategies.paro.ho_ring import Order, WorldCollectives

METHODS: tuple[Method, ...] = get_args(Method)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


class Held:
    """Buffers of every rank, known to all, and what a rank holds of one at each granularity."""

    def __init__(self, grid: RankGrid) -> None:
        self.grid = grid

    def integers(self, rank: int, block: int, dtype: torch.dtype) -> Tensor:
        """Whole numbers whose sums are exact in every type."""
        draw = torch.Generator().manual_seed(1000 * block + rank)
        return torch.randint(-9, 10, (self.grid.n * block,), generator=draw).to(dtype)

    def part(self, full: Tensor, granularity: Granularity) -> Tensor:
        """By the definition: block j ng + i, blocks j ng to (j + 1) ng - 1, or all."""
        grid = self.grid
        blocks = full.view(grid.n, -1)
        if granularity == "G":
            return blocks[grid.rank % grid.m * grid.ng + grid.rank // grid.m].clone()
        return (blocks[grid.j * grid.ng : (grid.j + 1) * grid.ng] if granularity == "I" else blocks).reshape(-1).clone()

    def total(self, ranks: list[int], block: int, dtype: torch.dtype) -> Tensor:
        return torch.stack([self.integers(rank, block, torch.float64) for rank in ranks]).sum(0).to(dtype)


def ranks_that_sum(grid: RankGrid, source: Granularity, target: Granularity) -> list[int]:
    if (source, target) == ("N", "I"):
        return [rank for rank in range(grid.n) if rank // grid.m == grid.i]
    if (source, target) == ("I", "G"):
        return [rank for rank in range(grid.n) if rank % grid.m == grid.j]
    return list(range(grid.n)) if source != target else [grid.rank]


def steps(coarser: bool) -> Iterator[tuple[Granularity, Granularity]]:
    order = get_args(Granularity)
    pairs = [(a, b) for a, b in product(order, order) if order.index(a) <= order.index(b)]
    return iter([(b, a) for a, b in pairs] if coarser else pairs)


def wrong_results(group_sizes: list[int]) -> list[Any]:
    """Every operation, method, type and a block of one, of several, and of no elements; what came out wrong."""
    wrong: list[Any] = []
    for m in group_sizes:
        grid = RankGrid(m)
        held = Held(grid)
        for method, dtype, block in product(METHODS, DTYPES, (0, 1, 7)):
            if dtype != torch.float32 and (block != 7 or grid.n > 4):
                continue
            collectives = Collectives(grid, method)
            full = held.integers(0, block, dtype)
            for source, target in steps(coarser=True):
                out = torch.full_like(held.part(full, target), 99)
                collectives.all_gather(out, held.part(full, source), source, target)
                if not torch.equal(out, held.part(full, target)):
                    wrong.append((m, method, dtype, block, "all_gather", source, target))
            mine = held.integers(grid.rank, block, dtype)
            for source, target in steps(coarser=False):
                expected = held.part(held.total(ranks_that_sum(grid, source, target), block, dtype), target)
                out, given = torch.full_like(expected, 99), held.part(mine, source)
                collectives.reduce_scatter(out, given, source, target)
                if not torch.equal(out, expected) or not torch.equal(given, held.part(mine, source)):
                    wrong.append((m, method, dtype, block, "reduce_scatter", source, target))
            for granularity in get_args(Granularity):
                out = held.part(mine, granularity)
                collectives.all_reduce(out, granularity)
                summed = ranks_that_sum(grid, granularity, "G")
                if not torch.equal(out, held.part(held.total(summed, block, dtype), granularity)):
                    wrong.append((m, method, dtype, block, "all_reduce", granularity))
            if grid.n == 1 and collectives.sent:
                wrong.append((m, method, "sent", collectives.sent))
    return wrong


@pytest.mark.parametrize(
    ("n", "group_sizes"),
    [pytest.param(8, [2, 4], marks=pytest.mark.slow), (6, [2, 3]), pytest.param(4, [1, 4], marks=pytest.mark.slow), (1, [1])],
)
def test_layout_and_sums_are_exact_on_every_grid(pool: RankPool, n: int, group_sizes: list[int]) -> None:
    assert pool.run(wrong_results, group_sizes, world_size=n) == [[]] * n


def of_all_ranks(tensor: Tensor) -> Tensor:
    """As torch gathers it: (n, ...), by rank."""
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, tensor)
    return torch.stack(pieces)


def rings(grid: RankGrid, order: Order) -> list[WorldCollectives]:
    return [HORing(grid, order=order), HORing(grid, "two_phase", order=order), FlatRing(grid, order=order)]


def wrong_rings() -> list[Any]:
    """By themselves, in the order of ranks as torch has it; with random numbers, twice, and against each other."""
    wrong: list[Any] = []
    grid = RankGrid(2)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for dtype, block, order in product((torch.float32, torch.bfloat16), (1, 300), get_args(Order)):
        mine = torch.randn(grid.n * block, generator=draw).to(dtype)
        everyone = of_all_ranks(mine)
        place = grid.rank if order == "rank" else grid.block
        for ring in rings(grid, order):
            name = type(ring).__name__, getattr(ring, "method", ""), dtype, block, order
            summed, again = torch.empty(block, dtype=dtype), torch.empty(block, dtype=dtype)
            ring.reduce_scatter(summed, mine)
            ring.reduce_scatter(again, mine)
            wide = torch.empty(block, dtype=torch.float32)
            ring.reduce_scatter(wide, mine)
            exact = everyone.double().sum(0).view(grid.n, -1)[place]
            size = everyone.double().abs().sum(0).view(grid.n, -1)[place]
            eps = torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 else grid.n)
            if not torch.equal(summed, again) or not torch.equal(summed, wide.to(dtype)):
                wrong.append((*name, "two runs differ"))
            if ((wide - exact).abs() > eps * size).any():
                wrong.append((*name, "sum is off"))
            gathered, reduced = torch.empty_like(mine), mine.clone()
            ring.all_gather(gathered, summed)
            ring.all_reduce(reduced)
            if not torch.equal(gathered, reduced):
                wrong.append((*name, "all-reduce is not reduce-scatter, then all-gather"))
            if not torch.equal(of_all_ranks(reduced), reduced.expand(grid.n, -1)):
                wrong.append((*name, "ranks have different bits"))
            if order == "rank" and not torch.equal(of_all_ranks(summed).view(-1), gathered):
                wrong.append((*name, "not the order of torch"))
            inside = gathered.clone()
            inside.view(grid.n, -1)[torch.arange(grid.n) != place] = 0
            ring.all_gather(inside, inside.view(grid.n, -1)[place])
            if not torch.equal(inside, gathered):
                wrong.append((*name, "in place"))
    return wrong


@pytest.mark.parametrize("n", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_rings_sum_alike_each_time_and_on_each_rank(pool: RankPool, n: int) -> None:
    assert pool.run(wrong_rings, world_size=n) == [[]] * n


def narrow_sums() -> list[float]:
    grid = RankGrid(4)
    collectives = Collectives(grid)
    full = torch.full((4,), 256.0 if grid.rank == 0 else 1.0, dtype=torch.bfloat16)
    wide, narrow = torch.empty(1), torch.empty(1, dtype=torch.bfloat16)
    collectives.reduce_scatter(wide, full, "N", "I")
    collectives.reduce_scatter(narrow, full, "N", "I")
    return [wide.item(), narrow.item()]


def test_numbers_from_a_narrow_wire_are_summed_in_float32(pool: RankPool) -> None:
    """In bfloat16 256 + 1 is 256 again."""
    assert pool.run(narrow_sums, world_size=4) == [[259.0, 260.0]] * 4


def in_flight(method: Method) -> tuple[bool, bool]:
    """Many operations at once, of both kinds, awaited backwards and between others that block."""
    grid = RankGrid(2)
    held = Held(grid)
    collectives, ring = Collectives(grid, method), HORing(grid, order="rank")
    waiting, found, expected = [], [], []
    for round in range(12):
        block = round % 3 * 50 + 1
        mine = held.integers(grid.rank, block, torch.float32)
        for source, target in (("G", "N"), ("I", "N"), ("G", "I")):
            full = held.integers(0, block, torch.float32)
            out = torch.empty_like(held.part(full, target))
            waiting.append(collectives.all_gather(out, held.part(full, source), source, target, async_op=round % 4 != 3))
            found.append(out)
            expected.append(held.part(full, target))
        for source, target in (("N", "G"), ("N", "I"), ("I", "G")):
            total = held.total(ranks_that_sum(grid, source, target), block, torch.float32)
            out = torch.empty_like(held.part(total, target))
            part = held.part(mine, source)
            waiting.append(collectives.reduce_scatter(out, part, source, target, async_op=round % 3 != 2))
            found.append(out)
            expected.append(held.part(total, target))
        for use in (collectives, ring):
            out = mine.clone()
            args = ("N",) if use is collectives else ()
            waiting.append(use.all_reduce(out, *args, async_op=True))
            found.append(out)
            expected.append(held.total(list(range(grid.n)), block, torch.float32))
    order = torch.randperm(len(waiting), generator=torch.Generator().manual_seed(grid.rank)).tolist()
    for index in order:
        if (work := waiting[index]) is not None:
            work.wait()
            work.wait()
    sent = dict(collectives.sent)
    collectives.reset()
    return all(map(torch.equal, found, expected)), bool(sent) and not collectives.sent


@pytest.mark.parametrize("method", sweep(METHODS))
def test_operations_in_flight_neither_mix_nor_block_one_another(pool: RankPool, method: Method) -> None:
    assert pool.run(in_flight, method, world_size=4, timeout=60) == [(True, True)] * 4


def as_dtensors() -> list[bool]:
    grid = RankGrid(2)
    full = torch.arange(24.0)
    held = Held(grid)
    placements = {"G": [Shard(0), Shard(0)], "I": [Shard(0), Replicate()], "N": [Replicate(), Replicate()]}
    ranks, table = dist.get_process_group_ranks, grid.mesh.mesh
    return [
        torch.equal(DTensor.from_local(held.part(full, letter), grid.mesh, placement).full_tensor(), full)  # type: ignore[arg-type]
        for letter, placement in placements.items()
    ] + [
        ranks(grid.intra) == ranks(grid.intra_reduce) == table[:, grid.i].tolist(),
        ranks(grid.inter) == ranks(grid.inter_reduce) == table[grid.j].tolist(),
        (grid.block, grid.num_groups) == (grid.block_of(grid.rank), 3) and grid.rank_at(grid.i, grid.j) == grid.rank,
    ]


def test_shards_are_dtensors_of_the_mesh(pool: RankPool) -> None:
    assert pool.run(as_dtensors, world_size=6) == [[True] * 6] * 6


def refusals() -> list[str]:
    grid = RankGrid(2)
    collectives = Collectives(grid)
    full, shard, block = torch.zeros(8), torch.zeros(4), torch.zeros(2)
    attempts = [
        lambda: RankGrid(3),
        lambda: RankGrid(0),
        lambda: RankGrid(2, "tpu"),
        lambda: Collectives(grid, "ring"),  # type: ignore[arg-type]
        lambda: HORing(grid, "flat"),  # type: ignore[arg-type]
        lambda: HORing(grid, order="group"),  # type: ignore[arg-type]
        lambda: collectives.all_gather(shard, full, "N", "I"),
        lambda: collectives.reduce_scatter(full, shard, "I", "N"),
        lambda: collectives.all_gather(full, shard, "G", "N"),
        lambda: collectives.all_gather(full, block, "I", "N"),
        lambda: collectives.reduce_scatter(shard, full.view(2, 4), "N", "I"),
        lambda: collectives.all_gather(full[::2], block, "G", "I"),
        lambda: collectives.all_gather(full, block.double(), "G", "N"),
        lambda: collectives.all_gather(full.to("meta"), block, "G", "N"),
        lambda: collectives.all_reduce(torch.zeros(7), "N"),
        lambda: collectives.all_reduce(torch.zeros(7), "I"),
        lambda: collectives.all_reduce(full, "X"),  # type: ignore[arg-type]
        lambda: collectives.all_gather(full, block, "D", "N"),  # type: ignore[arg-type]
    ]
    said = []
    for number, attempt in enumerate(attempts):
        with pytest.raises(ValueError) as error:
            attempt()
            raise AssertionError(f"attempt {number} was not refused")
        said.append(str(error.value))
    assert not collectives.sent
    return said


def test_impossible_requests_are_refused_before_anything_is_sent(pool: RankPool) -> None:
    said = pool.run(refusals, world_size=4)[0]
    for found, expected in zip(
        said,
        [
            "group_size=3 does not divide the 4 ranks; it may be 1, 2, 4.",
            "group_size=0 does not divide the 4 ranks",
            "device_type='tpu', but the process group serves only cpu, cuda",
            "method='ring' must be one of overlapped, two_phase, flat",
            "method='flat' must be one of overlapped, two_phase",
            "order='group' must be one of block, rank",
            "the target is finer; use reduce_scatter",
            "the target is coarser; use all_gather",
            "the larger buffer is 4 times the smaller one, got 8 and 4 elements; pad the buffer to a multiple of 4",
            "the larger buffer is 2 times the smaller one, got 8 and 2",
            "1-D and contiguous, got shape (2, 4)",
            "1-D and contiguous",
            "different types, torch.float32 and torch.float64",
            "a buffer lies on meta, but the grid was made for cpu",
            "got 7 and 1 elements",
            "got 7 and 3 elements",
            "granularity 'X' must be one of N, I, G",
            "granularity 'D' must be one of N, I, G",
        ],
        strict=True,
    ):
        assert expected in found
    with pytest.raises(RuntimeError, match="not initialised"):
        RankGrid(1)


def deserted() -> str:
    grid = RankGrid(1, timeout=timedelta(seconds=4))  # its groups are made in that time, too
    if grid.rank:
        return ""
    work = Collectives(grid).all_gather(torch.zeros(2), torch.zeros(1), "G", "N", async_op=True)
    assert work is not None
    with pytest.raises(RuntimeError) as error:
        work.wait()
    return str(error.value)


@pytest.mark.slow  # waits for the time-out
def test_a_peer_that_never_comes_is_an_error_of_wait(pool: RankPool) -> None:
    assert "imed out" in pool.run(deserted, world_size=2)[0]


def opened_and_closed() -> tuple[int, int, int]:
    """Threads of this process before a grid was made, while it lived, and after it was closed."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    gc.collect()  # of grids that other tests have left
    before = threads()
    grid = RankGrid(2)
    grid.add_flat_rings()
    Collectives(grid).all_gather(torch.zeros(4), torch.zeros(1), "G", "N")
    living = threads()
    grid.close()
    grid.close()
    return before, living, threads()


def test_a_closed_grid_leaves_no_threads(pool: RankPool) -> None:
    for before, living, after in pool.run(opened_and_closed, world_size=4):
        assert before == after < living
