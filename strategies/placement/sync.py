"""Weights of the ranks that train, brought to the copies on ranks that generate; only what is trained travels."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from strategies.placement.exchange import waiting

__all__ = ["buckets", "copy_weights", "trained_weights"]


def trained_weights(network: nn.Module) -> list[Tensor]:
    """Parameters that are trained, in the order of their names, which is the same on both sides."""
    return [parameter for _, parameter in sorted(network.named_parameters()) if parameter.requires_grad]


def buckets(tensors: Iterable[Tensor], num_bytes: int) -> Iterator[list[Tensor]]:
    """Tensors of one type, in lists of at most so many bytes, or of one tensor that is larger."""
    held: list[Tensor] = []
    size = 0
    for tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if held and (size + more > num_bytes or tensor.dtype != held[0].dtype):
            yield held
            held, size = [], 0
        held.append(tensor)
        size += more
    if held:
        yield held


@torch.no_grad()
def copy_weights(
    weights: list[Tensor], source: int, targets: Sequence[int], group: dist.ProcessGroup, bucket_mb: int, what: str
) -> None:
    """Copy weights from one rank to others: to the first of these, which may be far away, and from there to the rest.

    Args:
        weights: On all of these ranks the tensors, in one order; those of the source may be divided over ranks that all
            call this.
        source: Global rank that has them.
        targets: Global ranks that get them, without the source.
        group: The targets.
        bucket_mb: Megabytes that travel at a time.
        what: Named if a wait fails.
    """
    me = dist.get_rank()
    for bucket in buckets(weights, bucket_mb * 2**20):
        if me in targets:
            flat = torch.empty(sum(tensor.numel() for tensor in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
            with waiting(what, [source, *targets[:1]]):
                if me == targets[0]:
                    dist.recv(flat, source)
                if len(targets) > 1:
                    dist.broadcast(flat, targets[0], group=group)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
            continue
        whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in bucket]
        if me == source:
            with waiting(what, targets[:1]):
                dist.send(torch.cat([tensor.detach().flatten() for tensor in whole]), targets[0])
