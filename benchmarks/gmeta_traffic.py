"""What the ranks of meta learning send one another, and how long it takes, by the switches of the strategy ``hybrid``.

``python -m benchmarks.gmeta_traffic`` runs 2 and 4 ranks (gloo, a thread each) on one machine:

- ``gmeta/movielens``'s model and tasks train some steps under each switch; losses are compared, and the bytes that
  `strategies.traffic.Traffic` counts (those of a ring where all reduce) with the formula of
  `RowExchange`, all ranks and steps together. Both take the part of a rank that stays there as one of W; beside them stand
  the bytes of all-to-alls that did leave, which depends on the row numbers.
- Lookups: a table of 200 thousand rows of 32 numbers; each rank has 16 tasks of 32 + 32 rows of 8 fields, drawn by Zipf's law.
  A fetch of all rows and the way back of their gradients, sparse, as the slowest rank sees it.
- A million numbers in 50 tensors, reduced by DDP's backward pass.

Arms take turns; a ratio is the median of ratios of neighbours.

Claim: arXiv 2401.04338: rows travel once a step, and no rank is a centre.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gloo_processes import run_group
from benchmarks.gmeta_steps import SWITCHES, fit, slowest
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Tasks
from strategies.divided_rows import DividedRows
from strategies.hybrid.exchange import RowExchange
from strategies.hybrid.strategy import gather_and_broadcast

LOOKUPS = list(SWITCHES)[:4]
REDUCTIONS = ("flat all-reduce", "gather and broadcast", "a reduction per tensor")
FIELDS, IDS, SIZE, TASKS, ROWS = 8, 25_000, 32, 16, 32


def total(number: float) -> float:
    """Sum over ranks."""
    summed = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed)


def steps(folder: str, count: int) -> dict[str, dict[str, Any]]:
    """Losses, and bytes of all ranks, by switch."""
    ranks, found = dist.get_world_size(), {}
    for name, switches in SWITCHES.items():
        module, noted = fit(Tasks(batch_size=32 // ranks, num_workers=0), count, switches, counted=True)
        (table,) = module.row_tables().values()
        dense = sum(each.nbytes for each in module.parameters() if each is not table)
        counted, share = count - 2, 1 - 1 / ranks
        sent = {kind: total(noted.traffic.ring_bytes(kind)) for kind in ("all_to_all", "all_reduce", "gather", "broadcast")}
        rows = total(noted.rows)
        counts = 8 * ranks * ranks * counted
        found[name] = {
            "losses": noted.losses,
            "all_to_all": sent["all_to_all"],
            "crossing": total(noted.crossing.num_bytes),
            "of_rows": share * (counts + (8 + 2 * table.shape[1] * table.element_size()) * rows),
            "all_reduce": sent["all_reduce"],
            "central": sent["gather"] + sent["broadcast"],
            "of_dense": 2 * share * (dense + 4) * ranks * counted,  # and the loss that is logged
        }
    return found


def zipf(random: torch.Generator, *shape: int) -> Tensor:
    """Row numbers of all fields (..., FIELDS), within a field by Zipf's law."""
    weights = 1 / torch.arange(1, IDS + 1, dtype=torch.float64)
    drawn = torch.multinomial(weights, FIELDS * int(torch.tensor(shape).prod()), replacement=True, generator=random)
    return drawn.view(*shape, FIELDS) + IDS * torch.arange(FIELDS)


