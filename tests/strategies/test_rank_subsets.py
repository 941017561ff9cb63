"""Meshes, PaRO's grid and its collectives over some ranks of a job, while the others do other work."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch.distributed.distributed_c10d import _world

from strategies.mesh import axis_group, axis_ranks, named_mesh
from strategies.paro import Collectives, FlatRing, HORing, RankGrid

BLOCK = 3


def meshes() -> tuple[Any, ...]:
    rank = dist.get_rank()
    roles = {"actor": named_mesh("cpu", [0], data=1), "critic": named_mesh("cpu", [1, 2, 3], node=-1, local=1)}
    own = "actor" if rank == 0 else "critic"
    other = "critic" if rank == 0 else "actor"
    with pytest.raises(ValueError) as error:
        axis_group(roles[other], "data" if other == "actor" else "node")
    if rank == 0:
        return str(error.value), roles[own].get_coordinate(), roles[other].get_coordinate()
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=axis_group(roles[own], "node"))
    return str(error.value), total.item(), axis_ranks(roles[own], "node"), axis_ranks(roles[own], "local")


def test_meshes_of_roles(pool: RankPool) -> None:
    actor, *critics = pool.run(meshes, world_size=4)
    assert actor == ("rank 0 is not in the mesh, which is of ranks [1, 2, 3].", (0,), None)
    for rank, found in enumerate(critics, start=1):
        assert found == (f"rank {rank} is not in the mesh, which is of ranks [0].", 6.0, [1, 2, 3], [rank])


def grids() -> list[str]:
    """Collectives of [0, 1, 2, 5] in groups of two, and of [3, 4] in groups of one, at the same time."""
    before = len(_world.pg_map)
    ranks, m = ([3, 4], 1) if dist.get_rank() in (3, 4) else ([0, 1, 2, 5], 2)
    grid = RankGrid(m, ranks=ranks)
    wrong = [] if grid.ranks[grid.rank] == dist.get_rank() else ["rank"]
    n = grid.n
    held = [torch.arange(n * BLOCK) + 100.0 * (rank + 1) for rank in ranks]  # the full buffers, by rank of the grid
    total = torch.stack(held).sum(0)
    for order in ("block", "rank"):
        place = grid.block if order == "block" else grid.rank
        mine = slice(place * BLOCK, (place + 1) * BLOCK)
        for ring in (HORing(grid, "overlapped", order), HORing(grid, "two_phase", order), FlatRing(grid, order)):  # type: ignore[arg-type]
            for async_op in (False, True):
                shard, out, summed = torch.empty(BLOCK), torch.empty(n * BLOCK), held[grid.rank].clone()
                work = [ring.reduce_scatter(shard, held[grid.rank], async_op), ring.all_reduce(summed, async_op)]
                for each in work:
                    if each is not None:
                        each.wait()
                gathered = ring.all_gather(out, total[mine].clone(), async_op)
                if gathered is not None:
                    gathered.wait()
                name = f"{type(ring).__name__} {order} {async_op}"
                right = (torch.equal(shard, total[mine]), torch.equal(summed, total), torch.equal(out, total))
                wrong += [] if all(right) else [f"{name} {right}"]
    collectives = Collectives(grid)
    in_place = [held[rank] for rank in range(n) if rank % m == grid.j]  # what ranks in this place of all groups hold
    summed = held[grid.rank].clone()[: grid.ng * BLOCK]
    collectives.all_reduce(summed, "I")
    expected = torch.stack(in_place).sum(0)[: grid.ng * BLOCK]
    wrong += [] if torch.equal(summed, expected) else ["Collectives"]
    wrong += [] if grid.mesh.mesh.T.flatten().tolist() == ranks else ["mesh"]
    grid.close()
    grid.close()
    wrong += [] if len(_world.pg_map) == before else ["groups are left"]
    return wrong


def test_collectives_of_two_grids_at_once(pool: RankPool) -> None:
    assert pool.run(grids, world_size=6) == [[]] * 6


def errors() -> list[str]:
    said = []
    for ranks in ([1 - dist.get_rank()], [0, 0], [1, 0], [0, 2], []):
        with pytest.raises(ValueError) as error:
            RankGrid(1, ranks=ranks)
        said.append(str(error.value))
    return said


def test_ranks_that_cannot_make_a_grid_are_refused(pool: RankPool) -> None:
    outside, *others = pool.run(errors, world_size=2)[0]
    assert outside == "RankGrid: rank 0 is not one of ranks=[1]: only these ranks make and use the grid."
    assert all("must be some of the job's ranks, 0 to 1, in increasing order" in said for said in others)
