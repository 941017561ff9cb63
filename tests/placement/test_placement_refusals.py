"""Runs that placement refuses, each in one sentence, before the first step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import RankPool
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from placement_runs import data_of, module_of, prompts
from small_llama import QUIET
from tiny import MLP, Tiny, TinyData

from strategies import FlatteningStrategy, InterleavingStrategy, PlacementStrategy, SeparationStrategy
from strategies.placement import PlacementPlan, RolePlan
from zoo.callbacks import EMA, BatchSizeWarmup, SpikeGuard
from zoo.rlhf.algorithm import PPO
from zoo.rlhf.module import RLHF

FLAT = FlatteningStrategy
PLACES = PlacementPlan.flattening().roles


def larger_world() -> PlacementStrategy:
    return PlacementStrategy(PlacementPlan.interleaving(4))


def later_actor() -> PlacementStrategy:
    return PlacementStrategy(PlacementPlan({**PLACES, "actor": RolePlan("1")}))


def no_reference() -> PlacementStrategy:
    return PlacementStrategy(PlacementPlan({name: place for name, place in PLACES.items() if name != "reference"}))


def paro(**options: Any) -> PlacementStrategy:
    return PlacementStrategy(PlacementPlan({**PLACES, "actor": RolePlan("all", "paro", **options)}))


def whole_rollout() -> RLHF:
    """Whitens advantages over the rollout."""
    return module_of(algorithm=PPO(whiten="rollout"))


def of_unit(unit: int) -> Callable[[], RLHF]:
    return partial(module_of, unit=unit)


#: Strategy, callbacks or other options of the Trainer, module, and what is said of them.
CASES: list[tuple[Callable[[], Any], dict[str, Any], Callable[[], Any], str]] = [
    (FLAT, {}, lambda: Tiny(MLP()), "places the models of a module with roles, such as RLHF, which Tiny has not: take ddp"),
    (larger_world, {}, module_of, "actor: ranks='0-3' must be some of the ranks 0 to 1 of this run"),
    (later_actor, {}, module_of, "rank 0, which writes checkpoints and logs, must be one of the actor's ranks"),
    (no_reference, {}, module_of, "The plan has no ranks for reference: give each role of the module some"),
    (partial(paro, partition="NNX"), {}, module_of, "NNX"),
    (partial(paro, group_size=3), {}, module_of, "actor: group_size=3 must divide its 2 ranks, or be 0"),
    (paro, {}, partial(module_of, ema_decay=0.9), "backend=paro keeps no average of the actor: set ema_decay to 0"),
    (DDPStrategy, {}, module_of, "DDPStrategy does not know several models: take FlatteningStrategy"),
    (FLAT, {"gradient_clip_val": 1.0}, module_of, "out, and set model.max_grad_norm"),
    (
        FLAT,
        {"callbacks": EMA()},
        module_of,
        "EMA",
    ),
    (FLAT, {"callbacks": SpikeGuard()}, module_of, "SpikeGuard"),
    (FLAT, {"callbacks": BatchSizeWarmup(1, 2, 9)}, module_of, "BatchSizeWarmup"),
    (FLAT, {}, of_unit(5), "16 samples does not divide into 2 minibatches of units of 5 samples"),
    (FLAT, {}, of_unit(8), "A minibatch of 1 units of 8 samples does not divide over the 2 ranks of actor"),
    (partial(SeparationStrategy, chunks=3), {}, module_of, "2 minibatches do not divide into 3 chunks"),
    (partial(SeparationStrategy, chunks=2), {}, whole_rollout, "needs it whole: set chunks of the plan to 1"),
    (partial(FLAT, ddp_comm_hook=print), {}, module_of, "ddp_comm_hook belongs to another way of reducing"),
]


def refused(folder: Path) -> list[str]:
    said = []
    for strategy, options, module, _ in CASES:
        with pytest.raises(Exception, match="") as error:
            trainer = Trainer(
                **QUIET, devices=2, strategy=strategy(), max_steps=2, enable_checkpointing=False, limit_val_batches=0, **options
            )
            made = module()
            trainer.fit(made, TinyData() if isinstance(made, Tiny) else data_of(folder))
        said.append(f"{type(error.value).__name__}: {error.value}")
    return said


def test_runs_that_do_not_fit_are_refused_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    prompts(tmp_path)
    for said in pool.run(refused, tmp_path, world_size=2):
        expected = [sentence for *_, sentence in CASES]
        assert [one if one in sentence else sentence for one, sentence in zip(expected, said, strict=True)] == expected
        assert all(sentence.startswith("ValueError: ") and len(sentence) <= 312 for sentence in said)


def test_codes_of_paro_are_for_paro() -> None:
    with pytest.raises(ValueError, match="actor: partition and group_size are for backend=paro, not fsdp2: leave them out"):
        PlacementPlan({**PLACES, "actor": RolePlan("all", "fsdp2", "GGG")}).validate(2, [])


def test_interleaving_of_an_odd_world_and_separation_of_one_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="even number of ranks, not 3"):
        InterleavingStrategy().plan(3)
    with pytest.raises(ValueError, match="SeparationStrategy needs at least 2 ranks: start torchrun"):
        SeparationStrategy().plan(1)
