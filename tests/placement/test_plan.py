"""Plans: slots, questions about them, what is refused, and their files."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from strategies.placement import PlacementPlan, RolePlan, place_slots, read_plan, write_plan

ROLES = ("actor", "critic", "reference", "reward")
HALF, QUARTER = Fraction(1, 2), Fraction(1, 4)


def slots(*shares: Any, world: int = 8) -> list[list[int]]:
    return list(place_slots(dict(zip(ROLES, shares, strict=True)), world).values())


def test_slots_of_the_paper() -> None:
    assert slots(1, 1, 1, 1) == [[*range(8)]] * 4
    assert slots(1, 1, 0.5, 0.5) == [[*range(8)], [*range(8)], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert slots(0.25, 0.25, 0.25, 0.25) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Those that the official solver gets wrong: roles that overlap where there is room.
    assert slots(0.5, 0.5, 0.5, 0.5) == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert slots(1, 0.5, 0.25, 0.25) == [[*range(8)], [0, 1, 2, 3], [4, 5], [6, 7]]
    assert slots(1, 1, 1, 1, world=1) == [[0]] * 4


@pytest.mark.parametrize("world", [4, 8, 16])
def test_powers_of_two_lie_in_aligned_blocks_in_as_few_passes_as_can_be(world: int) -> None:
    for shares in itertools.product([Fraction(1), HALF, QUARTER], repeat=4):
        placed = slots(*shares, world=world)
        for ranks, share in zip(placed, shares, strict=True):
            assert len(ranks) == share * world and ranks == list(range(ranks[0], ranks[0] + len(ranks)))
            assert ranks[0] % len(ranks) == 0
        passes = max(sum(rank in ranks for ranks in placed) for rank in range(world))
        assert passes == -(-sum(shares) // 1)  # no rank has more models than it must


@pytest.mark.parametrize(("share", "world"), [(HALF, 3), (0, 4), (1.5, 4), (0.3, 8), (QUARTER, 2)])
def test_shares_that_are_no_whole_number_of_ranks_are_refused(share: Any, world: int) -> None:
    with pytest.raises(ValueError, match=f"actor: a share of {share} of {world} ranks is no whole number of them, 1 to {world}"):
        place_slots({"actor": share}, world)


def test_plans_of_the_paper_hold_for_their_worlds() -> None:
    for world in (1, 2, 4, 6):
        PlacementPlan.flattening().validate(world, ROLES)
    plan = PlacementPlan.interleaving(6)
    plan.validate(6, ROLES)
    assert plan.members("reference", 6) == [0, 1, 2] and plan.members("reward", 6) == [3, 4, 5]
    assert plan.inferring(6) == plan.training(6) == plan.members("rollout_critic", 6) == [*range(6)] and not plan.separates
    plan = PlacementPlan.separation(5, train=2, chunks=2, max_lag=1, backend="fsdp2")
    plan.validate(5, ROLES)
    assert plan.training(5) == [0, 1] and plan.inferring(5) == plan.members("rollout_critic", 5) == [2, 3, 4]
    assert [plan.roles[name].backend for name in ("actor", "critic", "reward")] == ["fsdp2", "fsdp2", "replicate"]


def of(chunks: int = 1, max_lag: int = 0, gather: Any = "once", bucket_mb: int = 100, **ranks: Any) -> PlacementPlan:
    roles = {name: where if isinstance(where, RolePlan) else RolePlan(where) for name, where in ranks.items()}
    return PlacementPlan(roles, chunks, max_lag, gather, bucket_mb)


ALL: dict[str, Any] = dict.fromkeys(ROLES, "all")
APART: dict[str, Any] = {"actor": "0", "critic": "0", "reference": "1", "reward": "1"}


@pytest.mark.parametrize(
    ("make", "world", "said"),
    [
        (lambda: of(**ALL | {"reward": RolePlan("")}), 2, "reward: ranks='' must be all, or numbers and ranges"),
        (lambda: of(actor="all", critic="all", reward="all"), 2, "no ranks for reference: give each role"),
        (lambda: of(**ALL, judge="0"), 2, "a place for judge: the roles are actor, critic,"),
        (lambda: of(**ALL | {"critic": "0-4"}), 4, "critic: ranks='0-4' must be some of the ranks 0 to 3 of this run"),
        (lambda: of(**ALL | {"critic": "2-0"}), 4, "critic: ranks='2-0' must be some of the ranks 0 to 3"),
        (lambda: of(**ALL | {"critic": "a"}), 4, "critic: ranks='a' must be all, or numbers"),
        (lambda: of(**ALL | {"actor": "1"}), 2, "rank 0, which writes checkpoints and logs, must be one of the actor's ranks"),
        (lambda: of(**ALL, rollout_actor="1", rollout_critic="1"), 2, "ranks 0-1 both train and infer: .* disjoint"),
        (lambda: of(**APART, rollout_actor="1"), 2, "give rollout_critic a place"),
        (lambda: of(**ALL, max_lag=1), 2, "max_lag=1 needs ranks that only generate: name a rollout_actor"),
        (lambda: of(**dict.fromkeys(ROLES, "0-1")), 4, "leaves the ranks 2-3 of 4 without a role: is it for another world"),
        (lambda: of(**ALL, chunks=0), 2, "chunks=0 and bucket_mb=100 must be at least 1"),
        (lambda: of(**ALL, gather="twice"), 2, "gather='twice' must be one of per_token, once, resident"),
        (lambda: of(**ALL | {"actor": RolePlan("all", "zero")}), 2, "actor: backend='zero' must be one of"),  # type: ignore[arg-type]
        (lambda: of(**ALL | {"reward": RolePlan("all", "fsdp2")}), 2, "reward: backend=fsdp2 is for actor and critic"),
        (lambda: PlacementPlan.interleaving(3), 3, "Interleaving needs an even number of ranks, not 3: start one more"),
        (lambda: PlacementPlan.separation(2, train=2), 2, "Separation of 2 ranks into 2 that train and 0 others: both need one"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit_are_refused(make: Callable[[], PlacementPlan], world: int, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make().validate(world, ROLES)
    assert len(str(error.value)) <= 300


def test_a_plan_is_its_file(tmp_path: Path) -> None:
    for plan in (
        PlacementPlan.interleaving(4, "fsdp2", "resident"),
        PlacementPlan.separation(4, 1, 2, 1),
        of(**ALL, bucket_mb=7),
    ):
        write_plan(plan, tmp_path / "plan.yaml")
        assert read_plan(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "is no plan: it needs roles, and may have bucket_mb, chunks, gather, max_lag"),
        ("roles: {actor: {ranks: all}}\nsize: 3", "is no plan"),
        ("roles: {actor: {place: all}}", "each role has ranks, backend, partition and group_size, and nothing else"),
        ("roles: {actor: all}", "each role has ranks, backend, partition and group_size, and nothing else"),
        ("roles: [", "is no YAML"),
    ],
)
def test_files_that_are_no_plans_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_plan(tmp_path / "plan.yaml")
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "none.yaml")
