"""EDiT's ranks agree on what all do at once, with replicas of one rank and of several, in step and not, and after odd resumes."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from edit_runs import (
    FULL,
    WIDTH,
    Layer,
    Numbers,
    NumbersData,
    Residual,
    loader,
    model_of,
    trainer_of,
    weights_of,
)
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from sweep import sweep_tuples
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from strategies import EDiTShardedStrategy, EDiTStrategy
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import RunCheckpoint
from zoo.ling import Ling, LingConfig

WHOLE = partial(EDiTStrategy, 4, warmup_steps=1, **FULL)
SHARDED = partial(EDiTShardedStrategy, shard_size=2, sync_interval=4, warmup_steps=1, **FULL)
KINDS = [
    pytest.param(WHOLE, 2, id="whole-2"), pytest.param(SHARDED, 2, id="sharded-2"),
    pytest.param(SHARDED, 4, id="sharded-4", marks=pytest.mark.slow),
]  # fmt: skip


def saving_trainer(strategy: Any, steps: int, checkpoint: RunCheckpoint, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = trainer_of(strategy, steps, callbacks=[*callbacks, checkpoint], enable_checkpointing=True, **options)
    trainer.checkpoint_callbacks.clear()
    return trainer


def told_to_stop(kind: Callable[..., Any], folder: Path) -> tuple[int, bool, list[int]]:
    """The last rank alone gets a signal in the middle of a round."""
    strategy = kind()
    checkpoint = RunCheckpoint(every_n_steps=100, folder=folder)
    groups: list[int] = []

    class Signal(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            groups.append(dist.get_world_size(strategy.step_group()))
            if trainer.global_step == 6 and dist.get_rank() == dist.get_world_size() - 1:
                checkpoint._told_to_stop = True

    trainer = saving_trainer(strategy, 50, checkpoint, Signal())
    with pytest.raises(BaseException, match="") as stop:
        trainer.fit(model_of(), loader(2))
    return trainer.global_step, "SIGTERM" in type(stop.value).__name__, groups


@pytest.mark.parametrize(("kind", "ranks"), KINDS)
def test_all_stop_after_the_same_step_and_save(pool: RankPool, tmp_path: Path, kind: Callable[..., Any], ranks: int) -> None:
    seen = pool.run(told_to_stop, kind, tmp_path, world_size=ranks)
    # The synchronisation before the tenth step told the others.
    assert all(each == seen[0] for each in seen) and seen[0][:2] == (10, True)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 10
    # Whom a spike guard asks: all in the warm-up, then the ranks of the replica.
    assert seen[0][2] == [ranks, ranks] + [2 if kind is SHARDED else 1] * 8


class Steps(Callback):
    """Local steps of each synchronisation, and the steps at which the run was saved."""

    def __init__(self) -> None:
        self.syncs: list[list[int]] = []
        self.saves: list[int] = []
        self.last: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        report = trainer.strategy.last_sync  # type: ignore[attr-defined]
        if report is not self.last:
            self.last = report
            self.syncs.append(report.steps)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saves.append(trainer.global_step)


def timed(kind: Callable[..., Any], folder: Path) -> tuple[list[int], list[list[int]]]:
    steps = Steps()
    saving_trainer(kind(), 18, RunCheckpoint(minutes=1e-9, folder=folder), steps).fit(model_of(), loader(2))
    return steps.saves, steps.syncs


@pytest.mark.parametrize(("kind", "ranks"), sweep_tuples([*KINDS[:2], (SHARDED, 4)]))
def test_saves_by_time_are_one_a_round(pool: RankPool, tmp_path: Path, kind: Callable[..., Any], ranks: int) -> None:
    runs = pool.run(timed, kind, tmp_path, world_size=ranks)
    saves, syncs = runs[0]
    assert all(run == runs[0] for run in runs) and len(syncs) > 2
    # The wish of the first step travels with the synchronisation four steps later, and the save follows the step after that.
    assert saves[0] == 1 and saves[-1] == 18
    assert {later - earlier for earlier, later in pairwise(saves[1:-1])} == {5}


# Ranks at different steps


def accumulating(folder: Path, kind: Callable[..., Any]) -> int:
    """Epochs that end with an incomplete step, saved and validated as often as can be."""
    trainer = saving_trainer(
        kind(sync_seconds=0.0, min_total_steps=3), 40, RunCheckpoint(minutes=1e-9, folder=folder), accumulate_grad_batches=2,
        limit_val_batches=1, num_sanity_val_steps=0, val_check_interval=3, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(model_of(), loader(2, 2 * 7 * dist.get_world_size()), loader(2))
    return trainer.global_step


@pytest.mark.parametrize(("kind", "ranks"), sweep_tuples(KINDS[:2]))
def test_all_save_before_they_validate(pool: RankPool, tmp_path: Path, kind: Callable[..., Any], ranks: int) -> None:
    steps = pool.run(accumulating, tmp_path, kind, world_size=ranks)
    replicas = ranks // (2 if kind is SHARDED else 1)
    assert 40 * replicas <= sum(steps[:: ranks // replicas]) < 41 * replicas


def saved_by_one(folder: Path, ending: str) -> tuple[int, int]:
    """The last save is out of date on rank 0 only, which has stepped since: with accumulation that may be."""
    checkpoint = RunCheckpoint(every_n_steps=100, folder=folder)
    saves = 0

    class Saved(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            checkpoint._told_to_stop = ending == "stopped" and trainer.global_step >= 5

        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            checkpoint._saved_step = trainer.global_step if dist.get_rank() else 0

        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            self.on_train_end(trainer)

        def on_save_checkpoint(self, *_: Any) -> None:
            nonlocal saves
            saves += 1

    trainer = saving_trainer(EDiTStrategy(sync_seconds=0.0, min_total_steps=2, warmup_steps=1), 20, checkpoint, Saved())
    with pytest.raises(SIGTERMException) if ending == "stopped" else nullcontext():
        trainer.fit(model_of(), loader(2))
    return saves, trainer.global_step


@pytest.mark.parametrize("ending", ["spent", "stopped"])
def test_all_save_the_end_if_one_has_to(pool: RankPool, tmp_path: Path, ending: str) -> None:
    runs = pool.run(saved_by_one, tmp_path, ending)
    assert [saves for saves, _ in runs] == [1, 1]
    found = [rank["global_step"] for rank in read_checkpoint(tmp_path / "last.ckpt")["edit"]["ranks"]]
    assert found == [steps for _, steps in runs]


def asked_around_a_save(folder: Path) -> list[bool]:
    """Some ask about validation before they save, as at the last batch of an epoch, and some after that."""
    granted = []

    class Asks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (4, 5):
                granted.append(strategy.agree("validate", trainer.global_step == 4))
            if trainer.global_step == 4:
                trainer.save_checkpoint(folder / "middle.ckpt")  # a synchronisation, with which the wish travels
                granted.append(strategy.agree("validate", False))

    strategy = EDiTStrategy(sync_seconds=1e9, warmup_steps=1)
    trainer_of(strategy, 8, callbacks=[Asks()]).fit(model_of(), loader(2))
    return granted


def test_wish_that_travels_with_a_save_is_granted_in_the_next_batch(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(asked_around_a_save, tmp_path, world_size=1) == [[False, False, True]]


class Validations(Callback):
    """Asks and saves after batches of these numbers, in a run of one process; keeps the steps after which it was validated."""

    def __init__(self, wishes: dict[int, str], saves: tuple[int, ...], path: Path) -> None:
        self.wishes, self.saves, self.path = wishes, saves, path
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        batch = trainer.fit_loop.total_batch_idx + 1
        if batch in self.wishes:
            trainer.strategy.agree(self.wishes[batch], True)  # type: ignore[attr-defined]
        if batch in self.saves:
            trainer.save_checkpoint(self.path)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def validated(folder: Path, wishes: dict[int, str], saves: tuple[int, ...], **options: Any) -> tuple[list[int], int, bool]:
    watch, stopped = Validations(wishes, saves, folder / "middle.ckpt"), False
    trainer = saving_trainer(
        EDiTStrategy(sync_seconds=1e9, warmup_steps=1), 8, RunCheckpoint(every_n_steps=100, folder=folder), watch,
        limit_val_batches=1, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    try:
        trainer.fit(model_of(), loader(2, 400), loader(2))
    except SIGTERMException:
        stopped = True
    return watch.steps, int(read_checkpoint(folder / "last.ckpt")["global_step"]), stopped


@pytest.mark.parametrize(("wishes", "saves", "options", "steps", "stops"), [
    # A save, with which the seventh step is counted, makes the next one the last: not this one, before or after the save.
    ({6: "validate"}, (6, 7), {}, [7, 8], False),
    # Some are in the middle of their last step when all are told to stop: nobody validates.
    ({7: "stop"}, (7,), {}, [], True),
    # Others may have taken their last step already: they would not hear of a stop that travels in it.
    ({15: "stop"}, (15,), {"accumulate_grad_batches": 2}, [8], False),
    # Ranks end in different epochs.
    ({}, (), {"check_val_every_n_epoch": 2}, [8], False),
])  # fmt: skip
def test_all_validate_alike_at_the_end(
    pool: RankPool, tmp_path: Path, wishes: Any, saves: Any, options: Any, steps: list[int], stops: bool
) -> None:
    assert pool.run(validated, tmp_path, wishes, saves, world_size=1, **options) == [(steps, 8, stops)]


def in_different_epochs() -> int:
    """Ranks begin, as after a checkpoint, in epochs of which one is to be validated and the other is not."""
    trainer = trainer_of(
        EDiTStrategy(sync_seconds=0.0, min_total_steps=2, warmup_steps=0), 6, limit_val_batches=1, check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
    )  # fmt: skip
    epochs = trainer.fit_loop.epoch_progress.current
    epochs.processed = epochs.completed = dist.get_rank()
    trainer.fit(model_of(), loader(2, 400), loader(2))
    return trainer.global_step


def test_ranks_in_different_epochs_begin_together(pool: RankPool) -> None:
    assert 12 <= sum(pool.run(in_different_epochs)) < 14


def broken_alone(folder: Path) -> int:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("a disk is full, say")

    strategy = EDiTStrategy(sync_seconds=1e9, warmup_steps=1)
    with pytest.raises(RuntimeError, match="a disk is full"):
        saving_trainer(strategy, 20, RunCheckpoint(every_n_steps=100, folder=folder), Breaks()).fit(model_of(), loader(2))
    return int(read_checkpoint(folder / "last.ckpt")["global_step"])


def test_one_process_saves_in_the_middle_of_a_round(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(broken_alone, tmp_path, world_size=1) == [5]


def within_budget(folder: Path, warmup: int) -> list[tuple[int, int]]:
    """A run, and the same continued twice after its end: steps and batches."""
    seen = []
    for path in (None, folder / "last.ckpt", folder / "last.ckpt"):
        strategy = EDiTStrategy(sync_seconds=0.0, min_total_steps=2, warmup_steps=warmup, **FULL)
        trainer = saving_trainer(strategy, 6, RunCheckpoint(folder=folder))
        model = model_of()
        trainer.fit(model, NumbersData(batch_size=2, seed=1), ckpt_path=path, weights_only=True)
        seen.append((trainer.global_step, len(model.seen)))
    return seen


@pytest.mark.parametrize("warmup", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_budget_holds_in_the_warm_up_and_for_a_run_that_has_ended(pool: RankPool, tmp_path: Path, warmup: int) -> None:
    ranks = pool.run(within_budget, tmp_path, warmup)
    total = sum(run[0][0] for run in ranks)
    assert 12 <= total < 14 and (warmup == 2 or total == 12)
    for run in ranks:
        assert [steps for steps, _ in run] == [run[0][0]] * 3 and [batches for _, batches in run[1:]] == [0, 0]


def out_of_step(folder: Path) -> tuple[list[int], int, list[str]]:
    """A-EDiT whose ranks have taken different numbers of steps, continued in step."""
    path = folder / "async.ckpt"
    strategy = EDiTStrategy(4, warmup_steps=1, **FULL)
    if dist.get_rank() == 0:  # as ranks of different speed leave it
        checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        ranks = checkpoint["edit"]["ranks"]
        ranks[1]["global_step"] = ranks[0]["global_step"] + 3
        torch.save(checkpoint, path)
    dist.barrier()
    trainer = trainer_of(strategy, 24)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model_of(), NumbersData(batch_size=2, seed=1), ckpt_path=path, weights_only=True)
    return (
        [own["global_step"] for own in read_checkpoint(path)["edit"]["ranks"]],
        trainer.global_step,
        [str(w.message) for w in said],
    )


def saved(folder: Path) -> int:
    strategy = EDiTStrategy(sync_seconds=0.0, min_total_steps=2, warmup_steps=1, **FULL)
    trainer = saving_trainer(strategy, 12, RunCheckpoint(folder=folder))
    trainer.fit(model_of(), NumbersData(batch_size=2, seed=1))
    return trainer.global_step


def test_ranks_that_were_out_of_step_go_on_in_step_without_a_clock(pool: RankPool, tmp_path: Path) -> None:
    pool.run(saved, tmp_path)
    (before, steps, said), other = pool.run(out_of_step, tmp_path)
    assert before[0] != before[1] and steps == other[1] == 24
    assert any("all go on from where rank 0 was" in text for text in said)


class LogsMetric(Residual):
    """Logs a metric over the training epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


