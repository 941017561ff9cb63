"""Hybrid parallelism as a strategy of Lightning: tables divided by rows, everything else as in data parallelism."""

from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from strategies.divided_rows import DividedRows, Layout
from strategies.divided_strategy import DividedStrategy
from strategies.hybrid.exchange import Lookup, RowExchange
from strategies.refusals import refuse_averages, refuse_ddp_hooks
from zoo.nn.row_lookup import LocalRows, RowLink
from zoo.nn.row_optimizers import row_optimizer, updates_by_row
from zoo.strategy_contract import HasRows

__all__ = ["HybridStrategy", "gather_and_broadcast"]


class HybridStrategy(DividedStrategy[DividedRows]):
    """Data parallelism in which the ranks divide embedding tables by rows.

    A module asks for the rows of a step at once (`zoo.strategy_contract.row_link`); they travel by all-to-all, once, and their
    gradients back, while DDP averages the gradients of everything else. The module has ``row_tables()`` (`HasRows`), as all click
    models have: meta learning (`GMeta`) and plain training work alike. Clipping, checkpoints and the end of a run are those of
    `DividedStrategy`. One process keeps whole tables and sends nothing.

    Args:
        partition: Whether a rank keeps consecutive rows, or each W-th, which divides the rows of every field evenly.
        lookup: See `RowExchange`; but for ``fused`` to be compared with.
        dedup: Likewise.
        outer: How other gradients are summed: by all-reduce, or gathered, summed and broadcast by rank 0, as a central node does
            it; to be compared with.
        bucket: Whether many of them travel together, or each alone; to be compared with.
        **kwargs: As for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: An argument is unknown; in a run, the module has no tables, a table has fewer rows than there are ranks, its
            optimizer is not one whose updates go row by row, weights are averaged, or precision is 16-mixed.
    """

    def __init__(
        self,
        partition: Layout = "mod",
        lookup: Lookup = "fused",
        dedup: bool = True,
        outer: Literal["allreduce", "gather"] = "allreduce",
        bucket: Literal["flat", "per_tensor"] = "flat",
        **kwargs: Any,
    ) -> None:
        refuse_ddp_hooks(self, kwargs)
        for name, value, known in (
            ("partition", partition, get_args(Layout)),
            ("lookup", lookup, get_args(Lookup)),
            ("outer", outer, ("allreduce", "gather")),
            ("bucket", bucket, ("flat", "per_tensor")),
        ):
            if value not in known:
                raise ValueError(f"HybridStrategy: {name}={value!r} must be one of {', '.join(known)}.")
        if bucket == "per_tensor":
            kwargs["bucket_cap_mb"] = 2**-20  # a byte
        super().__init__(**kwargs)
        self.partition, self.lookup, self.dedup, self.outer = partition, lookup, dedup, outer
        self._group: dist.ProcessGroup | None = None
        self._exchange: RowExchange | None = None

    @override
    def _divide(self, module: LightningModule) -> DividedRows | None:
        """Divide the tables."""
        self._exchange = None
        if not isinstance(module, HasRows) or not module.row_tables():
            raise ValueError(
                f"HybridStrategy divides embedding tables, and {type(module).__name__} names none: give it row_tables(), or use"
                " ddp."
            )
        if self.world_size == 1:
            return None
        tables = list(module.row_tables().values())
        if self._group is None:  # of its own, so that its order does not depend on that of DDP's reductions
            self._group = cast(dist.ProcessGroup, dist.new_group())
        num_rows = len(tables[0])
        parts = DividedRows(module, tables, self._group, self.root_device, self.partition)
        parts.divide()
        self._exchange = RowExchange(parts, num_rows, self.lookup, self.dedup)
        return parts

    @override
    def _register_ddp_hooks(self) -> None:
        super()._register_ddp_hooks()
        if self.outer == "gather" and isinstance(self.model, DistributedDataParallel):  # Lightning's own are for GPUs only
            self.model.register_comm_hook(None, gather_and_broadcast)

    @override
    def row_link(self) -> RowLink:
        """Fetches rows from the ranks that keep them."""
        return LocalRows() if self._exchange is None else self._exchange

    @override
    def forwards_are_collective(self) -> bool:
        return True

    @override
    def setup(self, trainer: Trainer) -> None:
        """Wrap the module, and check what steps its tables."""
        if self._parts is not None:
            refuse_averages(self, trainer, "and would average parts of tables", "leave it out, or use ddp")
        super().setup(trainer)
        for optimizer in self.optimizers:
            for table in [] if self._parts is None else self._parts.parameters:
                part = row_optimizer(optimizer, table)
                if part is not None and not updates_by_row(part):
                    raise ValueError(
                        f"HybridStrategy: {type(part).__name__} may mix rows of a table, which lie on several ranks: take Adam,"
                        " SGD or RowAdagrad, or set updates_by_row = True on a class that does not."
                    )


def gather_and_broadcast(state: Any, bucket: dist.GradBucket) -> Future[Tensor]:
    """A hook for DDP: rank 0 gathers the gradients of all, sums them and sends the mean to all."""
    buffer, size = bucket.buffer(), dist.get_world_size()
    gathered = [torch.empty_like(buffer) for _ in range(size)] if dist.get_rank() == 0 else None
    dist.gather(buffer, gathered)
    if gathered is not None:
        buffer.copy_(torch.stack(gathered).sum(0).div_(size))
    dist.broadcast(buffer, src=0)
    done: Future[Tensor] = Future()
    done.set_result(buffer)
    return done


StrategyRegistry.register("hybrid", HybridStrategy, description="Embedding tables divided among the ranks by rows")
