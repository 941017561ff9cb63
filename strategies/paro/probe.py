"""Measures the links of a cluster: how many bytes a second, and how long a message without content takes.

A ring of k processes needs ``(k - 1) (a + x / (k B))`` for a gather of x bytes in all; the times of a small and a large one give
the latency a and the bandwidth B. Gathers of all groups run at the same time, as they do in training, so that a network card
that several processes share is measured as each of them finds it.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.paro.collectives import Collectives
from strategies.paro.cost_model import Cluster, LinkSpeed
from strategies.paro.grid import RankGrid
from strategies.paro.partition import Granularity

__all__ = ["link_of", "measure_cluster"]

_LEAST_LATENCY = 1e-7


def link_of(small: tuple[float, float], large: tuple[float, float], num_processes: int) -> LinkSpeed:
    """Bandwidth and latency from the times of two gathers.

    Args:
        small: Bytes in all, and seconds, of the smaller one.
        large: The same of the larger one.
        num_processes: k, at least 2.

    Raises:
        ValueError: The sizes do not ascend, or fewer than 2 processes.

    Example:
        >>> round(link_of((1e3, 0.001), (1e6, 1.000), 2).bandwidth, -3)
        500000.0
    """
    if num_processes < 2 or not 0 < small[0] < large[0]:
        raise ValueError(f"link_of: sizes {small[0]:g} and {large[0]:g} must ascend, {num_processes} processes be 2 or more.")
    steps = num_processes - 1
    # A large gather that was not slower than a small one says only that its bandwidth is beyond what can be seen.
    per_byte = max(large[1] - small[1], 1e-3 * large[1]) / (large[0] - small[0])
    latency = (small[1] - per_byte * small[0]) / steps
    return LinkSpeed(steps / num_processes / per_byte, max(latency, _LEAST_LATENCY))


def measure_cluster(
    grid: RankGrid,
    sizes: tuple[int, int] = (1 << 14, 1 << 23),
    repetitions: int = 5,
    memory: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cluster:
    """Time gathers inside groups, between them and around all processes; a collective call of all of them.

    Args:
        grid: The processes.
        sizes: Bytes of the small and the large gather.
        repetitions: Gathers of each kind, of whose times the median counts, that of the slowest process.
        memory: Bytes of a device, for the result.
        clock: Seconds that only grow.

    Returns:
        The cluster, the same on all ranks. Kinds of links that a grid does not have (one group, groups of one) are as the others.
    """

    device = torch.device(grid.device_type)

    def link(num_processes: int, gather: Callable[[Tensor, Tensor], None]) -> LinkSpeed:
        times = []
        for size in sizes:
            piece = torch.zeros(max(1, size // num_processes), dtype=torch.uint8, device=device)
            whole = piece.new_empty(piece.numel() * num_processes)
            taken = []
            for _ in range(repetitions + 1):  # the first one connects
                dist.barrier(group=grid.world)
                begin = clock()
                gather(whole, piece)
                if piece.device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append(clock() - begin)
            times.append((float(whole.numel()), statistics.median(taken[1:])))
        slowest = torch.tensor([seconds for _, seconds in times], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=grid.world)
        (small, _), (large, _) = times
        return link_of((small, slowest[0].item()), (large, slowest[1].item()), num_processes)

    def with_method(method: str, source: Granularity, target: Granularity) -> Callable[[Tensor, Tensor], None]:
        collectives = Collectives(grid, method)  # type: ignore[arg-type]

        def gather(whole: Tensor, piece: Tensor) -> None:
            collectives.all_gather(whole, piece, source, target)

        return gather

    intra = inter = flat = None
    if grid.group_size > 1:
        intra = link(grid.group_size, with_method("two_phase", "I", "N"))
    if grid.num_groups > 1:
        inter = link(grid.num_groups, with_method("two_phase", "G", "I"))
    if grid.group_size > 1 and grid.num_groups > 1:
        flat = link(grid.world_size, with_method("flat", "G", "N"))
    known = intra or inter or LinkSpeed(1e12)
    return Cluster(grid.world_size, grid.group_size, intra or known, inter or known, flat, memory)
