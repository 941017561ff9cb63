"""Labels count alike over an optimizer step, whatever micro-batches, processes and strategy they come through."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from antdt_plans import Plans
from distributed import RankPool
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from sweep import sweep
from torch import Tensor
from torch.distributed import get_rank, get_world_size
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from strategies import AntDTStrategy, EDiTShardedStrategy, EDiTStrategy, ExpertParallelStrategy, PaROStrategy
from zoo.callbacks import BatchSizeWarmup, SpikeGuard
from zoo.ling import Ling, LingConfig, LingDPO
from zoo.lm.step_mean import StepMean
from zoo.strategy_contract import gradient_norm

SMALL = LingConfig(
    vocab_size=24, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, initializer_range=0.3, max_position_embeddings=32,
    pad_token_id=None, eos_token_id=None,
)  # fmt: skip
ACCUMULATE = 3
SIZES = [12, 12, 8]
"""Samples of the three steps: micro-batches of 4 over all processes, the last step has two of them."""
CLIP = 1.0
"""Between the norms of the steps, so that both a wrong factor and a wrong order show."""


def sample(index: int, even: bool = False) -> dict[str, Tensor]:
    """One to eleven labels; none in the samples of the first micro-batch's rank 1, the third and the fourth micro-batch."""
    ids = torch.randint(24, (12,), generator=torch.Generator().manual_seed(index))
    labels = ids.clone()
    if not even:
        labels[: 1 + (7 * index) % 11] = -100
        if index in (1, 3) or 8 <= index < 16:
            labels[:] = -100
    return {"input_ids": ids, "labels": labels, "index": torch.tensor(index)}


def samples(even: bool = False) -> list[dict[str, Tensor]]:
    return [sample(index, even) for index in range(sum(SIZES))]


def cross_entropy(module: Ling, rows: list[dict[str, Tensor]]) -> Tensor:
    """Mean over the labels of all rows, from the logits."""
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    logits = module.network(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(module: Ling) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None}


def weights_of(module: Ling) -> dict[str, Tensor]:
    """The whole ones where they are in shards."""
    found = {name: p.detach() for name, p in module.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}


@dataclass
class Outcome:
    """What one process saw of a run."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Watch(Callback):
    """Keeps what a callback such as SpikeGuard sees of the gradients."""

    def __init__(self) -> None:
        self.outcome = Outcome()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.outcome.gradients.append(gradients(pl_module))
        self.outcome.norms.append(float(gradient_norm(trainer.strategy, optimizer)))


def fit(
    module: Ling, rows: list[dict[str, Tensor]], batch_size: int, *callbacks: Callback, strategy: Any = "auto", **options: Any
) -> Outcome:
    """Train for an epoch on the ranks of the present group; batches have ``batch_size`` samples over all of them."""
    world_size = options.pop("world_size", 1)
    if world_size > 1 and not isinstance(strategy, AntDTStrategy):  # Lightning would shuffle
        rows, options = rows[get_rank() :: world_size], {"use_distributed_sampler": False, **options}
    watch = Watch()
    trainer = Trainer(**{
        "accelerator": "cpu", "devices": world_size, "strategy": strategy, "max_epochs": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "precision": "64-true", "gradient_clip_val": CLIP, "callbacks": [watch, *callbacks], **options,
    })  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=batch_size // world_size))
    watch.outcome.weights = weights_of(module)
    return watch.outcome


def model(dtype: torch.dtype = torch.float64, **options: Any) -> Ling:
    torch.set_default_dtype(dtype)
    seed_everything(5, verbose=False)
    plain = {"router_warmup_steps": 0, "aux_coef": 0.0, "z_coef": 0.0, "optimizer": partial(torch.optim.SGD, lr=0.5)}
    return Ling(SMALL, **{**plain, **options})


@pytest.fixture(autouse=True)
def _default_dtype() -> Any:
    yield
    torch.set_default_dtype(torch.float32)


def steps_of_one_process(dtype: torch.dtype = torch.float64) -> Outcome:
    """Each step's samples as one batch: the mean over its labels without any weights."""
    outcome, module, start = Outcome(), model(dtype, loss_over="micro_batch"), 0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for size in SIZES:
        optimizer.zero_grad()
        cross_entropy(module, samples()[start : start + size]).backward()
        outcome.gradients.append(gradients(module))
        outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        optimizer.step()
        start += size
    outcome.weights = weights_of(module)
    return outcome


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "paro": lambda: PaROStrategy("IIG", group_size=2),
    "experts": lambda: ExpertParallelStrategy(2),
    "edit, warm-up": lambda: EDiTStrategy(4, warmup_steps=9),
    "edit, a replica in shards": lambda: EDiTShardedStrategy(
        shard_size=2, sync_interval=9, warmup_steps=1, outer_lr=1.0, outer_momentum=0.0, clip=None
    ),
}


