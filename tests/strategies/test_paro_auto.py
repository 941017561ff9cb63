"""A code chosen when the run begins, and what a run says of its traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from strategies.paro import PaROStrategy, Partition
from strategies.paro.volume import padded, volume
from zoo.callbacks import TrafficMonitor

WIDTH, MICRO_BATCHES = 20, 2


class Tower(LightningModule):
    """Three blocks and a root."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = layer(batch).tanh()
        return self.out(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def train(folder: Path, strategy: Any, callbacks: list[Any], devices: int) -> Tower:
    model = Tower()
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=4, accumulate_grad_batches=MICRO_BATCHES,
        callbacks=callbacks, default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=2, use_distributed_sampler=False,
    )  # fmt: skip
    rows = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    trainer.fit(model, DataLoader(rows, batch_size=1))  # type: ignore[arg-type]
    return model


def chosen(folder: Path, limit_gb: float | None) -> tuple[str, list[str], dict[str, float], list[Tensor]]:
    strategy, monitor = PaROStrategy("auto", group_size=2, memory_limit_gb=limit_gb), TrafficMonitor()
    model = train(folder, strategy, [monitor], 4)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return str(strategy.partition), [cost.partition for cost in strategy.advice], monitor.latest, weights


def test_a_code_that_fits_is_chosen_on_all_ranks_alike_and_trains_as_one_process(pool: RankPool, tmp_path: Path) -> None:
    one = list(train(tmp_path, "auto", [], 1).parameters())
    layer, root = WIDTH * WIDTH + WIDTH, WIDTH + 1
    whole = 4 * 4 * (3 * layer + root)  # parameters, gradients and two moments
    ranks = pool.run(chosen, tmp_path, whole / 2 * 1e-9, world_size=4)
    code, advice, latest, _ = ranks[0]
    assert all(rank[:2] == (code, advice) for rank in ranks)
    assert "NNN" not in advice and "GGG" in advice
    for *_, weights in ranks:
        for mine, expected in zip(weights, one, strict=True):
            torch.testing.assert_close(mine, expected.detach(), rtol=0, atol=1e-5)
    psi, psi_root = 3 * padded(layer, 4) + padded(root, 4), padded(root, 4)
    sent = volume(Partition.of(code), n=4, m=2, s=MICRO_BATCHES, psi=psi, psi_root=psi_root)
    assert latest["traffic/inter_bytes"] == sent.inter
    assert latest["traffic/intra_bytes"] == sent.intra
    assert 0 < latest["traffic/state_bytes"] <= whole / 2


def too_little(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        chosen(folder, 1e-9)
    return str(error.value)


@pytest.mark.slow
def test_no_code_that_fits_is_an_error_before_training(pool: RankPool, tmp_path: Path) -> None:
    assert "no partition fits" in pool.run(too_little, tmp_path, world_size=4)[0]


def test_a_limit_goes_with_auto_only() -> None:
    with pytest.raises(ValueError, match="memory_limit_gb=1 must be positive, and goes with partition: auto"):
        PaROStrategy("IIG", memory_limit_gb=1)


def test_a_strategy_that_does_not_count_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SingleDeviceStrategy does not count what it sends"):
        train(tmp_path, "auto", [TrafficMonitor()], 1)
