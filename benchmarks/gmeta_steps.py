"""Steps of meta learning under the strategy ``hybrid``, on the ranks of the present group: losses, seconds, and what was sent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch import Tensor
from typing_extensions import override

from strategies import HybridStrategy
from strategies.traffic import Traffic
from zoo.ctr import DLRMNetwork
from zoo.gmeta import GMeta

__all__ = ["LARGE", "SWITCHES", "Crossing", "Steps", "Stopped", "fit", "slowest"]

LARGE = partial(DLRMNetwork, embed_dim=16, bottom=(64,), top=(64, 32), dropout=0.0)
SWITCHES: dict[str, dict[str, Any]] = {
    "fused": {},
    "not deduplicated": {"dedup": False},
    "two calls": {"lookup": "two_call"},
    "a call per task": {"lookup": "per_task"},
    "gather and broadcast": {"outer": "gather"},
    "a reduction per tensor": {"bucket": "per_tensor"},
    "consecutive rows": {"partition": "block"},
}
"""Arguments of the strategy, of which the first are the defaults."""


@dataclass
class Crossing:
    """Bytes that all-to-alls of this rank send to others, not to itself."""

    num_bytes: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count while the context lasts."""
        original = dist.all_to_all_single

        def counting(output: Tensor, tensor: Tensor, got: Any = None, sent: Any = None, group: Any = None) -> Any:
            ranks, rank = dist.get_world_size(group), dist.get_rank(group)
            rows = [len(tensor) // ranks] * ranks if sent is None else sent
            self.num_bytes += (sum(rows) - rows[rank]) * (tensor.nbytes // max(1, len(tensor)))
            return original(output, tensor, got, sent, group=group)

        dist.all_to_all_single = counting
        try:
            yield
        finally:
            dist.all_to_all_single = original


@dataclass
class Stopped:
    """What steps were like.

    Attributes:
        losses: Of each step, of all ranks.
        seconds: Of each step, of this rank.
        traffic: Collectives of the steps after the first two.
        crossing: Bytes of the same steps that left this rank by all-to-all.
        rows: Sum over these steps of distinct rows that this rank asked for.
        table_bytes: Of the table and what its optimizer keeps for it, on this rank, in the last step.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    crossing: Crossing = field(default_factory=Crossing)
    rows: int = 0
    table_bytes: int = 0


class Steps(Callback):
    """Notes each step in a `Stopped`; the first two, in which DDP arranges its buckets, are not counted.

    Args:
        counted: Whether to count what is sent, which costs time.
    """

    def __init__(self, counted: bool) -> None:
        self.counted, self.found = counted, Stopped()
        self.begin = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.counted and batch_idx >= 2:
            sets = [batch[name] for name in ("support", "query")]
            numbers = [pl_module.network.row_numbers(each["sparse"])[each["mask"]].flatten() for each in sets]
            self.found.rows += len(torch.cat(numbers).unique())
            self.crossed = self.found.crossing.counted()
            self.crossed.__enter__()
            self.found.traffic.__enter__()
        self.begin = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.seconds.append(time.perf_counter() - self.begin)
        if self.counted and batch_idx >= 2:
            self.found.traffic.__exit__(None, None, None)
            self.crossed.__exit__(None, None, None)
        self.found.losses.append(float(trainer.callback_metrics["train/loss"]))
        (table,) = pl_module.row_tables().values()
        kept = [each for each in trainer.optimizers[0].state[table].values() if isinstance(each, Tensor)]
        self.found.table_bytes = sum(each.nbytes for each in (table, *kept))


def fit(
    data: LightningDataModule,
    steps: int,
    switches: Mapping[str, Any] | None,
    counted: bool = False,
    callbacks: Sequence[Callback] = (),
    **model: Any,
) -> tuple[GMeta, Stopped]:
    """Train under the strategy.

    Args:
        data: Tasks.
        steps: Steps.
        switches: Arguments of `HybridStrategy`; None: plain DDP, with whole tables on every rank.
        counted: Count what is sent.
        callbacks: Others of the caller's.
        **model: Arguments of `GMeta`.
    """
    seed_everything(0, verbose=False)
    noted = Steps(counted)
    module = GMeta(LARGE, list(data.field_dims), data.num_dense, **model)  # type: ignore[attr-defined]
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    trainer = Trainer(
        accelerator="cpu", devices=local, num_nodes=int(os.environ["WORLD_SIZE"]) // local,
        strategy="ddp" if switches is None else HybridStrategy(**switches), max_steps=steps, max_epochs=-1, limit_val_batches=0,
        callbacks=[noted, *callbacks], **dict.fromkeys(off, False),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, noted.found


def slowest(seconds: float) -> float:
    """The longest time among the ranks."""
    longest = torch.tensor([seconds])
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)
