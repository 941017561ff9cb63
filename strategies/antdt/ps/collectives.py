"""Collective calls of workers that share no process group: each brings what it has to the clock, which gives all of it to all."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from strategies.antdt.ps.worker import ParameterClient

__all__ = ["Collectives"]


class Collectives:
    """Barriers, broadcasts and reductions over the workers that take part.

    Args:
        rank: of this worker.
        world_size: W, workers with which the run began.

    Attributes:
        client: through which they meet; None: this worker is by itself.
        present: ranks that take part, as far as this worker knows.
        in_step: whether this worker is in a training step, of which others, that are at different ones, know nothing.
        parted: whether this worker goes its own way: it has failed, or come too late.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self._world_size = rank, world_size
        self.client: ParameterClient | None = None
        self.present: list[int] = []
        self.in_step = self.parted = False

    def meets(self) -> bool:
        """Whether there are others to be asked."""
        return self.client is not None and not self.client.late and not self.parted and self._world_size > 1

    def gather(self, value: Any, what: str) -> dict[int, Any]:
        """What each worker has brought, by rank.

        Args:
            value: numbers, text, tensors, and lists and dictionaries of them.
            what: the call, for messages.

        Raises:
            RuntimeError: others would not come, or have come to another call.
        """
        if not self.meets():
            return {self.rank: value}
        if self.in_step:
            raise RuntimeError(
                f"ParameterServerStrategy: {what} was asked for in a training step, while workers are at different steps, and"
                " would never end: do it after the epoch (on_epoch=True), or in validation."
            )
        assert self.client is not None
        found = self.client.gather([what, value])
        if len({kind for kind, _ in found.values()}) > 1:
            raise RuntimeError(
                "ParameterServerStrategy: workers are at different places:"
                f" {', '.join(f'{rank} at {kind}' for rank, (kind, _) in found.items())}. Something is done on some of them only."
            )
        return {rank: own for rank, (_, own) in found.items()}

    def broadcast(self, value: Any, src: int) -> Any:
        """One worker's value; a worker that is gone has nothing to say, and each keeps its own."""
        return self.gather(value if self.rank == src else None, "a broadcast").get(src, value)

    def reduce(self, tensor: Tensor, reduce_op: Any) -> Tensor:
        """Sum, mean, max or min over all workers.

        Args:
            tensor: of the same shape on all.
            reduce_op: of torch, or its name; None: sum.

        Raises:
            ValueError: another operation.
        """
        found = self.gather(tensor.detach().cpu(), "a reduction")
        stacked = torch.stack(list(found.values())).to(tensor.device)
        name = str(reduce_op).lower().rsplit(".", 1)[-1] if reduce_op is not None else "sum"
        if name in ("mean", "avg"):
            return (stacked.float() if not stacked.is_floating_point() else stacked).mean(0)
        if name == "sum":
            return stacked.sum(0)
        if name in ("max", "min"):
            return stacked.amax(0) if name == "max" else stacked.amin(0)
        raise ValueError(f"ParameterServerStrategy: reduce_op={reduce_op!r} must be mean, sum, max or min.")

    def decide(self, decision: bool, all: bool) -> bool:
        """Whether all workers, or any, say yes."""
        votes = self.gather(bool(decision), "a decision").values()
        return min(votes) if all else max(votes)

    def stack(self, tensor: Tensor) -> Tensor:
        """Tensors of all workers, along a new first dimension; of one that was always alone, its own as it is."""
        found = self.gather(tensor.detach().cpu(), "a gathering of tensors")
        return torch.stack(list(found.values())).to(tensor.device) if len(found) > 1 or self._world_size > 1 else tensor

    @torch.no_grad()
    def share(self, module: nn.Module, but: Collection[Tensor] = ()) -> None:
        """Let all workers have the first one's parameters and buffers, as in DDP.

        Args:
            module: the same on all.
            but: parameters that come from elsewhere.
        """
        left_out = {id(tensor) for tensor in but}
        shared = [tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.numel() and id(tensor) not in left_out]
        first = self.rank == min(self.present, default=self.rank)
        found = self.gather([tensor.detach().cpu() for tensor in shared] if first else None, "a synchronisation")
        values = next((value for value in found.values() if value is not None), None)
        if values is not None and not first:
            for tensor, value in zip(shared, values, strict=True):
                tensor.copy_(value)

    def serve_metrics(self, module: nn.Module) -> None:
        """Let a module's torchmetrics, which would ask a process group, ask here."""
        metric: Any
        for metric in module.modules():
            if hasattr(metric, "dist_sync_fn") and hasattr(metric, "distributed_available_fn"):
                metric.dist_sync_fn = self._gather_for_metric
                metric.distributed_available_fn = self.meets

    def _gather_for_metric(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        found = self.gather(tensor.detach().cpu(), "a metric of all workers")
        return [value.to(tensor.device) for value in found.values()]