def logs_metric() -> str:
    with pytest.raises(RuntimeError) as error:
        trainer_of(EDiTStrategy(sync_seconds=0.0, min_total_steps=2, warmup_steps=1), 40).fit(model_of(LogsMetric), loader(2))
    return str(error.value)


def test_metric_over_an_epoch_that_ranks_end_at_different_times_is_refused(pool: RankPool) -> None:
    assert all("the metric mean is logged in training with on_epoch=True" in said for said in pool.run(logs_metric))


# Replicas that break


class BreaksOnce(Residual):
    """The loss of the last replica is not finite at one step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        last = self.trainer.global_step == 6 and 2 * dist.get_rank() >= dist.get_world_size()
        return loss * float("nan") if last else loss


def broken_once(kind: Callable[..., Any]) -> dict[str, Any]:
    strategy, model = kind(ewma_warmup=100), model_of(BreaksOnce)
    weights: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if strategy.last_sync is not None:
                weights.append(strategy.last_sync.weights[1])

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer_of(strategy, 20, callbacks=[Watch()]).fit(model, loader(2))
    losses = [loss for loss in model.seen if loss != loss]
    return {"weights": weights, "said": [str(w.message) for w in said], "broken": len(losses), "end": weights_of(model)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [pytest.param(WHOLE, 2, marks=pytest.mark.slow), (SHARDED, 4)])
def test_replica_that_broke_once_takes_part_again(pool: RankPool, kind: Callable[..., Any], ranks: int) -> None:
    seen = pool.run(broken_once, partial(kind, **{"warmup_steps": 2}), world_size=ranks)
    assert min(seen[0]["weights"][-1]) > 0 and [1.0, 0.0] in seen[0]["weights"]
    assert all(value.isfinite().all() for each in seen for value in each["end"].values())
    assert 0 < seen[-1]["broken"] < 5 and seen[0]["broken"] == 0
    assert any("weights of replica 1 (of 2) were not finite" in text for text in seen[0]["said"])


def longer_warmup(folder: Path) -> tuple[list[float], list[str]]:
    """A checkpoint after the warm-up, continued with a warm-up that goes on for longer, in half precision."""
    norms: list[float] = []
    messages: list[str] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            norms.append(pl_module.embed.weight.detach().float().norm().item())

    for warmup, path in ((1, None), (20, folder / "first.ckpt")):
        torch.set_default_dtype(torch.float32)
        seed_everything(5, verbose=False)
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=EDiTStrategy(3, warmup_steps=warmup, **FULL), precision="bf16-true",
            max_steps=30 if path else 6, logger=False, limit_val_batches=0, enable_checkpointing=False, callbacks=[Watch()],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(Residual(lr=0.05), DataLoader(Numbers(480), batch_size=4), ckpt_path=path, weights_only=True)
        messages += [str(warning.message) for warning in said]
        if path is None:
            trainer.save_checkpoint(folder / "first.ckpt")
    return norms, messages


def test_longer_warm_up_after_a_checkpoint_keeps_what_it_trains(pool: RankPool, tmp_path: Path) -> None:
    norms, said = pool.run(longer_warmup, tmp_path)[0]
    assert max(abs(later - earlier) for earlier, later in pairwise(norms[6:])) < 0.15 * norms[6]
    assert any("momentum and outlier detectors begin anew" in text for text in said)


# Shards


class Tied(Residual):
    """One matrix under two names outside of all blocks."""

    def __init__(self, depth: int = 3, lr: float = 0.05, adam: bool = True) -> None:
        super().__init__(depth, lr, adam)
        self.again = nn.Linear(3, WIDTH, bias=False)
        self.again.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(x).sum(1, keepdim=True)


class Inside(Layer):
    """A layer with another one inside, which may be a second one's too."""

    def __init__(self, inside: Layer | None = None) -> None:
        super().__init__()
        self.inside = inside or Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(super().forward(x))


