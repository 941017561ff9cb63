"""The mean over a whole optimizer step, of micro-batches and processes with different numbers of labels.

With n_ic labels in micro-batch c of process i, and their mean loss l_ic, the loss of the step shall be

    sum_ic n_ic l_ic / N,    N = sum_ic n_ic,

as ``num_items_in_batch`` has it in transformers. Training averages over W processes and divides by a nominal number A of
micro-batches, and N is known with the last of them only. So l_ic is multiplied by ``W n_ic / N_1``, with N_1 the labels of the
step's first micro-batch in all processes, and the accumulated gradient by ``A N_1 / N``. Both are exactly 1 where all n_ic are
equal, and the second also without accumulation.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["StepMean"]


class StepMean:
    """Weights of the micro-batches of one optimizer step after the other, in one of the processes that average gradients.

    All of these call the methods equally often: `begin` and `finish` are collective calls where there are several.

    Example:
        >>> mean = StepMean()
        >>> weights = []
        >>> for labels in (4, 2):
        ...     mean.begin(torch.tensor(labels), first=labels == 4)
        ...     weights.append(float(mean.weight()))
        >>> weights, round(mean.finish(accumulate=2), 3)
        ([1.0, 0.5], 1.333)
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._first = torch.ones((), dtype=torch.int64)
        self._work: dist.Work | None = None
        self._group: dist.ProcessGroup | None = None
        self._processes = 1

    def begin(self, count: Tensor, first: bool, group: dist.ProcessGroup | None = None, processes: int = 1) -> None:
        """Count the labels of a micro-batch.

        Args:
            count: n_ic, int64, 0-dim.
            first: whether an optimizer step begins with it.
            group: the processes whose gradients are averaged; None: all.
            processes: W, how many these are; 1: nothing is exchanged.
        """
        if first or not self._counts:  # a run may be continued in the middle of a step
            self._counts = []
            self._group, self._processes = group, processes
            self._first = count.clone()
            self._work = dist.all_reduce(self._first, group=group, async_op=True) if processes > 1 else None
        self._counts.append(count)

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Factor of the mean of the last micro-batch, 0-dim: ``W n_ic / N_1``, 0 if it has no label.

        Args:
            dtype: Type of the mean.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return (self._counts[-1] * self._processes).to(dtype) / self._first.clamp(min=1).to(dtype)

    def finish(self, accumulate: int) -> float:
        """Factor of the step's gradient after its last micro-batch: ``A N_1 / N``.

        Args:
            accumulate: A, the divisor of each micro-batch's loss, whatever their number.
        """
        counts, self._counts = self._counts, []
        if accumulate == 1:
            return 1.0
        total = torch.stack(counts).sum()
        if self._processes > 1:
            dist.all_reduce(total, group=self._group)
        return accumulate * max(int(self._first), 1) / max(int(total), 1)