def on_ranks(name: str, **options: Any) -> Outcome:
    return fit(model(**options), samples(), 4, strategy=STRATEGIES[name](), world_size=get_world_size(),
               accumulate_grad_batches=ACCUMULATE)  # fmt: skip


@pytest.mark.parametrize("name", sweep(STRATEGIES, quick=(0, 1)))
def test_accumulated_steps_of_ranks_are_those_of_one_batch(pool: RankPool, name: str) -> None:
    """With ranks and micro-batches without labels, an incomplete last step, and clipping of some steps."""
    one = steps_of_one_process()
    assert min(one.norms) < CLIP < max(one.norms)
    for rank in pool.run(on_ranks, name, world_size=2):
        assert rank.norms == pytest.approx(one.norms, rel=1e-10)
        assert_same(rank.weights, one.weights)
        if name == "ddp":
            for found, expected in zip(rank.gradients, one.gradients, strict=True):
                assert_same(found, expected)


def test_micro_batches_that_count_alike_do_something_else(pool: RankPool) -> None:
    one = steps_of_one_process()
    alike = pool.run(on_ranks, "ddp", loss_over="micro_batch", world_size=2)[0]
    assert all(found != pytest.approx(expected, rel=0.05) for found, expected in zip(alike.norms, one.norms, strict=True))