class Shared(Residual):
    """The second block computes with the third one's inner layer before that is called."""

    def __init__(self, depth: int = 3, lr: float = 0.05, adam: bool = True) -> None:
        super().__init__(depth, lr, adam)
        first = Inside()
        self.layers = nn.ModuleList([Layer(), Inside(first.inside), first])


class ByHand(Residual):
    """Optimizes by itself."""

    def __init__(self, depth: int = 3, lr: float = 0.05, adam: bool = True) -> None:
        super().__init__(depth, lr, adam)
        self.automatic_optimization = False


def evaluated(folder: Path, kind: Callable[..., Any]) -> tuple[list[Any], float]:
    model = model_of(Tied)
    trainer = trainer_of(kind(), 6)
    trainer.fit(model, NumbersData(batch_size=2, seed=1))
    trainer.save_checkpoint(folder / "tied.ckpt")
    result = trainer.test(model, loader(2), ckpt_path=folder / "tied.ckpt", verbose=False, weights_only=True)
    weights = weights_of(model)
    return result, (weights["embed.weight"] - weights["again.weight"]).abs().max().item()


def test_tied_weights_of_shards_are_loaded_under_both_names(pool: RankPool, tmp_path: Path) -> None:
    sharded = pool.run(evaluated, tmp_path, SHARDED, world_size=2)
    assert sharded[0] == sharded[1] and sharded[0][1] == 0 and sharded[0][0][0]["val_loss"] > 0


