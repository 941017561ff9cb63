"""What the recipes of the language model combine: its callbacks, warm-up and compiled blocks, under the strategies they name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from edit_runs import FULL, weights_of
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.distributed import get_rank, get_world_size

from datamodules import ZooDataModule
from strategies import EDiTShardedStrategy, ExpertParallelStrategy
from zoo.callbacks import BatchSizeWarmup, SpikeGuard
from zoo.ling import Ling, LingConfig, RouterMonitor

CONFIG = LingConfig(
    vocab_size=24, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, intermediate_size=16, first_k_dense_replace=1,
    initializer_range=0.3, pad_token_id=None, eos_token_id=None,
)  # fmt: skip
GLOBAL_BATCH, STEPS, PLANTED = 8, 10, 5


class Texts(ZooDataModule):
    """Sequences in which every second token follows from the one before."""

    def train_dataloader(self) -> Any:
        ids = torch.randint(CONFIG.vocab_size, (5 * GLOBAL_BATCH, 6), generator=torch.Generator().manual_seed(1))
        ids[:, 1::2] = ids[:, ::2] * 5 % CONFIG.vocab_size
        return self.train_loader([{"input_ids": row, "index": torch.tensor(i)} for i, row in enumerate(ids)])


class Spiking(Ling):
    """Reports a loss far too high at one step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == PLANTED:
            self.last_losses = {name: value + 5 * name.startswith("ce") for name, value in self.last_losses.items()}
        return loss


def run(
    folder: Path, kind: Callable[[], Any] | str, config: LingConfig = CONFIG, compiled: bool = False, steps: int = STEPS
) -> dict[str, Any]:
    """Train by a recipe in miniature on the ranks of the present group."""
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    model = Spiking(
        config, aux_scope="global", router_warmup_steps=8, activation_checkpointing=True, loss_chunk=7,
        compile=compiled, optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )  # fmt: skip
    guard, monitor = SpikeGuard(alpha=0.2, warmup=4, threshold=3.0, retry_window=4), RouterMonitor(every_n_steps=7)
    Trainer(
        accelerator="cpu", devices=get_world_size(), strategy=kind if isinstance(kind, str) else kind(), precision="64-true",
        max_steps=steps, gradient_clip_val=1.0, callbacks=[guard, monitor, BatchSizeWarmup(4, 8, 60)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    ).fit(model, Texts(batch_size=GLOBAL_BATCH // get_world_size() // 2))  # fmt: skip
    state = guard.state_dict()
    return {
        "guard": {name: state[name] for name in ("skipped", "reduced", "consecutive", "waiting")},
        "detectors": [state[f"{name}_detector"]["mean"] for name in ("loss", "norm")],
        "applied": model.applied_steps,
        "experts": monitor.latest,
        "weights": weights_of(model),
        "rank": get_rank(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_guard_monitor_ramp_and_warm_up_with_divided_experts_are_those_of_one_process(
    pool: RankPool, tmp_path: Path, world_size: int
) -> None:
    (one,) = pool.run(run, tmp_path, "auto", world_size=1)
    assert one["guard"] == {"skipped": 1, "reduced": 0, "consecutive": 0, "waiting": []} and one["applied"] == STEPS - 1
    for rank in pool.run(run, tmp_path, partial(ExpertParallelStrategy, 2), world_size=world_size):
        assert (rank["guard"], rank["applied"]) == (one["guard"], one["applied"])
        assert rank["detectors"] == pytest.approx(one["detectors"], rel=1e-5)  # the guard's sums are float32
        assert rank["experts"] == pytest.approx(one["experts"], rel=1e-5)
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-8, atol=1e-10, msg=name)


SHARDED = partial(EDiTShardedStrategy, shard_size=2, sync_interval=3, warmup_steps=2, **FULL)


@pytest.mark.slow
def test_replicas_meet_in_the_statistics_of_their_routers_too(pool: RankPool, tmp_path: Path) -> None:
    ranks = pool.run(run, tmp_path, SHARDED, world_size=4)
    assert len([name for name in ranks[0]["weights"] if "running" in name]) == 4
    assert ranks[0]["experts"] == ranks[1]["experts"] != ranks[2]["experts"] == ranks[3]["experts"]  # each replica its own texts
    assert all(torch.equal(rank["weights"][name], value) for rank in ranks for name, value in ranks[0]["weights"].items())


@pytest.mark.slow
def test_compiled_blocks_in_shards_are_the_plain_ones(pool: RankPool, tmp_path: Path) -> None:
    small = CONFIG.replace(num_hidden_layers=1, first_k_dense_replace=0)
    plain, compiled = (pool.run(run, tmp_path, SHARDED, small, choice, 7, world_size=4, timeout=240) for choice in (False, True))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours["guard"], ours["applied"]) == (theirs["guard"], theirs["applied"])
        for name, value in theirs["weights"].items():
            torch.testing.assert_close(ours["weights"][name], value, rtol=1e-7, atol=1e-9, msg=name)
