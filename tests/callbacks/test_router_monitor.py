"""The figures are those of all micro-batches and ranks together, and have their known values at the limits."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from zoo.ling import RouterMonitor
from zoo.strategy_contract import StrategyContract

LAYERS, EXPERTS, K = 2, 4, 2


def stats_of(logits_LTE: Tensor) -> SimpleNamespace:
    """What a router that takes the best two of four experts reports."""
    chosen_LTk = logits_LTE.topk(K).indices
    counts_LE = torch.stack([torch.bincount(ids.flatten(), minlength=EXPERTS) for ids in chosen_LTk])
    return SimpleNamespace(
        counts=counts_LE,
        mean_probability=logits_LTE.softmax(-1).mean(1),
        logit_mean=logits_LTE.mean((1, 2)),
        logit_std=logits_LTE.std((1, 2), correction=0),
    )


class Routed(LightningModule):
    """Reports the routers' statistics of logits that are given batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.router_stats = None

    def training_step(self, batch, batch_idx):
        self.router_stats = stats_of(batch)
        return self.weight * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def monitored(batches, **options) -> tuple[RouterMonitor, Trainer]:
    monitor = RouterMonitor(every_n_steps=options.pop("every", 1))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=1, callbacks=[monitor, *options.pop("callbacks", [])], **options,
    )  # fmt: skip
    trainer.fit(Routed(), torch.utils.data.DataLoader(batches, batch_size=None))
    return monitor, trainer


def logits(seed: int, tokens: int) -> Tensor:
    return 2 * torch.randn(LAYERS, tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def expected(logits_LTE: Tensor) -> dict[str, float]:
    stats = stats_of(logits_LTE)
    violation_L = stats.counts.amax(1) / stats.counts.float().mean(1) - 1
    probability_LE = stats.mean_probability
    return {
        "router/max_violation": violation_L.mean().item(),
        "router/max_violation_worst": violation_L.max().item(),
        "router/entropy": -(probability_LE * probability_LE.log()).sum(1).mean().item(),
        "router/dead_experts": float((stats.counts == 0).sum()),
        "router/logit_std": stats.logit_std.mean().item(),
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_figures_are_those_of_all_tokens_since_the_last_log(accumulate):
    """Micro-batches of different length count by their tokens."""
    batches = [logits(seed, tokens) for seed, tokens in enumerate((5, 7, 30, 9, 4, 12))]
    every = 3 // accumulate
    monitor, trainer = monitored(batches, accumulate_grad_batches=accumulate, every=every)
    assert monitor.latest == pytest.approx(expected(torch.cat(batches[3:], 1)), rel=1e-5)
    assert trainer.callback_metrics["router/entropy"].item() == pytest.approx(monitor.latest["router/entropy"])


def test_an_even_router_and_one_that_has_collapsed():
    even = torch.eye(EXPERTS) + torch.eye(EXPERTS).roll(1, 0)
    monitor, _ = monitored([even.expand(LAYERS, -1, -1)])
    assert monitor.latest["router/max_violation"] == monitor.latest["router/dead_experts"] == 0
    assert monitor.latest["router/entropy"] == pytest.approx(math.log(EXPERTS))
    collapsed = torch.tensor([200.0, 100.0, 0.0, 0.0]).expand(1, 9, -1)
    monitor, _ = monitored([torch.cat([even.repeat(3, 1)[None, :9], collapsed])])
    assert monitor.latest["router/max_violation_worst"] == EXPERTS / K - 1
    assert monitor.latest["router/dead_experts"] == 2
    assert 0 < monitor.latest["router/entropy"] < math.log(EXPERTS) / 2 + 1e-6


def test_an_expert_is_dead_only_if_no_micro_batch_used_it():
    first, second = torch.tensor([3.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0, 2.0])
    batches = [logit.expand(LAYERS, 4, -1) for logit in (first, second)]
    assert monitored(batches, every=1)[0].latest["router/dead_experts"] == 2 * LAYERS
    assert monitored(batches, every=2)[0].latest["router/dead_experts"] == 0


def on_ranks() -> dict[str, float]:
    rank = torch.distributed.get_rank()
    batches = [logits(2 * step + rank, 6 + rank) for step in range(2)]
    return monitored(batches, devices=2, strategy="ddp", use_distributed_sampler=False, every=2)[0].latest


def test_ranks_are_counted_together(pool):
    both = pool.run(on_ranks, world_size=2)
    everything = torch.cat([logits(2 * step + rank, 6 + rank) for step in range(2) for rank in range(2)], 1)
    assert both[0] == both[1] == pytest.approx(expected(everything), rel=1e-5)


class Alone(StrategyContract, DDPStrategy):
    """Replicas of one rank each, which train on their own."""

    def setup(self, trainer):
        super().setup(trainer)
        self.groups = [torch.distributed.new_group([rank]) for rank in range(self.world_size)]

    def step_group(self):
        return self.groups[self.global_rank]


def on_replicas() -> dict[str, float]:
    """Rank 1 logs at other times than rank 0: it must not wait for it."""
    rank = torch.distributed.get_rank()
    every = 2 if rank == 0 else 1
    batches = [logits(2 * step + rank, 6 + rank) for step in range(2)]
    options = {"devices": 2, "strategy": Alone(), "use_distributed_sampler": False}
    return monitored(batches, every=every, **options)[0].latest


def test_replicas_that_train_on_their_own_are_counted_apart(pool):
    first, second = pool.run(on_replicas, world_size=2)
    assert first == pytest.approx(expected(torch.cat([logits(0, 6), logits(2, 6)], 1)), rel=1e-5)
    assert second == pytest.approx(expected(logits(3, 7)), rel=1e-5)


def test_a_module_without_routers_and_a_wrong_interval_are_refused():
    with pytest.raises(ValueError, match="LightningModule has no router_stats"):
        RouterMonitor().setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "fit")
    with pytest.raises(ValueError, match="every_n_steps=0"):
        RouterMonitor(0)