def lookups(folder: str, repeats: int) -> dict[str, Any]:
    """Seconds of fetching rows and of pushing gradients, by lookup."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    holder = nn.Module()
    holder.table = nn.Parameter(torch.randn(FIELDS * IDS, SIZE, generator=torch.Generator().manual_seed(0)))
    parts = DividedRows(holder, [holder.table], dist.new_group(), torch.device("cpu"), "mod")  # type: ignore[arg-type]
    parts.divide()
    random = torch.Generator().manual_seed(1 + rank)
    groups = [part for task in zipf(random, TASKS, 2, ROWS) for part in task]
    numbers = torch.cat([group.flatten() for group in groups])
    seconds: dict[str, list[float]] = {name: [] for name in LOOKUPS}
    for repeat in range(repeats + 1):
        for name in LOOKUPS:
            options = {"lookup": "fused", "dedup": True} | SWITCHES[name]
            exchange = RowExchange(parts, FIELDS * IDS, **options)
            dist.barrier()
            begin = time.perf_counter()
            rows = exchange.fetch({"table": holder.table}, groups, sparse=True)  # type: ignore[dict-item]
            rows.values["table"].sum().backward()
            taken = slowest(time.perf_counter() - begin)
            holder.table.grad = None
            if repeat:
                seconds[name].append(taken)
    return {"seconds": seconds, "unique": len(numbers.unique()) / len(numbers), "ranks": ranks}


def reductions(folder: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of a backward pass over a million numbers in 50 tensors."""
    wrapped: dict[str, tuple[DistributedDataParallel, Callable[[], Tensor]]] = {}
    for name in REDUCTIONS:
        module = nn.Module()
        module.tensors = nn.ParameterList([nn.Parameter(torch.ones(20_000)) for _ in range(50)])
        module.forward = lambda module=module: torch.stack([each.sum() for each in module.tensors]).sum()  # type: ignore[method-assign]
        parallel = DistributedDataParallel(module, bucket_cap_mb=2**-20 if name == "a reduction per tensor" else None)
        if name == "gather and broadcast":
            parallel.register_comm_hook(None, gather_and_broadcast)
        wrapped[name] = parallel, parallel
    seconds: dict[str, list[float]] = {name: [] for name in REDUCTIONS}
    for repeat in range(repeats + 2):
        for name, (parallel, forward) in wrapped.items():
            dist.barrier()
            loss = forward()
            begin = time.perf_counter()
            loss.backward()
            taken = slowest(time.perf_counter() - begin)
            parallel.zero_grad()
            if repeat > 1:
                seconds[name].append(taken)
    return seconds


def over(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Times that an arm takes of another's time: median of ratios of neighbours."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gmeta_traffic", description=__doc__)
    parser.add_argument("--steps", type=int, default=22, help="of training by each switch")
    parser.add_argument("--repeats", type=int, default=20, help="of lookups and reductions")
    parser.add_argument("--smoke", action="store_true", help="few steps; the result is not kept")
    options = parser.parse_args(arguments)
    count, repeats = (4, 2) if options.smoke else (options.steps, options.repeats)
    record = Record("gmeta_traffic", seeds=[0], smoke=options.smoke, tables=[
        Table("KiB that all ranks send in a step, counted and by formula", "sends",
              ["all_to_all", "crossing", "of_rows", "all_reduce", "of_dense", "central"], digits=2),
        Table("Largest difference of losses from those of the defaults", "losses_of", ["difference"], digits=9),
        Table("Fetch of rows and way back of gradients, milliseconds", "lookup", ["ms"], "at", digits=1),
        Table("Time over that of one lookup, de-duplicated, paired median", "lookup_over", ["times"], "at"),
        Table("A million numbers reduced in a backward pass, milliseconds", "reduction", ["ms"], "at", digits=1),
    ], plots=[Plot("Milliseconds of a fetch and its way back", "ranks", "ms", "lookup", log="y")])  # fmt: skip
    off, differences, centre = [], [], []
    for ranks in (2, 4):
        at = f"{ranks} ranks"
        found = run_group(ranks, steps, count)
        defaults = found["fused"]["losses"]
        for name, row in found.items():
            differences.append(max(abs(a - b) for a, b in zip(row.pop("losses"), defaults, strict=True)))
            record.row(losses_of=name, at=at, difference=differences[-1])
            record.row(sends=f"{name}, {at}", **{key: value / 1024 / (count - 2) for key, value in row.items()})
        default = found["fused"]
        pairs = (("all_to_all", "of_rows"), ("all_reduce", "of_dense"))
        off += [abs(default[kind] / default[formula] - 1) for kind, formula in pairs]
        looked = run_group(ranks, lookups, repeats)
        for name, seconds in looked["seconds"].items():
            record.row(lookup=name, at=at, ranks=ranks, ms=1000 * statistics.median(seconds), unique=looked["unique"])
            record.row(lookup_over=name, at=at, times=over(looked["seconds"], name, "fused"))
        if ranks == 2:
            record.measure("fused_over_per_task", over(looked["seconds"], "a call per task", "fused"))
            record.measure("fused_over_two_call", over(looked["seconds"], "two calls", "fused"))
        reduced = run_group(ranks, reductions, repeats)
        for name, seconds in reduced.items():
            record.row(reduction=name, at=at, ms=1000 * statistics.median(seconds))
        centre.append(over(reduced, "gather and broadcast", "flat all-reduce"))
    record.measure("bytes_off_the_formula", max(off))
    record.measure("losses_of_switches", max(differences))
    record.measure("allreduce_over_gather", min(centre))
    return record.save()


if __name__ == "__main__":
    main()