@pytest.mark.parametrize(("accumulate", "chunk"), [(1, 0), (3, 5)])
def test_one_process_that_accumulates_is_one_batch(accumulate: int, chunk: int) -> None:
    found = fit(model(loss_chunk=chunk), samples(), 12 // accumulate, accumulate_grad_batches=accumulate)
    one = steps_of_one_process()
    assert found.norms == pytest.approx(one.norms, rel=1e-10)
    assert_same(found.weights, one.weights)


class Alone(Watch):
    """Compares each step's gradient with that of the labels that this rank alone has in it."""

    def __init__(self) -> None:
        super().__init__()
        self.differences: list[float] = []
        self.start = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        size, world = SIZES[len(self.differences)], get_world_size()
        rows = samples()[self.start : self.start + size][get_rank() :: world]
        self.start += size
        names, parameters = zip(*pl_module.network.named_parameters(), strict=True)
        expected = torch.autograd.grad(cross_entropy(pl_module, rows), parameters)
        found = gradients(pl_module)
        self.differences.append(max(float((found[n] - e).abs().max()) for n, e in zip(names, expected, strict=True)))


def replicas() -> list[float]:
    alone = Alone()
    fit(model(), samples(), 4, alone, strategy=EDiTStrategy(9, warmup_steps=1), world_size=get_world_size(),
        accumulate_grad_batches=ACCUMULATE)  # fmt: skip
    return alone.differences


def test_replicas_on_their_own_count_their_own_labels(pool: RankPool) -> None:
    """EDiT: the first step is one of all ranks, and so another than each of them would take."""
    for first, *rest in pool.run(replicas, world_size=2):
        assert first > 1e-3 and max(rest) < 1e-10


def both(accumulate: int) -> list[dict[str, Tensor]]:
    options = {"aux_coef": 0.1, "z_coef": 0.01, "router_warmup_steps": 4, "optimizer": partial(torch.optim.AdamW, lr=1e-2)}
    found = []
    for over in ("step", "micro_batch"):
        module = model(torch.float32, loss_over=over, **options)
        run = fit(module, samples(even=True)[:24], 4, strategy="ddp", world_size=get_world_size(), precision="32-true",
                  accumulate_grad_batches=accumulate)  # fmt: skip
        found.append(run.weights)
    return found


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_nothing_changes_bit_for_bit_where_all_labels_count(pool: RankPool, accumulate: int) -> None:
    for weighted, plain in pool.run(both, accumulate, world_size=2):
        assert all(torch.equal(value, plain[name]) for name, value in weighted.items())


class Losses(Ling):
    """Keeps what `training_step` returned."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.__dict__.setdefault("seen", []).append((float(loss), {k: v.detach() for k, v in self.last_losses.items()}))
        return loss


def test_routers_losses_weigh_as_much_as_the_labels_of_their_micro_batch() -> None:
    torch.set_default_dtype(torch.float64)
    options = {"router_warmup_steps": 0, "aux_coef": 0.3, "z_coef": 0.1, "optimizer": partial(torch.optim.SGD, lr=0.0)}
    seed_everything(5, verbose=False)
    module = Losses(SMALL, **options)
    found = fit(module, samples()[:12], 4, accumulate_grad_batches=3).gradients[0]
    parts = [samples()[start : start + 4] for start in (0, 4, 8)]
    counts = [sum(int((row["labels"][1:] != -100).sum()) for row in rows) for rows in parts]
    assert counts[2] == 0 and counts[0] != counts[1]
    module.zero_grad()
    for count, rows in zip(counts, parts, strict=True):
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        if count:
            module._trainer = None
            (module.training_step(batch, 0) * count / sum(counts)).backward()
    assert_same(found, gradients(module))
    weights = [float(seen["weight"]) for _, seen in module.seen[:3]]
    assert weights == pytest.approx([count / counts[0] for count in counts])
    # What is logged and recorded is not weighted.
    assert float(module.seen[1][1]["ce"]) == pytest.approx(float(cross_entropy(module, parts[1])))


class Judged(SpikeGuard):
    """Keeps what is judged, and skips the second step."""

    def judge(self, loss: float, norm: float, rest: float | None = None) -> Any:
        self.__dict__.setdefault("seen", []).append((loss, norm))
        super().judge(loss, norm, rest)
        return "skip" if len(self.seen) == 2 else "apply"


def guarded() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    guard = Judged()
    run = fit(model(), samples(), 4, guard, strategy="ddp", world_size=get_world_size(), accumulate_grad_batches=ACCUMULATE)
    return guard.seen, run.weights


def test_the_spike_guard_judges_the_mean_over_labels_and_its_gradient(pool: RankPool) -> None:
    module, start, expected = model(), 0, []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for step, size in enumerate(SIZES):
        optimizer.zero_grad()
        loss = cross_entropy(module, samples()[start : start + size])
        loss.backward()
        expected.append((float(loss), float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP))))
        if step != 1:
            optimizer.step()
        start += size
    for seen, weights in pool.run(guarded, world_size=2):
        assert seen == [pytest.approx(pair, rel=1e-6) for pair in expected]
        assert_same(weights, weights_of(module))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_gradients_are_means_in_mixed_precision_before_they_are_clipped(precision: Any) -> None:
    """Those of float16 are seen without the scale of the loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    options = {"precision": None, "plugins": [MixedPrecision(precision, "cpu", scaler)]}
    start, module = weights_of(model(torch.float32)), model(torch.float32)
    found = fit(module, samples()[:12], 4, accumulate_grad_batches=ACCUMULATE, **options)
    assert found.norms == [pytest.approx(steps_of_one_process(torch.float32).norms[0], rel=0.02)]
    update = torch.nn.utils.get_total_norm([found.weights[name] - value for name, value in start.items()])
    assert float(update) == pytest.approx(0.5 * CLIP, rel=1e-4)


class Holds(SingleDeviceStrategy):
    """Accumulates gradients where nobody sees them."""

    handles_gradient_accumulation = True


def test_gradients_out_of_reach_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"Holds keeps to itself: set --model\.loss_over micro_batch .* to 1 instead of 3"):
        fit(model(), samples(), 4, strategy=Holds("cpu"), accumulate_grad_batches=3)
    with pytest.raises(ValueError, match="loss_over='token' must be one of step, micro_batch"):
        Ling(SMALL, loss_over="token")  # type: ignore[arg-type]


