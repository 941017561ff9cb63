"""Sign consensus of replicas against its definition, number by number, and on real processes."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from distributed import RankPool
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from strategies import EDiTShardedStrategy, EDiTStrategy
from strategies.edit.consensus import Consensus, ballot, elect, kept_at_random, magnitude_limit
from strategies.traffic import Traffic
from zoo import ZooModule

SETTINGS = [
    Consensus(),
    Consensus(sign="count"),
    Consensus(renormalize=False),
    Consensus(sign="count", renormalize=False),
    Consensus("magnitude", 0.5, None),
    Consensus("magnitude", 0.5),
    Consensus("random", 0.5, "count"),
]


def elected(deltas: list[Tensor], weights: list[float], consensus: Consensus) -> Tensor:
    pairs = zip(deltas, weights, strict=True)
    return elect(torch.stack([ballot(delta * weight, weight, consensus) for delta, weight in pairs]).sum(0), consensus)


def by_definition(deltas: list[Tensor], weights: list[float], consensus: Consensus) -> Tensor:
    """One number after another, in Python."""
    result = []
    for column in zip(*(delta.tolist() for delta in deltas), strict=True):
        parts = [weight * number for weight, number in zip(weights, column, strict=True)]
        votes = parts if consensus.sign != "count" else [(part > 0) - (part < 0) for part in parts]
        # Rounded alike: sums of either sign apart.
        majority = sum(vote for vote in votes if vote > 0) - sum(-vote for vote in votes if vote < 0)
        agree = [i for i, part in enumerate(parts) if part * majority > 0] if consensus.sign else range(len(parts))
        total = sum(parts[i] for i in agree)
        if consensus.sign and consensus.renormalize and agree:
            total /= sum(weights[i] for i in agree)
        result.append(float(total))
    return torch.tensor(result, dtype=torch.float64)


ROW = st.lists(st.sampled_from([-3.0, -1.0, -0.25, 0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6)
NUMBERS = st.lists(ROW, min_size=1, max_size=5)


@pytest.mark.parametrize("consensus", [each for each in SETTINGS if each.density == 1] + [Consensus("magnitude", 0.9, None)])
@given(NUMBERS, st.data())
@settings(max_examples=30, deadline=None)
def test_the_election_is_the_definition(consensus: Consensus, numbers: list[list[float]], data: st.DataObject) -> None:
    deltas = [torch.tensor(row, dtype=torch.float64) for row in numbers]
    weights = [data.draw(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])) for _ in deltas]
    ours = elected(deltas, weights, consensus)
    torch.testing.assert_close(ours, by_definition(deltas, weights, consensus), rtol=1e-12, atol=1e-12)
    # Neither direction is preferred, nor any order of the replicas.
    torch.testing.assert_close(elected([-delta for delta in deltas], weights, consensus), -ours, rtol=0, atol=0)
    torch.testing.assert_close(elected(deltas[::-1], weights[::-1], consensus), ours, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sign", ["sum", "count"])
def test_limits(sign: Any) -> None:
    torch.manual_seed(0)
    one, up = torch.randn(50, dtype=torch.float64), torch.rand(3, 50, dtype=torch.float64) + 0.1
    consensus, weights = Consensus(sign=sign), [0.2, 0.5, 0.3]
    torch.testing.assert_close(elected([one] * 3, weights, consensus), one)  # identical replicas are one
    # Where all agree it is the weighted mean; two that differ by sign alone move nothing.
    torch.testing.assert_close(elected(list(up), weights, consensus), (up * torch.tensor(weights)[:, None].double()).sum(0))
    assert not elected([one, -one], [0.5, 0.5], consensus).any()
    # A replica that is left out has no say.
    torch.testing.assert_close(elected([one, -9 * one], [1.0, 0.0], consensus), one)


def test_sum_and_count_differ_where_one_outweighs_two() -> None:
    deltas, weights = [torch.tensor([x], dtype=torch.float64) for x in (4.0, -1.0, -2.0)], [0.5, 0.25, 0.25]
    found = {(sign, scaled): elected(deltas, weights, Consensus(sign=sign, renormalize=scaled)).item()
             for sign in ("sum", "count") for scaled in (True, False)}  # fmt: skip
    assert found == {("sum", True): 4.0, ("sum", False): 2.0, ("count", True): -1.5, ("count", False): -0.75}


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_magnitude_keeps_the_largest(count: int, density: float, seed: int) -> None:
    size = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = size >= magnitude_limit(size, density)
    assert kept.sum() == max(1, round(density * count))
    assert kept.all() or size[kept].min() > size[~kept].max()


def test_the_random_choice_is_a_function_of_seed_synchronisation_parameter_and_replica() -> None:
    one, shape = Consensus("random", 0.3, seed=1), torch.Size([300, 200])
    kept = kept_at_random(shape, one, 2, "layer.weight", 0)
    torch.manual_seed(99)
    assert torch.equal(kept, kept_at_random(shape, one, 2, "layer.weight", 0))
    assert abs(kept.double().mean() - 0.3) < 0.01
    name = "layer.weight"
    others = (replace(one, seed=2), 2, name, 0), (one, 3, name, 0), (one, 2, "layer.bias", 0), (one, 2, name, 1)
    for other in others:
        assert abs((kept & kept_at_random(shape, *other)).double().mean() - 0.09) < 0.01  # independent


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sign": "mean"}, "sign='mean' must be null, sum or count"),
        ({"sparsify": "first"}, "sparsify='first' must be null, magnitude or random"),
        ({"sparsify": "random", "density": 0.0}, "density=0.0 must lie"),
        ({"density": 0.5}, "density=0.5 needs sparsify="),
        ({"sign": None}, "does nothing"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Consensus(**wrong)


# On processes


class Stack(ZooModule):
    """Regression by a few layers."""

    def __init__(self) -> None:
        super().__init__(optimizer=partial(torch.optim.SGD, lr=0.05))
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.head = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        for layer in self.layers:
            x = x + layer(x).tanh()
        return (self.head(x) - y).square().mean()


def fit(kind: Any, resume: int | None = None, folder: Any = None, replicas: int | None = None) -> dict[str, Any]:
    """Six steps of each replica on its own rows; anchors before and deltas at the second synchronisation, and what came of it."""
    torch.set_default_dtype(torch.float64)
    seed_everything(5, verbose=False)
    strategy, model = kind(), Stack()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    replica = rank * (replicas or ranks) // ranks
    x = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(replica))
    seen: dict[str, Any] = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            synchronizer = strategy.synchronizer
            if synchronizer is None or trainer.global_step not in (4, 5):
                return
            slots = {slot.name: slot for slots in synchronizer._slots for slot in slots}
            if trainer.global_step == 4:
                seen["delta"] = {name: slot.whole(slot.delta()).clone() for name, slot in slots.items()}
                seen["before"] = {name: slot.whole(slot.anchor).clone() for name, slot in slots.items()}
                self.traffic = Traffic()
                self.traffic.__enter__()
            else:
                self.traffic.__exit__(None, None, None)
                seen["bytes"] = self.traffic.num_bytes("all_reduce")
                seen["after"] = {name: slot.whole(slot.anchor).clone() for name, slot in slots.items()}
                seen["units"] = {name: slot.unit for name, slot in slots.items()}
                seen["report"] = strategy.last_sync

    def trainer_of(steps: int, *callbacks: Callback) -> Trainer:
        return Trainer(
            accelerator="cpu", devices=ranks, strategy=strategy, precision="64-true", max_steps=steps, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            callbacks=list(callbacks),
        )  # fmt: skip

    rows = TensorDataset(x.flatten(0, 1), x.sin().sum(-1).flatten()[:, None])
    data = DataLoader(rows, batch_size=len(rows))  # the same batch at each step
    trainer = trainer_of(resume or 6, Watch())
    trainer.fit(model, data)
    if resume:
        trainer.save_checkpoint(folder / "cut.ckpt")
        strategy, model = kind(), Stack()
        trainer_of(6).fit(model, data, ckpt_path=folder / "cut.ckpt", weights_only=True)
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in model.named_parameters()}
    return {**seen, "weights": whole}


OPTIONS: dict[str, Any] = {"sync_interval": 2, "warmup_steps": 0, "outer_lr": 1.0, "outer_momentum": 0.0, "clip": None}


def fit_each(granularity: str) -> list[dict[str, Any]]:
    return [fit(partial(EDiTStrategy, **OPTIONS, consensus=consensus, granularity=granularity)) for consensus in SETTINGS]


@pytest.mark.parametrize(
    "granularity", ["block", pytest.param("parameter", marks=pytest.mark.slow), pytest.param("global", marks=pytest.mark.slow)]
)
def test_a_synchronisation_is_the_definition(pool: RankPool, granularity: str) -> None:
    for consensus, *ranks in zip(SETTINGS, *pool.run(fit_each, granularity, world_size=3), strict=True):
        moved = 0.0
        for name, before in ranks[0]["before"].items():
            deltas = [rank["delta"][name] for rank in ranks]
            weights = ranks[0]["report"].weights[ranks[0]["units"][name]]
            if consensus.sparsify == "magnitude":
                limits = [delta.abs().flatten().sort().values[-max(1, round(delta.numel() / 2))] for delta in deltas]
                deltas = [delta * (delta.abs() >= limit) for delta, limit in zip(deltas, limits, strict=True)]
            elif consensus.sparsify == "random":
                deltas = [delta * kept_at_random(delta.shape, consensus, 2, name, i) for i, delta in enumerate(deltas)]
            expected = by_definition([delta.flatten() for delta in deltas], weights, consensus).view_as(before)
            for rank in ranks:
                torch.testing.assert_close(rank["after"][name], before - expected, rtol=1e-12, atol=1e-14)
                assert torch.equal(rank["weights"][name], ranks[0]["weights"][name])
            moved += float(expected.abs().sum())
        assert moved > 1e-3
        rows = {None: 1, "sum": 2, "count": 3}[consensus.sign] + 2 * (consensus.renormalize and consensus.sign is not None)
        assert ranks[0]["bytes"] == 8 * rows * sum(value.numel() for value in ranks[0]["before"].values())


@pytest.mark.parametrize(
    "consensus", [Consensus("magnitude", 0.4), pytest.param(Consensus("random", 0.6, "count"), marks=pytest.mark.slow)]
)
def test_shards_overlap_offload_and_resuming_change_nothing(pool: RankPool, tmp_path: Any, consensus: Consensus) -> None:
    options = {**OPTIONS, "outer_momentum": 0.8, "clip": 0.01, "consensus": consensus}
    (whole, _) = pool.run(fit, partial(EDiTStrategy, **options))
    others = {
        "blocking": pool.run(fit, partial(EDiTStrategy, overlap=False, cpu_offload=True, **options)),
        "resumed": pool.run(fit, partial(EDiTStrategy, **options), 4, tmp_path),
        "sharded": pool.run(fit, partial(EDiTShardedStrategy, shard_size=2, **options), replicas=2, world_size=4),
    }
    plain = pool.run(fit, partial(EDiTStrategy, **{**options, "consensus": None}))[0]
    for name, value in whole["weights"].items():
        for which, runs in others.items():
            for run in runs:
                tolerance = 1e-10 if which == "sharded" else 0
                torch.testing.assert_close(run["weights"][name], value, rtol=tolerance, atol=tolerance, msg=f"{which} {name}")
    assert any(not torch.allclose(plain["weights"][name], value) for name, value in whole["weights"].items())