def refused(model: type[Residual]) -> str:
    with pytest.raises(ValueError) as error:
        trainer_of(SHARDED(), 6).fit(model_of(model), loader(2))
    return str(error.value)


def shared() -> tuple[list[float], dict[str, Tensor]]:
    model = model_of(Shared)
    trainer_of(WHOLE(), 14).fit(model, loader(2))
    return model.seen, weights_of(model)


def test_blocks_with_parts_in_common_are_whole_or_refused(pool: RankPool) -> None:
    first, second = pool.run(shared)
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    assert all("block layers.1 has 2 parameters that are other blocks' too" in said for said in pool.run(refused, Shared))
    assert all("ByHand optimizes by itself" in said for said in pool.run(refused, ByHand))


LANGUAGE = LingConfig(
    vocab_size=24, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, initializer_range=0.3, max_position_embeddings=32,
    pad_token_id=None, eos_token_id=None,
)  # fmt: skip


def language(kind: Callable[..., Any], chunk: int) -> tuple[list[float], dict[str, Tensor]]:
    """A language model whose head is read and not called; the ranks of a replica see the same texts."""
    torch.set_default_dtype(torch.float64)
    seed_everything(5, verbose=False)
    model = Ling(LANGUAGE, loss_chunk=chunk, router_warmup_steps=0, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    replica = 2 * dist.get_rank() // dist.get_world_size()
    ids = torch.randint(24, (24, 9), generator=torch.Generator().manual_seed(replica))
    data = DataLoader([{"input_ids": row} for row in ids], batch_size=2)
    trainer = trainer_of(kind(), 7, callbacks=[Watch()], use_distributed_sampler=False, limit_val_batches=2)
    trainer.fit(model, data, data)
    return losses, weights_of(model)


@pytest.mark.parametrize("chunk", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_language_model_in_shards_is_the_whole_one(pool: RankPool, chunk: int) -> None:
    whole = pool.run(language, WHOLE, chunk, world_size=2)
    for rank, (losses, weights) in enumerate(pool.run(language, SHARDED, chunk, world_size=4)):
        assert losses == pytest.approx(whole[rank // 2][0], rel=1e-9)
        for name, value in whole[0][1].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-8, atol=1e-10, msg=name)