def pairs(number: int) -> list[dict[str, Tensor]]:
    rows = []
    for index in range(number):
        chosen, rejected = sample(2 * index, even=True)["input_ids"], sample(2 * index + 1, even=True)["input_ids"]
        prompt = torch.full((4,), -100)
        rows.append({
            "chosen_input_ids": chosen, "rejected_input_ids": rejected, "index": torch.tensor(index),
            "chosen_labels": torch.cat([prompt, chosen[4:]]), "rejected_labels": torch.cat([prompt, rejected[4:]]),
        })  # fmt: skip
    return rows


def preferences(batch_size: int, **options: Any) -> Outcome:
    torch.set_default_dtype(torch.float64)
    seed_everything(5, verbose=False)
    module = LingDPO(config=SMALL, aux_coef=0.0, z_coef=0.0, optimizer=partial(torch.optim.SGD, lr=0.5))
    return fit(module, pairs(10), batch_size, world_size=get_world_size(), **options)


def test_pairs_count_alike_in_a_batch_that_is_not_full(pool: RankPool) -> None:
    (one,) = pool.run(preferences, 10, world_size=1)
    (accumulated,) = pool.run(preferences, 4, accumulate_grad_batches=3, world_size=1)
    for run in [accumulated, *pool.run(preferences, 4, accumulate_grad_batches=3, strategy="ddp", world_size=2)]:
        assert_same(run.gradients[0], one.gradients[0])
        assert_same(run.weights, one.weights)


def antdt(folder: Path, uneven: bool) -> Outcome:
    strategy = AntDTStrategy(
        server="inprocess", shard_steps=1, global_batch_size=8, max_micro_batch=3, report_every=1, decide_every=1.0, seed=0,
        solution=Plans([[6, 2], [1, 7]] if uneven else []),
    )  # fmt: skip
    options = {"gradient_clip_val": None, "default_root_dir": folder}
    return fit(model(), samples(), 8, strategy=strategy, world_size=get_world_size(), **options)


def test_batches_of_changing_sizes_are_weighed_by_their_labels(pool: RankPool, tmp_path: Path) -> None:
    """AntDT weighs by itself, and is told by what."""
    (one,) = pool.run(antdt, tmp_path / "one", False, world_size=1)
    for rank in pool.run(antdt, tmp_path / "two", True, world_size=2):
        assert_same(rank.weights, one.weights)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_weights_of_all_micro_batches_add_up_to_the_share_of_their_labels(counts: list[int], missing: int) -> None:
    mean, accumulate = StepMean(), len(counts) + missing
    weights = []
    for number, count in enumerate(counts):
        mean.begin(torch.tensor(count), first=number == 0)
        weights.append(float(mean.weight()) / accumulate)
    factor = mean.finish(accumulate)
    assert [weight * factor for weight in weights] == pytest.approx([count / max(sum(counts), 1) for count in counts])


class Batches(Callback):
    """The samples of each optimizer step."""

    def __init__(self) -> None:
        self.steps: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.setdefault(trainer.global_step, []).extend(batch["index"].tolist())


def test_a_batch_that_grows_is_a_mean_over_its_labels() -> None:
    """Steps that begin at any micro-batch of the epoch, over two epochs whose last steps are cut."""
    module, seen = model(optimizer=partial(torch.optim.SGD, lr=0.0)), Batches()
    warmup = BatchSizeWarmup(start=4, end=12, tokens=12 * 40)
    outcome = fit(module, samples(), 4, seen, warmup, max_epochs=2, gradient_clip_val=None)
    sizes = [len(rows) for rows in seen.steps.values()]
    assert sizes[0] == 4 and 8 in sizes and 12 in sizes and sum(sizes) == 2 * sum(SIZES)
    for rows, found in zip(seen.steps.values(), outcome.gradients, strict=True):
        module.zero_grad()
        cross_entropy(module, [sample(row) for row in rows]).backward()
        for name, expected in gradients(module).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
