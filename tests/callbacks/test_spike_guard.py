"""A skipped step changes nothing, bit for bit and on all ranks; its samples come back once; lasting changes are followed."""

import copy
import itertools
import math
import random
import warnings
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from sweep import sweep
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo import ZooModule
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA, RunCheckpoint, SpikeGuard
from zoo.strategy_contract import StrategyContract

VOCAB, LENGTH, SAMPLES = 11, 6, 400
QUICK = {"alpha": 0.1, "warmup": 8, "threshold": 6.0}


class Words(ZooModule):
    """Predicts the next of a few words; counts applied steps in a buffer, as a router does with its statistics."""

    def __init__(self) -> None:
        super().__init__(
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 50),
        )
        self.embed = nn.Embedding(VOCAB, 8, dtype=torch.float64)
        self.head = nn.Linear(8, VOCAB, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.last_losses: dict[str, Tensor] = {}

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        logits = self.head(self.embed(ids[:, :-1]))
        loss_B = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)
        return loss_B * batch["scale"] + batch["extra"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss_B = self.losses(batch)
        self.last_losses = {"ce": loss_B.mean().detach(), "ce_per_sample": loss_B.detach()}
        return loss_B.mean() + 0.01 * self.head.weight.square().sum()

    def on_applied_step(self) -> None:
        super().on_applied_step()
        self.seen += 1


class Plain(LightningModule):
    """A user's module that knows nothing of the zoo."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words()

    def training_step(self, batch, batch_idx):
        return self.words.losses(batch).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Loader:
    """Batches of a fixed order, in which samples can be put again; resumable. Samples or batches may be planted.

    Args:
        planted: what is added to, and multiplied with, the loss of samples, by batch number (while new) or by sample id.
    """

    def __init__(self, batch_size=8, batches=40, at_batch=None, at_sample=None, rank=0, ranks=1, index=True):
        self.batch_size, self.batches, self.rank, self.ranks, self.index = batch_size, batches, rank, ranks, index
        self.at_batch, self.at_sample = at_batch or {}, at_sample or {}
        self.order = list(range(SAMPLES))
        self.place = 0
        self.calls: list[tuple[list[int], int, int]] = []

    def __len__(self):
        return self.batches

    def __iter__(self):
        chosen = torch.randint(VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1)) // 3 * 2
        while self.place < self.batches:
            begin = self.place * self.batch_size * self.ranks
            ids = self.order[begin : begin + self.batch_size * self.ranks][self.rank :: self.ranks]
            planted = [self.at_sample.get(i, self.at_batch.get(self.place, (0.0, 1.0))) for i in ids]
            self.place += 1
            extra, scale = torch.tensor(planted, dtype=torch.float64).T
            batch = {"input_ids": chosen[ids], "extra": extra, "scale": scale}
            yield {**batch, "index": torch.tensor(ids)} if self.index else batch

    def requeue(self, sample_ids: list[int], window: int, seed_key: int) -> None:
        self.calls.append((sample_ids, window, seed_key))
        places = random.Random(seed_key)
        size = self.batch_size * self.ranks
        window_places = range((self.place) * size, (self.place + window) * size)
        for place, sample in zip(sorted(places.sample(window_places, len(sample_ids))), sample_ids, strict=True):
            self.order.insert(place, sample)

    def state_dict(self):
        return {"order": list(self.order), "place": self.place}

    def load_state_dict(self, state):
        self.order, self.place = list(state["order"]), state["place"]


class Unqueued(Loader):
    """A loader as most are."""

    requeue = None  # type: ignore[assignment]

    def __getattribute__(self, name):
        if name == "requeue":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Watch(Callback):
    """Keeps everything that a step may change, after each step, and the ids that were trained on."""

    def __init__(self) -> None:
        self.states: list[dict] = []
        self.ids: list[list[int]] = []

    def _keep(self, trainer, module):
        averages = [c for c in trainer.callbacks if isinstance(c, EMA)]
        state = {
            "module": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "applied": getattr(module, "applied_steps", None),
            "average": [dict(average._average.tensors) for average in averages],
            "averaged": [average._applied for average in averages],
        }
        self.states.append(copy.deepcopy(state))

    def on_train_start(self, trainer, module):
        self._keep(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if "index" in batch:
            self.ids.append(batch["index"].tolist())
        if trainer.global_step == len(self.states):
            self._keep(trainer, module)


def same(a, b) -> bool:
    """Bitwise equality of nested data."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def fit(loader, *callbacks, module=None, steps=20, ckpt_path=None, folder=None, **options):
    torch.manual_seed(0)
    module = (module or Words)()
    watch = Watch()
    trainer = Trainer(
        **{
            "max_steps": steps,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "log_every_n_steps": 1,
            "callbacks": [*callbacks, watch],
            **options,
        }
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, watch, trainer


PLANTED = {12: (0.0, 4.0)}
"""Batch 12 has four times its loss: some 7 nats more."""


@pytest.mark.parametrize("planted", [(0.0, 4.0), (5.0, 1.0), (0.0, math.nan), (math.inf, 1.0)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_skipped_step_changes_nothing_bit_for_bit(planted, clip):
    guard = SpikeGuard(**QUICK)
    _, watch, trainer = fit(Loader(at_batch={12: planted}), EMA(0.9), guard, gradient_clip_val=clip)
    assert guard.skipped == 1 and guard.reduced == 0
    changed = [not same(a, b) for a, b in zip(watch.states, watch.states[1:], strict=False)]
    assert changed == [step != 12 for step in range(20)]
    assert same(watch.states[12], watch.states[13]) and watch.states[-1]["applied"] == 19
    assert trainer.global_step == 20


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_other_precisions(precision):
    guard = SpikeGuard(**QUICK)
    _, watch, _ = fit(Loader(at_batch=PLANTED), guard, module=lambda: Words().float(), precision=precision)
    assert guard.skipped == 1 and [same(a, b) for a, b in itertools.pairwise(watch.states)].index(True) == 12


def test_the_run_after_a_skip_is_that_of_a_run_without_the_batch():
    """What follows a skipped step is what would follow had there been no such batch."""
    _, guarded, _ = fit(Unqueued(at_batch=PLANTED), SpikeGuard(**QUICK))
    short = Loader()
    del short.order[12 * 8 : 13 * 8]
    _, plain, _ = fit(short, steps=13)
    assert same(guarded.states[14], plain.states[13])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_on_clean_data_the_guarded_run_is_the_unguarded_one_bit_for_bit(accumulate, clip):
    guard = SpikeGuard(**QUICK)
    options = {"steps": 12, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    _, guarded, _ = fit(Loader(), EMA(0.9), guard, **options)
    _, plain, _ = fit(Loader(), EMA(0.9), **options)
    assert guard.skipped == guard.reduced == 0
    assert len(guarded.states) == 13 and same(guarded.states, plain.states)


@pytest.mark.parametrize("size", [1, 3])
def test_sample_ids_come_back_exactly_once_within_the_window(size):
    loader, guard = Loader(at_batch={4 * size: (0.0, math.nan)}), SpikeGuard(**QUICK, retry_window=15)
    _, watch, _ = fit(loader, guard, steps=36 // size, accumulate_grad_batches=size)
    skipped = list(itertools.chain(*watch.ids[4 * size : 5 * size]))
    assert guard.skipped == 1 and loader.calls == [(sorted(skipped), 15, 4)]
    later = watch.ids[5 * size : 5 * size + 15]
    counts = [sum(ids.count(sample) for ids in later) for sample in skipped]
    assert counts == [1] * len(skipped) and len(skipped) == 8 * size
    assert guard.state_dict()["waiting"] == []
    assert not set(skipped) & set(itertools.chain(*watch.ids[5 * size + 15 :]))


def test_accumulated_micro_batches_are_judged_by_their_mean():
    """One micro-batch of four with a loss 0.8 above gives a mean 0.2 above, which is below min_delta; 8 above does not."""
    for extra, skips in ((0.8, 0), (8.0, 1)):
        guard = SpikeGuard(**QUICK | {"threshold": 1.5, "alpha": 0.3}, grad_threshold=None)
        _, watch, _ = fit(Loader(at_batch={37: (extra, 1.0)}), guard, steps=10, accumulate_grad_batches=4)
        assert guard.skipped == skips
        assert same(watch.states[9], watch.states[10]) == bool(skips)


def test_a_retried_sample_that_is_bad_again_is_applied_with_a_lower_rate():
    samples = dict.fromkeys(range(96, 104), (8.0, 1.0))
    loader, guard = Loader(at_sample=samples), SpikeGuard(**QUICK | {"patience": 9}, retry_window=3, grad_threshold=None)
    fit(loader, guard, steps=20)
    assert (guard.skipped, len(loader.calls)) == (1, 1)
    assert guard.reduced > 0 and guard.state_dict()["waiting"] == []


def test_a_returned_sample_in_a_batch_that_others_made_bad_is_not_blamed():
    """Where losses of samples are known, its batch is skipped like a fresh one and the sample comes back once more."""
    loader, guard = Loader(at_batch={12: (9.0, 1.0), 13: (9.0, 1.0)}), SpikeGuard(**QUICK, retry_window=1, grad_threshold=None)
    _, watch, _ = fit(loader, guard, steps=16)
    assert watch.ids[12] == watch.ids[13] and guard.reduced == 1 and guard.skipped == 1  # all of it came back: it is the samples
    mixed = Loader(at_batch={12: (9.0, 1.0), 13: (9.0, 1.0)})
    guard = SpikeGuard(**QUICK, retry_window=4, grad_threshold=None)
    _, watch, _ = fit(mixed, guard, steps=22)
    returned = set(watch.ids[12]) & set(watch.ids[13])
    assert 0 < len(returned) < 8
    assert guard.reduced == 0 and guard.skipped == 2 and guard.state_dict()["waiting"] == []
    assert all(sum(ids.count(sample) for ids in watch.ids[14:]) == 1 for sample in watch.ids[13])


def test_a_returned_sample_is_blamed_where_losses_of_samples_are_not_known():
    loader = Loader(at_batch={12: (9.0, 1.0), 13: (9.0, 1.0)})
    guard = SpikeGuard(**QUICK, retry_window=4, grad_threshold=None)
    fit(loader, guard, module=Plain, steps=16)
    assert (guard.skipped, guard.reduced) == (1, 1)


@pytest.mark.parametrize("action", ["lr", "grad"])
def test_reduction_is_that_of_learning_rate_or_gradient(action):
    """With SGD, both move the weights a tenth of the way; the rate itself is as before."""
    moves = {}
    for factor in (0.1, 0.0, None):
        guard = SpikeGuard(**QUICK, patience=0, persist_action=action, persist_factor=factor or 0.0)
        _, watch, _ = fit(Loader(at_batch=PLANTED), *([] if factor is None else [guard]), module=Plain, steps=13)
        before, after = (torch.cat([w.flatten() for w in s["module"].values()]) for s in watch.states[-2:])
        moves[factor] = after - before
        assert watch.states[-1]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * 0.9**13, rel=1e-12)
        assert guard.reduced == (factor is not None) and guard.skipped == 0
    assert torch.allclose(moves[0.1], 0.1 * moves[None], atol=1e-14)
    assert not moves[0.0].any() and moves[None].abs().max() > 1e-3


def test_learning_rate_kept_as_a_tensor_is_restored():
    def with_tensor() -> Words:
        module = Words()
        module.optimizer = lambda params: torch.optim.SGD(params, lr=torch.tensor(0.5, dtype=torch.float64))
        module.lr_scheduler = None
        return module

    guard = SpikeGuard(**QUICK, patience=0)
    _, _, trainer = fit(Loader(at_batch=PLANTED), guard, module=with_tensor, steps=14)
    assert guard.reduced == 1 and trainer.optimizers[0].param_groups[0]["lr"].item() == 0.5


def test_a_lasting_change_of_the_level_does_not_stop_training():
    shift = dict.fromkeys(range(12, 200), (6.0, 1.0))
    guard = SpikeGuard(**QUICK, grad_threshold=None, retry_window=3)
    loader = Loader(batch_size=1, batches=200, at_batch=shift)
    _, watch, _ = fit(loader, guard, steps=120)
    assert 0 < guard.skipped <= 3 and 0 < guard.reduced < 60
    assert watch.states[-1]["applied"] == 120 - guard.skipped
    assert guard.consecutive == 0 and abs(guard.loss_detector.mean - 8.0) < 1.5


def test_what_is_never_finite_stops_training_with_advice():
    broken = dict.fromkeys(range(3, 40), (math.nan, 1.0))
    guard = SpikeGuard(**QUICK, patience=3, max_consecutive=5, record_path=Path("spikes.tsv"))
    with pytest.raises(FloatingPointError, match=r"5 steps in a row were bad.*earlier checkpoint.*spikes\.tsv"):
        fit(Loader(at_batch=broken), guard, folder=Path.cwd() / "runs" / "never")


def test_samples_that_are_never_finite_are_queued_once():
    samples = dict.fromkeys((33, 34), (math.nan, 1.0))
    loader, guard = Loader(batch_size=4, batches=60, at_sample=samples), SpikeGuard(**QUICK, retry_window=5)
    fit(loader, guard, steps=40)
    queued = [sample for ids, _, _ in loader.calls for sample in ids]
    assert queued.count(33) == queued.count(34) == 1 and len(set(queued)) == len(queued)
    assert guard.state_dict()["waiting"] == []


def test_the_record_names_losses_and_samples(tmp_path):
    guard = SpikeGuard(**QUICK, record_path=Path("log/spikes.tsv"))
    _, watch, _ = fit(Loader(at_batch={24: (5.0, 1.0), 30: (math.nan, 1.0)}), guard, accumulate_grad_batches=2, folder=tmp_path)
    lines = [line.split("\t") for line in (tmp_path / "log/spikes.tsv").read_text().splitlines()]
    assert [line[1] for line in lines] == ["12", "15"] and float(lines[0][0]) < float(lines[1][0])
    losses, ids = [float(value) for value in lines[0][3].split(",")], [int(value) for value in lines[0][4].split(",")]
    assert ids == watch.ids[24] + watch.ids[25]
    assert float(lines[0][2]) == pytest.approx(sum(losses) / 16, rel=1e-5)
    assert min(losses[:8]) > max(losses[8:]) + 3


def run_in_parts(folder, stops, steps=30):
    """A run that is cut after some steps and continued from its checkpoint."""
    ckpt_path = None
    for stop in [*stops, steps]:
        planted = dict.fromkeys((12, 13, 15, 16, 17), (9.0, 1.0)) | {20: (math.nan, 1.0)}
        loader, guard = Loader(at_batch=planted), SpikeGuard(**QUICK, retry_window=9, grad_threshold=None)
        callbacks, cut = [EMA(0.9), guard, RunCheckpoint()], folder / "cut"
        _, watch, _ = fit(loader, *callbacks, steps=stop, ckpt_path=ckpt_path, folder=cut, enable_checkpointing=True)
        ckpt_path = cut / "checkpoints" / "last.ckpt"
    return guard, watch, loader, read_checkpoint(ckpt_path)


@pytest.mark.parametrize("stop", sweep([13, 14, 18, 21], quick=(0, 2)))
def test_a_resumed_run_is_the_whole_run(tmp_path, stop):
    """Also in the middle of bad steps, with samples that are still to come back, and after a skip as the last step."""
    whole, cut = run_in_parts(tmp_path / "whole", []), run_in_parts(tmp_path / "parts", [stop])
    assert whole[0].skipped >= 3 and whole[0].state_dict() == cut[0].state_dict()
    assert whole[1].ids[stop:] == cut[1].ids
    assert whole[2].state_dict() == cut[2].state_dict()
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "zoo_applied_steps"):
        assert same(whole[3][key], cut[3][key]), key


def test_state_is_plain_data_and_the_streak_is_in_it():
    planted = dict.fromkeys((12, 13), (9.0, 1.0))
    guard = SpikeGuard(**QUICK, patience=3, retry_window=30, grad_threshold=None)
    fit(Loader(at_batch=planted), guard, steps=14)
    state = guard.state_dict()
    assert state["consecutive"] == state["skipped"] == 2 and len(state["waiting"]) == 16
    again = SpikeGuard(**QUICK, patience=3, retry_window=30, grad_threshold=None)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert again.judge(9.0, 1.0) == "skip" and again.judge(9.0, 1.0) == "reduce"


@pytest.mark.parametrize("first", [0, 5])
def test_schedules_see_no_step_that_was_not_made(first):
    """The very first step is skipped too: torch would warn if the schedule ran ahead of the optimizer."""
    for module in (Words, Plain):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
            warnings.filterwarnings("error", message=".*has been overridden after.*")
            _, watch, trainer = fit(Loader(at_batch={first: (math.nan, 1.0)}), SpikeGuard(**QUICK), module=module, steps=9)
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 8
        assert same(watch.states[first]["schedule"], watch.states[first + 1]["schedule"])
        assert same(watch.states[first]["optimizer"], watch.states[first + 1]["optimizer"])


def test_epoch_schedules_advance_though_the_last_step_of_the_epoch_was_skipped():
    class ByEpoch(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}

    loader = Loader(batches=6, at_batch={5: (math.nan, 1.0)})
    _, _, trainer = fit(loader, SpikeGuard(**QUICK), module=ByEpoch, steps=-1, max_epochs=1)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1


def test_optimizer_and_module_are_left_as_they_were():
    module, _, trainer = fit(Loader(), SpikeGuard(**QUICK), steps=3)
    assert "lr_scheduler_step" not in vars(module)
    code = vars(trainer.optimizers[0])["step"].__code__  # the mark that torch's schedules leave
    _, _, reference = fit(Loader(), steps=3)
    assert code is vars(reference.optimizers[0])["step"].__code__


def test_a_plain_module_is_guarded_by_its_returned_loss():
    guard = SpikeGuard(**QUICK)
    _, watch, _ = fit(Loader(at_batch={24: (5.0, 1.0)}), guard, module=Plain, accumulate_grad_batches=2)
    assert guard.skipped == 1 and same(watch.states[12], watch.states[13])


def test_loaders_and_batches_that_cannot_retry_are_named():
    guard = SpikeGuard(**QUICK)
    with pytest.warns(UserWarning, match="Unqueued.*has no requeue.*recorded but not trained on again"):
        fit(Unqueued(at_batch=PLANTED), guard)
    assert guard.skipped == 1 and guard.state_dict()["waiting"] == []
    loader = Loader(at_batch=PLANTED, index=False)
    with pytest.warns(UserWarning, match='no sample ids under "index"'):
        fit(loader, SpikeGuard(**QUICK))
    assert loader.calls == []


def test_counts_and_score_are_logged():
    planted = {12: (9.0, 1.0), 14: (math.nan, 1.0)}
    guard = SpikeGuard(**QUICK, patience=0)
    _, _, trainer = fit(Loader(at_batch=planted), guard, steps=16)
    metrics = trainer.callback_metrics
    assert metrics["guard/skipped"] == 1 and metrics["guard/reduced"] == 1
    assert metrics["guard/loss_score"].isfinite() and guard.time_inside > 0


def test_the_rule():
    guard = SpikeGuard(**QUICK, patience=2, max_consecutive=9)
    for step in range(20):
        assert guard.judge(3.0 + 0.01 * math.sin(step), 1.0 + 0.01 * math.cos(step)) == "apply"
    assert guard.judge(3.2, 1.0) == "apply"  # an outlier by deviations, but less than min_delta above
    assert guard.judge(9.0, 1.0, rest=3.0) == "reduce" and guard.consecutive == 0
    assert guard.judge(9.0, 1.0, rest=8.0) == "skip" and guard.judge(3.0, 1.0, rest=3.0) == "apply"
    assert guard.judge(9.0, 1.0, rest=-math.inf) == "reduce"
    assert guard.judge(3.0, 80.0) == "skip" and guard.consecutive == 1
    assert guard.judge(3.0, 1.0) == "apply" and guard.consecutive == 0
    assert guard.judge(math.nan, 1.0, rest=3.0) == "skip"
    assert guard.judge(3.0, math.inf) == "skip"
    assert guard.judge(90.0, 1.0) == "reduce" and guard.consecutive == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patience": 20}, "patience=20.*below max_consecutive=20"), ({"retry_window": 0}, "retry_window=0"),
     ({"min_delta": -1.0}, "min_delta=-1.0"), ({"grad_min_ratio": 0.5}, "grad_min_ratio=0.5"),
     ({"persist_action": "stop"}, "persist_action='stop' must be one of lr, grad"),
     ({"persist_factor": 1.0}, "persist_factor=1.0"), ({"alpha": 2.0}, "alpha=2.0"), ({"grad_alpha": 0.0}, "alpha=0.0")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpikeGuard(**options)


@pytest.mark.parametrize(("strategy", "message"), [(DeepSpeedStrategy, "DeepSpeed clips"), (FSDPStrategy, "FSDPStrategy shards")])
def test_strategies_that_hide_the_gradients_are_refused(strategy, message):
    trainer = Trainer(max_steps=1, logger=False, accelerator="cpu")
    trainer.strategy.__class__ = strategy
    with pytest.raises(ValueError, match=message):
        SpikeGuard().setup(trainer, Words(), "fit")


def test_scalers_manual_optimization_and_lbfgs_are_refused():
    trainer = Trainer(max_steps=1, logger=False, accelerator="cpu")
    trainer.precision_plugin.scaler = object()
    with pytest.raises(ValueError, match="scales the gradients and skips steps by itself: use bf16"):
        SpikeGuard().setup(trainer, Words(), "fit")
    manual = Plain()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="Plain optimizes manually"):
        SpikeGuard().setup(Trainer(logger=False, accelerator="cpu"), manual, "fit")

    def quasi_newton() -> Words:
        module = Words()
        module.optimizer, module.lr_scheduler = torch.optim.LBFGS, None
        return module

    with pytest.raises(ValueError, match="LBFGS"):
        fit(Loader(), SpikeGuard(), module=quasi_newton, steps=1)


class Scoped(StrategyContract, DDPStrategy):
    """Says how its steps are judged: by each rank alone, always or from a batch on."""

    def __init__(self, alone: bool | int) -> None:
        super().__init__()
        self.since = 0 if alone is True else alone

    def setup(self, trainer):
        super().setup(trainer)
        self.groups = [torch.distributed.new_group([rank]) for rank in range(self.world_size)]

    def replicas_diverge(self):
        return True

    def step_group(self):
        alone = self.since is not False and self.lightning_module.trainer.fit_loop.epoch_loop.total_batch_idx >= self.since
        return self.groups[self.global_rank] if alone else None

    def gradient_norm(self):
        return torch.tensor(2.0)


def on_ranks(planted, ranks, options, scoped=None):
    """Train on this many ranks; returns what each rank has seen and reached."""
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    loader = Loader(batch_size=8 // ranks, rank=rank, ranks=ranks, at_sample=planted)
    guard = SpikeGuard(**QUICK | options)
    strategy = Scoped(scoped) if scoped is not None else "ddp" if ranks > 1 else "auto"
    module, watch, _ = fit(loader, guard, devices=ranks, strategy=strategy, use_distributed_sampler=False)
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    same_after = [same(a, b) for a, b in zip(watch.states, watch.states[1:], strict=False)]
    return {
        "state": guard.state_dict(),
        "weights": weights,
        "skipped": [step for step, unchanged in enumerate(same_after) if unchanged],
        "norm": guard.norm_detector.mean,
        "calls": loader.calls,
        "applied": module.applied_steps,
        "ids": watch.ids,
    }


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(pool):
    planted = {97: (math.nan, 1.0)}  # the gradient stays finite: only the loss of rank 1 tells
    ranks = pool.run(on_ranks, planted, 2, {"retry_window": 5})
    assert 12 in ranks[0]["skipped"] and ranks[0]["skipped"] == ranks[1]["skipped"] and ranks[0]["state"] == ranks[1]["state"]
    assert ranks[0]["calls"] == ranks[1]["calls"] and ranks[0]["calls"][0][0] == list(range(96, 104))
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


def test_two_ranks_decide_and_train_as_one_process_with_the_global_batch(pool):
    planted = dict.fromkeys((96, 99, 109, 120, 121, 130, 131), (9.0, 1.0))
    options = {"retry_window": 6, "threshold": 4.0}
    ranks = pool.run(on_ranks, planted, 2, options)
    one = on_ranks(planted, 1, options)
    assert one["skipped"] and one["state"]["reduced"] > 0
    for rank in ranks:
        assert rank["skipped"] == one["skipped"] and rank["applied"] == one["applied"]
        assert torch.allclose(rank["weights"], one["weights"], atol=1e-10)
        assert {key: rank["state"][key] for key in ("skipped", "reduced", "consecutive")} == {
            key: one["state"][key] for key in ("skipped", "reduced", "consecutive")
        }
        assert rank["calls"] == one["calls"]


def test_a_strategy_can_tell_the_norm_and_who_decides_together(pool):
    planted = dict.fromkeys((97, 99), (math.nan, 1.0))
    alone = pool.run(on_ranks, planted, 2, {}, scoped=True)
    assert alone[0]["norm"] == 2.0
    assert alone[0]["state"]["skipped"] == 0 and alone[1]["state"]["skipped"] == 1
    assert alone[1]["calls"] == []  # ranks that decide apart cannot queue together
    together = pool.run(on_ranks, planted, 2, {}, scoped=False)
    assert together[0]["state"] == together[1]["state"] and together[0]["state"]["skipped"] >= 1


def test_what_all_ranks_queued_is_not_waited_for_by_each_alone(pool):
    planted = dict.fromkeys(range(64, 72), (9.0, 1.0))  # all of batch 8
    together = pool.run(on_ranks, planted, 2, {"retry_window": 30}, scoped=False)
    assert together[0]["calls"] and together[0]["state"]["skipped"] == 1
    for rank in pool.run(on_ranks, planted, 2, {"retry_window": 30}, scoped=9):
        assert rank["calls"] == together[0]["calls"]
        assert rank["state"]["waiting"] == [] and rank["state"]["reduced"] == 0


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "skip"), (5.0, "apply")])
def test_a_norm_is_bad_from_a_multiple_of_its_mean_on(ratio, verdict):
    """Norms of healthy steps have a long tail, which deviations alone do not tell from a spike."""
    guard = SpikeGuard(warmup=20, grad_min_ratio=ratio)
    for step in range(40):
        assert guard.judge(3.0, 1.0 + 0.01 * math.cos(step)) == "apply"
    assert guard.judge(3.0, 3.0) == verdict
    assert guard.judge(3.0, 6.0) == "skip"
