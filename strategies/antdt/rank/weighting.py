"""The gradient of a global batch that ranks share unequally (section 2.7).

Target: ``g = (1 / N) sum of the gradients of all samples``, with ``N = sum_i n_i``. DDP averages over the W ranks, so the mean
loss of micro-batch c of rank i is multiplied by

    W n_ic / N,                                                                                             (``loss``)

and only the last micro-batch of the step is followed by a reduction. Equivalently, the loss by ``n_ic / n_i``, and the bucket
of gradients by ``n_i / N`` before it is *summed* over ranks (``hook``). Where losses are means over something else than
samples, such as tokens, ``n`` counts that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

__all__ = ["GradientReduction", "Weighting", "loss_scale", "reduce_gradients", "split_evenly"]

Weighting = Literal["loss", "hook"]


def split_evenly(count: int, cap: int | None) -> list[int]:
    """Sizes of the micro-batches of ``count`` samples: as few as can be, none above ``cap``, equal but for one sample.

    Args:
        count: n_i.
        cap: most samples of a micro-batch; None for no limit.

    Example:
        >>> split_evenly(10, 4), split_evenly(0, 4)
        ([4, 3, 3], [])
    """
    if count == 0:
        return []
    parts = 1 if cap is None else -(-count // cap)
    few, more = divmod(count, parts)
    return [few + (part < more) for part in range(parts)]


def loss_scale(weight: float, own: float, total: float, world_size: int, weighting: Weighting) -> float:
    """Factor for the mean loss of a micro-batch.

    Args:
        weight: n_ic, of the micro-batch; 0 for a shadow batch, which takes part in communication only.
        own: n_i, of this rank's micro-batches together.
        total: N, of all ranks.
        world_size: W.
        weighting: where the rest of the weight is applied.
    """
    if not weight:
        return 0.0
    return weight * world_size / total if weighting == "loss" else weight / own


@dataclass
class GradientReduction:
    """State of the communication hook.

    Attributes:
        share: n_i / N of the present step, where the hook weighs.
        weighting: ``loss``: buckets are averaged; ``hook``: weighed and summed.
        handed_over: called when the last bucket of the step is handed to the collective, so that what follows is waiting.
        inner: another hook that reduces in place of ours, with its state.
    """

    weighting: Weighting
    handed_over: Callable[[], None] = lambda: None
    share: float = 1.0
    inner: tuple[Callable[..., Any], Any] | None = field(default=None)
    process_group: dist.ProcessGroup | None = None


def reduce_gradients(state: GradientReduction, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook for ``DistributedDataParallel`` (its second parameter must be called ``bucket``)."""
    last = bucket.is_last()
    if state.inner is not None:
        future = state.inner[0](state.inner[1], bucket)
    elif state.weighting == "loss":
        future = allreduce_hook(state.process_group, bucket)  # type: ignore[arg-type]
    else:
        future = _sum(bucket.buffer().mul_(state.share), state.process_group)
    if last:
        state.handed_over()
    return future


def _sum(gradients: Tensor, group: dist.ProcessGroup | None) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(gradients, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
