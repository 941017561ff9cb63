"""EDiT on real processes: what it computes, what it sends, what it saves, and that overlap and shards change none of it."""

import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from edit_runs import (
    FULL,
    PLAIN,
    Numbers,
    NumbersData,
    ReadsLayer,
    Residual,
    Run,
    apart,
    fit,
    loader,
    model_of,
    trainer_of,
    weights_of,
)
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from strategies import EDiTShardedStrategy, EDiTStrategy
from strategies.traffic import Traffic
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import BatchSizeWarmup, SpikeGuard

# What it computes


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_a_round_of_sgd_is_synchronous_sgd(pool: RankPool, ranks: int) -> None:
    edit = partial(EDiTStrategy, sync_interval=1, warmup_steps=0, **PLAIN)
    local = pool.run(fit, edit, adam=False, world_size=ranks)
    ddp = pool.run(fit, "ddp", adam=False, world_size=ranks)
    assert max(apart(a, b, buffers=False) for a, b in zip(local, ddp, strict=True)) < 1e-13
    assert [run.losses for run in local] == [pytest.approx(run.losses, rel=1e-12) for run in ddp]
    assert apart(local[0], local[-1]) == 0


@pytest.mark.parametrize("options", [
    pytest.param({}, marks=pytest.mark.slow), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "steps": 4}],
    ids=["plain", "accumulated"])  # fmt: skip
def test_warm_up_is_ddp(pool: RankPool, options: dict[str, Any]) -> None:
    edit = partial(EDiTStrategy, sync_interval=3, warmup_steps=8, **FULL)
    local, ddp = pool.run(fit, edit, **options), pool.run(fit, "ddp", **options)
    assert apart(local[0], ddp[0], buffers=False) == 0 and apart(local[0], local[1]) == 0
    assert local[0].losses == ddp[0].losses


def test_one_replica_is_plain_training(pool: RankPool) -> None:
    (one,) = pool.run(
        fit, partial(EDiTStrategy, sync_interval=3, warmup_steps=2, **PLAIN), use_distributed_sampler=False, world_size=1
    )
    (plain,) = pool.run(fit, "auto", world_size=1)
    assert apart(one, plain) < 1e-14 and one.losses == pytest.approx(plain.losses, rel=1e-12)


def test_replicas_of_the_same_data_are_one(pool: RankPool) -> None:
    edit = partial(EDiTStrategy, sync_interval=3, warmup_steps=0, **{**FULL, "skip_anomaly": False})
    two = pool.run(fit, edit, use_distributed_sampler=False)
    (one,) = pool.run(fit, edit, use_distributed_sampler=False, world_size=1)
    assert apart(two[0], one) < 1e-14


def after_local_steps(scopes: dict[str, str], overlap: bool, cpu_offload: bool, kind: type[Residual]) -> Run:
    unused = kind is ReadsLayer
    strategy = EDiTStrategy(
        2, warmup_steps=2, overlap=overlap, cpu_offload=cpu_offload, find_unused_parameters=unused, **FULL, **scopes
    )  # type: ignore[arg-type]
    model, extra = model_of(kind), {"after": []}

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            extra["after"].append(strategy.local_steps)
            extra["reports"] = strategy.last_sync

    trainer_of(strategy, 12, callbacks=[Watch()]).fit(model, loader(2))
    assert strategy.synchronizer is not None
    extra["state"] = strategy.synchronizer.state_dict()
    return Run(model.seen, weights_of(model), extra)


SCOPES: dict[str, dict[str, str]] = {
    "block": {}, "parameter": {"granularity": "parameter"}, "global": {"granularity": "global", "detector_update": "include"},
    "clipped as a whole": {"clip_scope": "global"},
}  # fmt: skip
FIRST = [("parameter", ReadsLayer)]


@pytest.mark.parametrize(("scopes", "kind"), [
    pytest.param(scopes, kind, id=f"{name}-{kind.__name__}", marks=[] if (name, kind) in FIRST else [pytest.mark.slow])
    for name, scopes in SCOPES.items() for kind in (Residual, ReadsLayer)])  # fmt: skip
