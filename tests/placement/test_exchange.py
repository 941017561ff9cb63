"""Exchange of rows and sync of weights: who takes which rows, what arrives, how many bytes, and who is named if it fails."""

import itertools
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import nn

from strategies.placement.exchange import owners_of_rows, pack, receive, row_bytes, send, share, unpack, waiting
from strategies.placement.sync import buckets, copy_weights, trained_weights
from strategies.traffic import Traffic
from zoo.role_placement import FieldSpec

SPEC: FieldSpec = {"tokens": ((3,), torch.int64), "value": ((2, 2), torch.float32), "score": ((), torch.bfloat16)}
CPU = torch.device("cpu")


def rows_of(numbers: list[int]) -> dict[str, torch.Tensor]:
    """Fields that tell each row."""
    found = {}
    for name, (shape, dtype) in SPEC.items():
        found[name] = torch.tensor(numbers, dtype=dtype).view(-1, *[1] * len(shape)).expand(-1, *shape)
    return found


def test_owners_in_halves_take_the_rows_of_their_pairs() -> None:
    for half in (1, 2, 4):
        ranks = list(range(2 * half))
        own = owners_of_rows(8 * half, 2, ranks, ranks)
        for owners, others in ((ranks[:half], ranks[half:]), (ranks[half:], ranks[:half])):
            found = owners_of_rows(8 * half, 2, owners, ranks)
            assert found == {one: own[one] + own[other] for one, other in zip(owners, others, strict=True)}


@pytest.mark.parametrize("rows", [1, 7, 12])
def test_each_row_has_one_owner(rows: int) -> None:
    worlds = [list(combination) for size in (1, 2, 3) for combination in itertools.combinations(range(4), size)]
    for owners, generators in itertools.product(worlds, worlds):
        found = owners_of_rows(rows, 2, owners, generators)
        assert sorted(itertools.chain(*found.values())) == list(range(rows)) and set(found) == set(owners)
        for taken in found.values():  # units are not cut
            assert all(row % 2 == 0 or row - 1 in taken for row in taken)


def test_rows_are_bytes_and_back() -> None:
    fields = rows_of([4, 5])
    data = pack(fields, SPEC, 2)
    assert data.shape == (2, row_bytes(SPEC)) == (2, 3 * 8 + 4 * 4 + 2)
    assert all(torch.equal(value, fields[name]) for name, value in unpack(data, SPEC).items())


def exchanged() -> tuple[list[bool], dict[str, Any]]:
    """Rank 2 has no rows; chunks go from 0 to 1 and 2, and so do weights."""
    me, right = dist.get_rank(), []
    rows = {0: [3, 1], 1: [0, 2, 4]}
    group = dist.new_group([1, 2])
    assert dist.group.WORLD is not None
    with Traffic() as traffic:
        pending = share(rows_of(rows.get(me, [])), SPEC, rows, dist.group.WORLD, CPU, "numbers")
        found, expected = pending(), rows_of([0, 1, 2, 3, 4])
        right += [torch.equal(found[name], expected[name]) for name in SPEC]
        if me == 0:
            sent = [send(rows_of([n, n + 1]), SPEC, 2, [1, 2]) for n in (10, 20)]
        else:
            arriving = [receive(SPEC, 2, 0, CPU, "a chunk") for _ in range(2)]
            for n, arrived in zip((10, 20), arriving, strict=True):
                right += [torch.equal(arrived()["tokens"], rows_of([n, n + 1])["tokens"])]
        if me == 0:
            for work, _ in itertools.chain(*sent):
                work.wait()
    torch.manual_seed(me)
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).requires_grad_(False), nn.Linear(7, 2).bfloat16())
    before = [weight.clone() for weight in network[1].parameters()]
    with Traffic() as of_sync:
        copy_weights(trained_weights(network), 0, [1, 2], group, 1, "weights")  # type: ignore[arg-type]
    held = [network.state_dict()]
    dist.broadcast_object_list(held, 0)
    same = [torch.equal(value, held[0][name]) for name, value in network.state_dict().items()]
    right += [same == [True, True, me == 0, me == 0, True, True]]
    right += [torch.equal(one, other) for one, other in zip(before, network[1].parameters(), strict=True)]
    sizes = {name: traffic.num_bytes(name) for name in ("all_to_all", "send", "recv")}
    return right, sizes | {"sync": [of_sync.num_bytes(name) for name in ("send", "recv", "broadcast")]}


def test_rows_and_weights_arrive_and_their_bytes_are_the_formula(pool: RankPool) -> None:
    found = pool.run(exchanged, world_size=3)
    assert all(all(right) for right, _ in found)
    width, trained = row_bytes(SPEC), (5 * 7 + 7) * 4 + (7 * 2 + 2) * 2
    assert [sizes["all_to_all"] for _, sizes in found] == [2 * width * 2, 3 * width * 2, 0]
    assert sum(sizes["all_to_all"] for _, sizes in found) == 5 * width * (3 - 1)
    assert [(sizes["send"], sizes["recv"]) for _, sizes in found] == [(2 * 2 * width * 2, 0), (0, 4 * width), (0, 4 * width)]
    assert [sizes["sync"] for _, sizes in found] == [[trained, 0, 0], [0, trained, trained], [0, 0, trained]]


def test_buckets_hold_one_type_and_no_more_than_fits() -> None:
    tensors = [
        torch.zeros(n, dtype=dtype)
        for n, dtype in ((2, torch.float32), (2, torch.float32), (1, torch.float64), (9, torch.float64), (1, torch.float64))
    ]
    assert [[len(each) for each in bucket] for bucket in buckets(tensors, 16)] == [[2, 2], [1], [9], [1]]
    assert list(buckets([], 16)) == []


def silent() -> list[str]:
    """Rank 1 answers nobody."""
    group = dist.new_group(timeout=timedelta(seconds=0.2))
    said = []
    if dist.get_rank() == 0:
        for call in (
            lambda: share(rows_of([0]), SPEC, {0: [0], 1: [1]}, group, CPU, "reward, scores")(),
            lambda: copy_weights([torch.zeros(3)], 2, [1, 0], group, 1, "actor, weight sync"),
        ):
            with pytest.raises(RuntimeError) as error:
                call()
            said.append(str(error.value))
    return said


def test_a_wait_that_fails_names_role_stage_and_ranks(pool: RankPool) -> None:
    (scores, sync), _ = pool.run(silent, world_size=2)
    assert scores.startswith("Rank 0 waited for reward, scores, from ranks 0-1: ") and "timeout_minutes" in scores
    assert sync.startswith("Rank 0 waited for actor, weight sync, from ranks 2,1: ")
    assert all(len(said) <= 300 for said in (scores, sync))


def test_errors_of_the_work_itself_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"), waiting("actor, gradients", [0, 1]):
        raise RuntimeError("shapes do not match")
