"""Placements of four models: the trained weights are those of one process, whoever does what, saved and continued anywhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from placement_runs import (
    CONFIG,
    MINIBATCHES,
    NEW,
    ROWS,
    Seen,
    difference,
    prompts,
    run,
    same_tokens,
    sent_bytes,
)
from sweep import sweep_tuples

from strategies.placement import PlacementPlan, RolePlan
from strategies.placement.timeline import idle_share

ROW_BYTES = NEW * 8 + 3 * NEW * 4 + 4
"""Of a sample: tokens, three numbers for each of them, and a score."""


def plan_of(backend: str = "replicate", **ranks: str) -> PlacementPlan:
    return PlacementPlan(
        {role: RolePlan(where, backend if role in ("actor", "critic") else "replicate") for role, where in ranks.items()}  # type: ignore[arg-type]
    )


ALONE = plan_of(actor="0", critic="1", rollout_actor="2", rollout_critic="2", reference="3", reward="3")
"""Nobody trains two models, and who generates does not judge."""
APART = plan_of(actor="0-1", critic="2-3", reference="2", reward="3")
"""Half of the ranks generate and score for all."""
DIVIDED = plan_of("fsdp2", actor="0,2", critic="0,2", rollout_actor="1", rollout_critic="3", reference="1", reward="3")


def paro(partition: str, group_size: int = 0, **options: Any) -> PlacementPlan:
    role = RolePlan("all", "paro", partition, group_size)
    return PlacementPlan({"actor": role, "critic": role, "reference": RolePlan(), "reward": RolePlan()}, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placement")
    prompts(folder)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Seen:
    """One process."""
    return run("one", folder, val=True)


def runs(folder: Path, calls: list[tuple[Any, dict[str, Any]]]) -> list[Seen]:
    """Several runs in a row, on each rank."""
    return [run(strategy, folder, **options) for strategy, options in calls]


def of_ranks(pool: RankPool, world: int, folder: Path, *calls: tuple[Any, dict[str, Any]]) -> list[list[Seen]]:
    """The views of all ranks of each run."""
    return [list(each) for each in zip(*pool.run(runs, folder, list(calls), world_size=world), strict=True)]


def weights(seen: Seen, role: str) -> int:
    return sum(value.numel() for name, value in seen.weights.items() if name.startswith(role))


def test_two_ranks_train_the_weights_of_one(pool: RankPool, folder: Path, one: Seen) -> None:
    names = ("flattening", "interleaving", "separation", "chunks", "once", "per_token", "resident")
    found = dict(zip(names, of_ranks(pool, 2, folder, *((name, {}) for name in names)), strict=True))
    for name, ranks in found.items():
        assert same_tokens(one, ranks) and difference(one, ranks[0]) < 1e-7, name
        assert [seen.steps for seen in ranks] == [one.steps, one.steps] == [2 * MINIBATCHES] * 2
        assert not any(age for seen in ranks for age in seen.ages)
    assert difference(found["flattening"][0], found["interleaving"][0]) == 0
    for name in ("separation", "chunks"):
        assert difference(one, found[name][0]) == 0  # a single rank trains, on the same units in the same order
    # Frozen models: twice, once, and where they are used; with as many weights each as the actor.
    whole = sum(seen.frozen_bytes for seen in found["flattening"]) // 2
    assert whole == 2 * 4 * weights(one, "actor")
    assert [seen.frozen_bytes for seen in found["interleaving"]] == [whole // 2, whole // 2]
    assert [seen.frozen_bytes for seen in found["separation"]] == [0, whole]


def test_four_ranks_train_the_weights_of_one_under_any_plan(pool: RankPool, folder: Path, one: Seen) -> None:
    plans = ["interleaving", "chunks", ALONE, APART, DIVIDED]
    found = of_ranks(pool, 4, folder, *((plan, {}) for plan in plans), ("per_token", {"val": True}))
    for plan, ranks in zip([*plans, "per_token"], found, strict=True):
        assert same_tokens(one, ranks) and difference(one, ranks[0]) < 1e-7, plan
    for name, value in found[-1][0].metrics.items():  # 11 prompts on ranks that gather weights together
        assert value == pytest.approx(one.metrics[name], abs=1e-5), name
    interleaving, chunks, alone, apart = found[:4]
    actor, critic = weights(one, "actor"), weights(one, "critic")
    # Who does not need a model has none of it.
    assert [tuple(seen.trained.values()) for seen in alone] == [(actor, 0), (0, critic), (actor, critic), (0, 0)]
    assert [seen.trained["actor"] for seen in apart] == [actor, actor, 0, 0]
    # Bytes: what a role computed goes to all others that infer, a chunk to each rank that trains, trained weights to each copy.
    assert sent_bytes(interleaving, "all_to_all") == 2 * ROWS * ROW_BYTES * (4 - 1)
    assert sent_bytes(chunks, "all_to_all") == 2 * ROWS * ROW_BYTES * (2 - 1)
    frozen_head = CONFIG.vocab_size * CONFIG.hidden_size  # the critic's output head, which it does not use
    trained = 2 * 4 * (actor + critic - frozen_head)
    assert sent_bytes(chunks, "send") == sent_bytes(chunks, "recv") == 2 * ROWS * ROW_BYTES * 2 + trained
    assert [sent_bytes([seen], "broadcast", (2, 3)) for seen in chunks] == [0, 0, trained, trained]
    # Spans: who does what, and nobody does two things at a time.
    assert {(span.role, span.stage) for span in alone[3].spans} >= {("reference", "score"), ("reward", "score")}
    assert {span.stage for span in alone[0].spans if span.role != "wait"} == {"train", "sync"}
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]  # of the last plan
    for rank, seen in enumerate(found[4]):  # and, where a last chunk was sent, the wait until it left
        assert 0 <= sum(event["tid"] == rank for event in events) - len(seen.spans) <= 1
    for seen in alone:
        assert all(earlier.end <= later.begin for earlier, later in zip(seen.spans, seen.spans[1:], strict=False))
        assert 0 < idle_share(seen.spans) < 1


def test_paro_divides_the_states_of_a_role(pool: RankPool, folder: Path, one: Seen) -> None:
    apart = plan_of("paro", actor="0-1", critic="0-1", rollout_actor="2", rollout_critic="2", reference="3", reward="3")
    plans = [
        paro("IIG", 2),
        paro("NNG", gather="per_token"),
        paro("GGG", gather="per_token"),
        paro("GGG", gather="resident"),
        apart,
    ]
    for plan, ranks in zip(plans, of_ranks(pool, 4, folder, *((plan, {}) for plan in plans)), strict=True):
        assert same_tokens(one, ranks) and difference(one, ranks[0]) < 1e-6, plan


def test_checkpoints_of_paro_continue_under_another_plan(pool: RankPool, folder: Path, one: Seen, tmp_path: Path) -> None:
    path, ends = tmp_path / "half.ckpt", [tmp_path / "paro.ckpt", tmp_path / "usual.ckpt"]
    calls = [(paro("IGG", 2), {"save": path, "rollouts": 1, "save_end": ends[0]}), ("flattening", {"checkpoint": path}),
             ("flattening", {"save": path, "rollouts": 1, "save_end": ends[1]}), (paro("GGG"), {"checkpoint": path})]  # fmt: skip
    found = of_ranks(pool, 4, folder, *calls)
    assert all(difference(one, found[number][0]) < 1e-6 for number in (1, 3))
    divided, usual = (torch.load(end, weights_only=True) for end in ends)  # when training has ended
    for name in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(divided[name], usual[name], atol=1e-6, rtol=1e-3)


def test_divided_weights_are_whole_where_older_tokens_are_scored_again(pool: RankPool, folder: Path) -> None:
    # Ranks that no other test divides a model over: torch keeps the groups of a mesh in mind beyond the life of a world.
    places = {"actor": "0,3", "critic": "0,3", "rollout_actor": "1", "rollout_critic": "1", "reference": "2", "reward": "2"}
    plans = [replace(plan_of(backend, **places), max_lag=1, gather="per_token") for backend in ("replicate", "fsdp2", "paro")]
    usual, *others = of_ranks(pool, 4, folder, *((plan, {"rollouts": 3}) for plan in plans))
    assert all(difference(usual[0], ranks[0]) < 1e-6 and ranks[0].ages == [1, 1, 1] for ranks in others)


def test_a_rollout_of_lag_one_is_generated_by_the_weights_before(pool: RankPool, folder: Path, one: Seen, tmp_path: Path) -> None:
    path = tmp_path / "lag.ckpt"
    whole, lag_of_two = of_ranks(
        pool, 2, folder, ("lag", {"rollouts": 3, "save": path}), ("lag", {"rollouts": 3, "checkpoint": path})
    )
    assert same_tokens(one, whole, 1) and not same_tokens(one, whole, 2)
    trainer, generator = whole
    assert trainer.ages == [1, 1, 1] and generator.ages == []
    # The first was generated by the weights that are trained; later ones by older weights, which the importance weights say.
    assert trainer.drift[0] == 0 and min(trainer.drift[1:]) > 1e-4  # type: ignore[type-var]
    assert trainer.metrics["train/importance_weight"] != 1
    # A rollout that waits for its training is a part of the checkpoint.
    assert difference(trainer, lag_of_two[0]) == 0 and lag_of_two[0].ages == [1, 1]


@pytest.mark.parametrize(
    ("first", "then", "ranks"),
    sweep_tuples(
        [("flattening", "chunks", 2), ("separation", "once", 2), ("once", "one", 2), ("one", "interleaving", 2)], quick=(0, 1)
    ),
)
def test_a_checkpoint_continues_under_another_plan(
    pool: RankPool, folder: Path, one: Seen, tmp_path: Path, first: str, then: str, ranks: int
) -> None:
    path = tmp_path / "half.ckpt"
    calls = [(first, {"save": path, "rollouts": 1}), (then, {"checkpoint": path})]
    for name, options in calls:
        last = run(name, folder, **options) if name == "one" else of_ranks(pool, ranks, folder, (name, options))[0][0]
    assert last.steps == one.steps and difference(one, last) < 1e-7


def test_a_checkpoint_continues_on_other_ranks(pool: RankPool, folder: Path, one: Seen, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    of_ranks(pool, 4, folder, (ALONE, {"save": path, "rollouts": 1}))
    ((seen, _),) = of_ranks(pool, 2, folder, ("interleaving", {"checkpoint": path}))
    assert seen.steps == one.steps and difference(one, seen) < 1e-7


def test_models_of_the_library_and_their_adapters(pool: RankPool, folder: Path) -> None:
    adapters = {"llama": True, "actor": {"tuning": "lora"}}
    alone = [run("one", folder, llama=True), run("one", folder, **adapters)]
    found = of_ranks(pool, 2, folder, ("separation", {"llama": True}), ("separation", adapters))
    for expected, ranks in zip(alone, found, strict=True):
        assert same_tokens(expected, ranks) and difference(expected, ranks[0]) < 1e-7
    # Only what is trained travels: with the critic's weights, those of the actor or of its adapters.
    trained = [sum(value.numel() for name, value in seen.weights.items() if "lora" in name) for seen in alone]
    assert trained[0] == 0 < trained[1] < 0.5 * weights(alone[0], "actor")
