"""Exchange of step measurements among all ranks, in one small asynchronous collective (section 2.4)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RESTART", "SAVE", "STOP", "Exchange", "Reading"]

STOP, SAVE, RESTART = 1, 2, 4
"""Flags: end after this step; save a checkpoint after it; end after it, to be started again."""

_FIELDS = 6


@dataclass(frozen=True)
class Reading:
    """The answer, the same on all ranks.

    Attributes:
        counts: n_i, samples of each rank in the step.
        version: newest action that *all* ranks have received.
        flags: wishes that any rank has uttered.
        times: T_i, seconds of each rank's last measured step; 0 where none was.
        measured: number of that step.
    """

    counts: tuple[int, ...]
    version: int
    flags: int
    times: tuple[float, ...]
    measured: int

    @property
    def total(self) -> int:
        """N_t, samples of the step on all ranks."""
        return sum(self.counts)


class Exchange:
    """Gathers a few integers of every rank for each step, on a group of its own, beside the gradient's.

    Calls must come in the same order on all ranks; several may be under way.

    Args:
        group: a process group whose tensors lie on the CPU (gloo); None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def start(
        self, epoch: int, step: int, count: int, version: int, flags: int, seconds: float, measured: int
    ) -> Callable[[], Reading]:
        """Tell the others about step ``step`` of ``epoch``, without waiting.

        Args:
            epoch: of the step.
            step: number of the step in the epoch.
            count: samples that this rank takes.
            version: newest action that it has received.
            flags: its wishes.
            seconds: its time for step ``measured``.
            measured: number of the step that was measured last.

        Returns:
            What to call for the answer; that waits, if ranks have not come so far.

        Raises:
            RuntimeError: from the answer: ranks are at different steps, or one of them is gone.
        """
        own = torch.tensor([epoch, step, count, version, flags, round(seconds * 1e9)])
        rows, work = own.unsqueeze(0), None
        if self.group is not None:
            rows = torch.empty(dist.get_world_size(self.group), _FIELDS, dtype=torch.int64)
            work = dist.all_gather(list(rows), own, group=self.group, async_op=True)

        @cache
        def answer() -> Reading:
            if work is not None:
                work.wait()
            return _read(rows, measured)

        return answer


def _read(rows: Tensor, measured: int) -> Reading:
    epochs, steps, counts, versions, flags, times = rows.t().tolist()
    if len(set(zip(epochs, steps, strict=True))) > 1:
        raise RuntimeError(f"AntDT: ranks plan different steps: (epoch, step) are {list(zip(epochs, steps, strict=True))}.")
    wishes = 0
    for wish in flags:
        wishes |= wish
    return Reading(tuple(counts), min(versions), wishes, tuple(time / 1e9 for time in times), measured)