def test_overlap_and_offload_change_nothing(pool: RankPool, scopes: dict[str, str], kind: type[Residual]) -> None:
    hooked = pool.run(after_local_steps, scopes, True, False, kind)
    blocking = pool.run(after_local_steps, scopes, False, True, kind)
    for ours, theirs in zip(hooked, blocking, strict=True):
        assert apart(ours, theirs) == 0 and ours.losses == theirs.losses
        assert ours.extra["reports"] == theirs.extra["reports"]
        assert ours.extra["state"]["detectors"] == theirs.extra["state"]["detectors"]
        for name, value in ours.extra["state"]["momentum"].items():
            assert torch.equal(value, theirs.extra["state"]["momentum"][name])
    assert apart(*hooked) == 0 and hooked[0].losses != hooked[1].losses
    assert hooked[0].extra["after"] == [1, 2] * 6


def disturbed(ranks: list[int], value: float, at: int) -> Run:
    """Train, and throw the second layer of some ranks off after a step."""
    strategy = EDiTStrategy(2, warmup_steps=2, **{**FULL, "ewma_warmup": 50, "temperature": 1.0})
    model, extra = model_of(), {}

    class Disturb(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            own = [value for name, value in pl_module.named_parameters() if name.startswith("layers.1")]
            if trainer.global_step == at:
                assert strategy.synchronizer is not None
                extra["before"] = strategy.synchronizer.state_dict()["momentum"]["layers.1.linear.weight"]
                extra["anchor"] = [slot.anchor.clone() for slots in strategy.synchronizer._slots for slot in slots]
                with torch.no_grad():
                    if dist.get_rank() in ranks:
                        [parameter.add_(value) for parameter in own]
                    if [dist.get_rank()] == ranks:  # what is broken on one replica only must not reach the others
                        pl_module.layers[1].level.add_(value)
                        pl_module.layers[1].count.add_(1000)
            elif trainer.global_step == at + 1:
                extra["report"] = strategy.last_sync
                extra["after"] = strategy.synchronizer.state_dict()["momentum"]["layers.1.linear.weight"]
                extra["anchor after"] = [slot.anchor.clone() for slots in strategy.synchronizer._slots for slot in slots]
                extra["names"] = [slot.name for slots in strategy.synchronizer._slots for slot in slots]

    trainer_of(strategy, at + 1, callbacks=[Disturb()]).fit(model, loader(2))
    return Run(model.seen, weights_of(model), extra)


def test_all_anomalous_roll_back_that_block_only(pool: RankPool) -> None:
    for run in pool.run(disturbed, [0, 1], float("nan"), 6):
        report, extra = run.extra["report"], run.extra
        assert [weights is None for weights in report.weights] == [False, False, True, False]
        assert torch.equal(extra["before"], extra["after"]) and extra["before"].any()
        moved = [not torch.equal(a, b) for a, b in zip(extra["anchor"], extra["anchor after"], strict=True)]
        assert moved == [not name.startswith("layers.1") for name in extra["names"]]
        assert all(value.isfinite().all() for value in run.weights.values())


@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_one_replica_that_went_far_counts_for_nothing(pool: RankPool, value: float) -> None:
    runs = pool.run(disturbed, [1], value, 6)
    assert apart(*runs) == 0 and all(value.isfinite().all() for value in runs[0].weights.values())
    assert runs[0].weights["layers.1.count"] == 7
    for run in runs:
        assert run.extra["report"].weights[2] == [1.0, 0.0]
        assert 0.3 < run.extra["report"].weights[1][0] < 0.7
        assert all(value.abs().max() < 10 for name, value in run.weights.items() if "linear" in name)


# What it sends


def traffic(overlap: bool) -> list[Any]:
    strategy, model = EDiTStrategy(3, warmup_steps=1, overlap=overlap, **FULL), model_of()
    counts: list[Any] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.traffic = Traffic(neighbours=1)
            self.traffic.__enter__()
            self.at_layers: list[int] = []

        def reached(self, *_: Any) -> None:
            self.at_layers.append(self.traffic.counts().get(("all_reduce", "inter"), 0))

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.traffic.__exit__(None, None, None)
            sizes = [self.traffic.num_bytes(operation) for operation in ("all_reduce", "all_gather")]
            counts.append((sizes, sum(self.traffic.counts().values()), self.at_layers))

    watch = Watch()
    for layer in model.layers:
        layer.linear.register_forward_pre_hook(watch.reached)
    trainer_of(strategy, 8, callbacks=[watch]).fit(model, loader(2))
    return counts


@pytest.mark.parametrize("overlap", [True, False])
def test_local_steps_send_nothing_and_a_synchronisation_sends_the_parameters_once(pool: RankPool, overlap: bool) -> None:
    (counts, _) = pool.run(traffic, overlap)
    parameters = 8 * sum(parameter.numel() for parameter in model_of().parameters())
    torch.set_default_dtype(torch.float32)
    buffers, units = 3 * 8, 4
    assert [number for _, number, _ in counts[1:4]] == [0, 0, 0]  # after the warm-up's one step
    assert [number for _, number, _ in counts[5:7]] == [0, 0]
    for sizes, _, at_layers in (counts[4], counts[7]):
        assert sizes == [parameters + buffers, 2 * 8 * (2 + units)]
        # Buffers, the rest, and block by block: the next one is on its way when a block computes.
        assert at_layers == ([4, 5, 5] if overlap else [5, 5, 5])


# What it saves


def resumed(folder: Path, stop: int, steps: int, kind: Callable[..., Any]) -> tuple[Run, Run]:
    """A run that saves in the middle, and one that goes on from there; with all states that there are."""

    class Slow(Callback):
        """Halves the learning rate of the second replica, so that the ranks' optimizers and schedules differ."""

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            strategy: Any = trainer.strategy
            if trainer.global_step == 4 and 2 * dist.get_rank() >= dist.get_world_size() and not strategy.in_warmup:
                optimizer.param_groups[0]["lr"] *= 0.5

    def states(trainer: Trainer, strategy: EDiTStrategy) -> dict[str, Any]:
        assert strategy.synchronizer is not None
        inner = strategy.optimizer_state(trainer.optimizers[0])
        schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        return {"inner": inner, "outer": strategy.synchronizer.state_dict(), "schedule": schedule}

    runs = []
    for path in (None, folder / "middle.ckpt"):
        strategy, model = kind(), model_of()
        save = ModelCheckpoint(folder, "middle", every_n_train_steps=stop, save_top_k=-1)
        callbacks = [Slow(), *([save] if path is None else [])]
        trainer = trainer_of(strategy, steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.checkpoint_callbacks.clear() if path else None
        trainer.fit(model, NumbersData(batch_size=2, seed=1), ckpt_path=path, weights_only=True)
        runs.append(Run(model.seen, weights_of(model), states(trainer, strategy)))
    return runs[0], runs[1]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize(
    ("warmup", "writer"),
    [(1, None), pytest.param(10, None, marks=pytest.mark.slow), (1, AsyncCheckpointIO())],
    ids=["from local steps", "from the warm-up", "written beside training"],
)
def test_a_resumed_run_is_the_uninterrupted_one(pool: RankPool, tmp_path: Path, warmup: int, writer: Any) -> None:
    kind = partial(EDiTStrategy, sync_interval=3, warmup_steps=warmup, checkpoint_io=writer, **FULL)
    runs = pool.run(resumed, tmp_path, 7, 12, kind)
    for whole, rest in runs:
        assert whole.losses[7:] == rest.losses and apart(whole, rest) == 0
        assert equal(whole.extra, rest.extra)
    assert not equal(runs[0][0].extra["inner"], runs[1][0].extra["inner"])  # each rank got its own back


def under_another(path: Path, strategy: Any) -> dict[str, Any]:
    model = model_of()
    trainer = trainer_of(strategy, 12)
    trainer.fit(model, NumbersData(batch_size=2, seed=1), ckpt_path=path, weights_only=True)
    return {"steps": trainer.global_step, "weights": weights_of(model)}


def loaded(path: Path) -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float64)
    return weights_of(Residual.load_from_checkpoint(path))


@pytest.mark.parametrize("others", [
    [("auto", 1), (EDiTStrategy(4, warmup_steps=1), 4)],
    pytest.param([("ddp", 2), (EDiTStrategy(4, warmup_steps=1), 1)], marks=pytest.mark.slow)],
    ids=["fewer and more", "as many and one"])  # fmt: skip
def test_other_strategies_take_the_checkpoint(pool: RankPool, tmp_path: Path, others: list[tuple[Any, int]]) -> None:
    pool.run(resumed, tmp_path, 4, 7, partial(EDiTStrategy, sync_interval=4, warmup_steps=1, **FULL))
    path = tmp_path / "middle.ckpt"
    stored = read_checkpoint(path)
    (weights,) = pool.run(loaded, path, world_size=1)
    assert equal(weights, dict(stored["state_dict"]))
    assert len(stored["edit"]["ranks"]) == 2 and stored["edit"]["momentum"].keys() == dict(model_of().named_parameters()).keys()
    torch.set_default_dtype(torch.float32)
    for strategy, ranks in others:
        for run in pool.run(under_another, path, strategy, world_size=ranks):
            assert run["steps"] == 12
            assert not equal(run["weights"], weights)


def evaluated(kind: Callable[..., Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {"in fit": [], "weights": []}

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                seen["weights"].append(weights_of(pl_module))
                seen["in fit"].append(trainer.callback_metrics["val_loss"].item())

    model, data = model_of(), loader(4)
    trainer = trainer_of(kind(), 9, callbacks=[Watch()], limit_val_batches=2, val_check_interval=5, check_val_every_n_epoch=None)
    trainer.fit(model, data, data)
    seen["after"] = weights_of(model)
    trainer.limit_val_batches = trainer.limit_test_batches = 100
    seen["validate"] = trainer.validate(model, data, verbose=False)[0]["val_loss"]
    seen["test"] = trainer.test(model, data, verbose=False)[0]["val_loss"]
    seen["predict"] = torch.cat(trainer.predict(model, data))  # type: ignore[arg-type]
    seen["own"] = None
    x, y = (torch.stack(column) for column in zip(*Numbers(48), strict=True))
    plain = model_of()
    plain.load_state_dict(seen["after"])
    with torch.no_grad():
        seen["own"] = (plain.eval()(x) - y).square().mean().item()
        seen["predicted"] = plain(x)[dist.get_rank() :: 2]
    return seen


SHARDED = partial(EDiTShardedStrategy, shard_size=2, sync_interval=3, warmup_steps=2, **FULL)


@pytest.mark.parametrize(
    "kind", [partial(EDiTStrategy, sync_interval=3, warmup_steps=1, **FULL), SHARDED], ids=["replicated", "sharded"]
)
def test_what_is_evaluated_is_the_same_everywhere(pool: RankPool, kind: Callable[..., Any]) -> None:
    first, second = pool.run(evaluated, kind)
    assert len(first["in fit"]) == 1 and first["in fit"] == second["in fit"]
    assert equal(first["weights"], second["weights"]) and equal(first["after"], second["after"])
    for seen in (first, second):
        assert seen["validate"] == pytest.approx(seen["own"], rel=1e-12) == seen["test"]
        torch.testing.assert_close(seen["predict"], seen["predicted"], rtol=1e-12, atol=1e-12)


# Shards


class ByRank(Dataset):
    """What a rank trains on at each step: rank 2r+s of four has a half of what rank r of two has."""

    def __init__(self, batch: int, steps: int) -> None:
        numbers, rank, ranks = Numbers(4 * batch * steps), dist.get_rank(), dist.get_world_size()
        own = 4 // ranks * batch
        self.rows = [numbers[step * 4 * batch + rank * own + row] for step in range(steps) for row in range(own)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index]


def fit_by_rank(kind: Callable[..., Any], **options: Any) -> Run:
    strategy, model = kind(), model_of()
    data = DataLoader(ByRank(2, 16), batch_size=8 // dist.get_world_size())
    trainer = trainer_of(strategy, 8, use_distributed_sampler=False, **options)
    trainer.fit(model, data)
    state = strategy.synchronizer.state_dict()
    return Run(model.seen, weights_of(model), {"state": state, "inner": strategy.optimizer_state(trainer.optimizers[0])})


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    pytest.param({}, marks=pytest.mark.slow), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}],
    ids=["plain", "accumulated"])  # fmt: skip
def test_sharded_replicas_are_the_whole_ones(pool: RankPool, options: dict[str, Any]) -> None:
    whole = pool.run(fit_by_rank, partial(EDiTStrategy, sync_interval=3, warmup_steps=2, **FULL), **options)
    shards = pool.run(fit_by_rank, SHARDED, world_size=4, **options)
    for rank, run in enumerate(shards):
        assert apart(run, whole[0], buffers=False) < 1e-10
        for name, value in whole[0].extra["state"]["momentum"].items():
            torch.testing.assert_close(run.extra["state"]["momentum"][name], value, rtol=1e-10, atol=1e-10)
        for number, state in whole[rank // 2].extra["inner"]["state"].items():
            torch.testing.assert_close(run.extra["inner"]["state"][number]["exp_avg"], state["exp_avg"], rtol=1e-9, atol=1e-10)
    assert not equal(shards[0].extra["inner"], shards[2].extra["inner"])


@pytest.mark.slow
def test_a_resumed_sharded_run_is_the_uninterrupted_one(pool: RankPool, tmp_path: Path) -> None:
    for whole, rest in pool.run(resumed, tmp_path, 7, 12, SHARDED, world_size=4):
        assert whole.losses[7:] == rest.losses and apart(whole, rest) == 0
        assert equal(whole.extra, rest.extra)
    (run, _) = pool.run(under_another, tmp_path / "middle.ckpt", EDiTStrategy(3, warmup_steps=2, **FULL))
    assert run["steps"] == 12


# A-EDiT, agreement, guards


def asynchronous(budget: int) -> dict[str, Any]:
    """The ranks' own counts: rank 1 does up to three steps while rank 0 does one, and rank 0's clock goes with its own steps."""
    strategy = EDiTStrategy(sync_seconds=5.0, min_total_steps=4, warmup_steps=2, step_weight=0.5, **FULL)
    seen: dict[str, Any] = {"syncs": [], "validated": []}
    strategy.clock = lambda: 2.0 * strategy._fit.global_step  # type: ignore[union-attr]
    run = [secrets.token_hex(4)]
    dist.broadcast_object_list(run)
    done = dist.PrefixStore(run[0], dist.distributed_c10d._get_default_store())

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rounds, third = strategy._rounds, f"rank 0 has done {trainer.global_step // 3}"
            if trainer.global_rank == 0 or rounds is None or trainer.global_step < 3:
                return
            # However seldom rank 0 gets the processor; in a round that is over it waits for this rank.
            while not done.check([third]) and rounds.store.add(str(rounds.round), 0) < 1 << 40:
                time.sleep(0.001)

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_rank == 0:
                done.set(f"rank 0 has done {trainer.global_step}", "")
            report = strategy.last_sync
            if report is not None and (not seen["syncs"] or report is not seen["last"]):
                seen["last"] = report
                seen["syncs"].append(report.steps)

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen["validated"].append(trainer.callback_metrics["val_loss"].item())

    model = model_of()
    trainer = trainer_of(
        strategy, budget, callbacks=[Watch()], limit_val_batches=1, num_sanity_val_steps=0, val_check_interval=5,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(model, loader(2), loader(2))
    return {**seen, "last": None, "steps": trainer.global_step, "weights": weights_of(model), "max_steps": trainer.max_steps}


def test_replicas_of_a_edit_stop_together_at_the_budget(pool: RankPool) -> None:
    first, second = pool.run(asynchronous, 40)
    total = first["steps"] + second["steps"]
    assert 80 <= total < 82 and first["max_steps"] == 40
    assert equal(first["weights"], second["weights"])
    assert first["syncs"] == second["syncs"] and len(first["syncs"]) > 3
    assert first["validated"] == second["validated"] and len(first["validated"]) >= 2


def refused(kind: Callable[..., Any], options: dict[str, Any]) -> str:
    options = {"max_steps": 4, "precision": "32-true", **options}
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=kind(), logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError) as error:
        trainer.fit(Residual(), loader())
    return str(error.value)


class ScaledLosses(Callback):
    """Gives the precision plugin a scaler, which none has on a CPU."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"callbacks": [WeightAveraging()]}, "WeightAveraging averages weights, each replica's own"),
        ({"callbacks": [ScaledLosses()], "precision": "bf16-mixed"}, "scales losses"),
        ({"max_steps": -1, "max_epochs": 2, "seconds": 1.0}, "set max_steps and neither max_epochs (now 2)"),
        ({"callbacks": [ModelCheckpoint()], "enable_checkpointing": True, "seconds": 1.0}, "ModelCheckpoint acts at each rank's"),
        ({"min_steps": 2, "seconds": 1.0}, "min_steps=2 and min_epochs="),
        ({"min_epochs": 1, "max_steps": 4, "seconds": 1.0}, "min_steps=None and min_epochs=1 would let each rank"),
        ({"callbacks": [BatchSizeWarmup(2, 4, 10)], "seconds": 1.0}, "BatchSizeWarmup counts the samples of all ranks together"),
    ],
)
def test_what_does_not_go_with_replicas_is_refused_by_name(pool: RankPool, options: dict[str, Any], said: str) -> None:
    kind = partial(EDiTStrategy, sync_seconds=options.pop("seconds", None))
    assert said in pool.run(refused, kind, options, world_size=1)[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sync_interval": 0}, "sync_interval=0"),
        ({"sync_seconds": -1.0}, "sync_seconds=-1.0"),
        ({"model_averaging_period": 4}, "model_averaging_period belongs to another way"),
        ({"outer_momentum": 1.0}, "outer_momentum=1.0"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EDiTStrategy(**wrong)
    with pytest.raises(ValueError, match="shard_size=0"):
        EDiTShardedStrategy(shard_size=0)


def half(kind: Callable[..., Any], precision: str) -> tuple[bool, bool, set[torch.dtype]]:
    torch.set_default_dtype(torch.float32)
    seed_everything(5, verbose=False)
    strategy, model = kind(), Residual()
    Trainer(
        accelerator="cpu", devices=2, strategy=strategy, precision=precision, max_steps=9, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, loader_of_halves())  # type: ignore[arg-type]  # fmt: skip
    assert strategy.synchronizer is not None
    state = strategy.synchronizer.state_dict()
    weights = weights_of(model)
    total = torch.cat([value.double().flatten() for value in weights.values()])
    both = [torch.empty_like(total) for _ in range(2)]
    dist.all_gather(both, total)
    near = all(torch.equal(weights[name].cpu(), value.to(weights[name].dtype)) for name, value in state["anchor"].items())
    return bool(torch.equal(*both)) and bool(total.isfinite().all()), near, {value.dtype for value in state["momentum"].values()}


def loader_of_halves() -> DataLoader:
    data = loader(2)
    torch.set_default_dtype(torch.float32)
    return data


HALVES: dict[str, Callable[..., Any]] = {
    "replicated": partial(EDiTStrategy, sync_interval=2, warmup_steps=2),
    "sharded": partial(EDiTShardedStrategy, shard_size=1, sync_interval=2, warmup_steps=2),
}


@pytest.mark.parametrize(("kind", "precision"), [
    pytest.param(kind, precision, id=f"{name}-{precision}", marks=[] if quick else [pytest.mark.slow])
    for name, kind in HALVES.items() for precision in ("bf16-mixed", "bf16-true")
    for quick in [name == "sharded" and precision == "bf16-true"]])  # fmt: skip
def test_anchors_of_half_precision_weights_are_kept_in_float32(pool: RankPool, kind: Callable[..., Any], precision: str) -> None:
    for same, near, kinds in pool.run(half, kind, precision):
        assert same and near and kinds == {torch.float32}


def test_names_of_lightning_that_it_replaces() -> None:
    loop = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor) and callable(loop._should_check_val_fx)
    assert callable(dist.distributed_c10d._get_default_store)


class BreaksOnce(Residual):
    """The loss of the last rank is not finite at one step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        last = self.trainer.global_step == 6 and dist.get_rank() == dist.get_world_size() - 1
        return loss * float("nan") if last else loss


def guarded(kind: Callable[..., Any]) -> dict[str, Any]:
    strategy, model, guard = kind(), model_of(BreaksOnce), SpikeGuard(warmup=100)
    trainer_of(strategy, 9, callbacks=[guard]).fit(model, loader(2))
    return {"guard": guard.state_dict(), "applied": model.applied_steps, "weights": weights_of(model)}


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [pytest.param(partial(EDiTStrategy, sync_interval=3, warmup_steps=2, **FULL), 2, marks=pytest.mark.slow), (SHARDED, 4)],
)
def test_a_spike_is_skipped_by_its_replica_alone(pool: RankPool, kind: Callable[..., Any], world_size: int) -> None:
    ranks = pool.run(guarded, kind, world_size=world_size)
    hit = [rank >= world_size // 2 for rank in range(world_size)]
    assert [seen["guard"]["skipped"] for seen in ranks] == [int(each) for each in hit]
    assert [seen["applied"] for seen in ranks] == [9 - each for each in hit]
    assert all(seen["guard"]["norm_detector"]["mean"] > 0 for seen in ranks)
    assert ranks[0]["guard"]["norm_detector"] == ranks[world_size // 2 - 1]["guard"]["norm_detector"]
    assert all(equal(seen["weights"], ranks[0]["weights"]) for seen in ranks)
    assert all(value.isfinite().all() for value in ranks[0]["weights"].values())


def after_a_test(path: Path | None) -> dict[str, Tensor]:
    """Train from the start, with a strategy that has tested a checkpoint before."""
    model = model_of()
    trainer = trainer_of(EDiTStrategy(3, warmup_steps=1, **FULL), 7)
    if path is not None:
        trainer.test(model_of(), loader(), ckpt_path=path, verbose=False, weights_only=True)
    trainer.fit(model, loader(2))
    return weights_of(model)


def test_a_tested_checkpoint_leaves_nothing_for_the_next_run(pool: RankPool, tmp_path: Path) -> None:
    pool.run(resumed, tmp_path, 4, 5, partial(EDiTStrategy, sync_interval=4, warmup_steps=1, **FULL))
    assert equal(pool.run(after_a_test, tmp_path / "middle.ckpt"), pool.run(after_a_test, None))


def misused(kind: Callable[..., Any]) -> str:
    class Misuse(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.layers[0].requires_grad_(True)
                if trainer.strategy.is_asynchronous():  # type: ignore[attr-defined]
                    trainer.strategy.all_gather(torch.zeros(1))

    model = model_of()
    model.layers[0].requires_grad_(False)
    with pytest.raises(RuntimeError) as error:
        trainer_of(kind(), 9, callbacks=[Misuse()]).fit(model, loader(2))
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sync_interval": 3}, "layers.0.linear.weight, layers.0.linear.bias (2 in all) were frozen when the warm-up ended"),
        ({"sync_seconds": 1e9}, "a gathering of tensors was asked for in training, while ranks are at different steps"),
    ],
)
def test_what_would_drift_or_hang_is_an_error(pool: RankPool, options: dict[str, Any], said: str) -> None:
    assert said in pool.run(misused, partial(EDiTStrategy, warmup_steps=1, **options), world_size=1)[0]
