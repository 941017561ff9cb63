"""Meshes have the groups that their axes say, and the traffic of collectives is counted as they are defined."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel

from strategies.mesh import axis_group, axis_ranks, named_mesh
from strategies.traffic import Traffic, Transfer


def ranks_of_axes() -> tuple[list[int], list[int], float]:
    mesh = named_mesh("cpu", replicate=-1, shard=2)
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=axis_group(mesh, "replicate"))
    return axis_ranks(mesh, "replicate"), axis_ranks(mesh, "shard"), total.item()


def test_last_axis_runs_fastest(pool: RankPool) -> None:
    found = pool.run(ranks_of_axes, world_size=4)
    assert [across for across, _, _ in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [inside for _, inside, _ in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [total for _, _, total in found] == [2, 4, 2, 4]


def errors() -> list[str]:
    said = []
    for axes in ({"replicate": 3}, {"replicate": -1, "shard": 4}, {"a": -1, "b": -1}, {"a": 0}):
        with pytest.raises(ValueError) as error:
            named_mesh("cpu", **axes)
        said.append(str(error.value))
    with pytest.raises(ValueError) as error:
        axis_group(named_mesh("cpu", replicate=2), "shard")
    return [*said, str(error.value)]


def test_impossible_meshes_are_refused(pool: RankPool) -> None:
    said = pool.run(errors, world_size=2)[0]
    assert "named_mesh(replicate=3): the sizes do not multiply to the number of processes, 2" in said[0]
    assert "do not multiply" in said[1] and "one of them may be -1" in said[2] and "must be positive" in said[3]
    assert "no axis 'shard'; it has replicate" in said[4]
    with pytest.raises(RuntimeError, match="not initialised"):
        named_mesh("cpu", replicate=1)


def counted() -> list[tuple[str, int, str]]:
    mesh = named_mesh("cpu", node=2, local=2)
    near, far = axis_group(mesh, "local"), axis_group(mesh, "node")
    x = torch.zeros(6)  # 24 bytes
    with Traffic(neighbours=2) as traffic:
        dist.all_reduce(x, group=near)
        dist.all_reduce(x, group=far, async_op=True).wait()
        dist.broadcast(x, src=0)
        dist.all_gather_into_tensor(x.new_empty(12), x, group=far)
        dist.all_gather([torch.empty(6), torch.empty(6)], x, group=near)
        dist.reduce_scatter_tensor(x.new_empty(3), x, group=near)
        dist.all_to_all_single(torch.empty(6), x, group=near)
        functional.wait_tensor(functional.all_gather_tensor(x, 0, far))
        functional.wait_tensor(functional.all_reduce(x, "sum", near))
        dist.barrier()
        x + 1  # no collective
    dist.all_reduce(x)  # no longer watched
    return [(transfer.operation, transfer.num_bytes, transfer.link) for transfer in traffic.transfers]


def test_each_collective_is_counted_by_size_and_link(pool: RankPool) -> None:
    found = pool.run(counted, world_size=4)
    assert found[0] == found[3] == [
        ("all_reduce", 24, "intra"),
        ("all_reduce", 24, "inter"),
        ("broadcast", 24, "inter"),
        ("all_gather", 48, "inter"),
        ("all_gather", 48, "intra"),
        ("reduce_scatter", 24, "intra"),
        ("all_to_all", 24, "intra"),
        ("all_gather", 48, "inter"),
        ("all_reduce", 24, "intra"),
        ("barrier", 0, "inter"),
    ]  # fmt: skip


def gradients_of_ddp() -> tuple[int, dict[Any, int]]:
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    parallel = DistributedDataParallel(network)
    with Traffic() as traffic:
        parallel(torch.ones(2, 4)).sum().backward()
    assert all(transfer.link == "intra" for transfer in traffic.transfers)
    return traffic.num_bytes("all_reduce"), traffic.counts()


def test_gradients_that_ddp_reduces_in_the_backward_pass_are_counted(pool: RankPool) -> None:
    for num_bytes, counts in pool.run(gradients_of_ddp, world_size=2):
        assert num_bytes == 4 * (4 * 8 + 8 + 8 * 4 + 4)
        assert set(counts) == {("all_reduce", "intra")}


def test_ring_sends_twice_what_a_gather_does() -> None:
    reduce, gather = (Transfer(name, 400, (0, 1, 2, 3), "intra") for name in ("all_reduce", "all_gather"))
    assert (reduce.ring_bytes, gather.ring_bytes) == (600, 300)
    assert Transfer("all_reduce", 400, (2,), "self").ring_bytes == 0
    with pytest.raises(ValueError, match="neighbours=0"):
        Traffic(neighbours=0)
