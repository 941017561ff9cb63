"""Collectives between groups with slow links: HO-Ring against a flat ring, two phases, and gloo's own.

``python -m benchmarks.ho_ring`` makes 2 groups of 2 processes, 4 of 2 and 2 of 4 on this machine, whose groups are connected at
200 Mbit/s each (:mod:`benchmarks.slow_link`; needs root), and times all-gathers, reduce-scatters and all-reduces of 16 MiB. A
repetition takes as long as its slowest process; arms take turns. Beside the times stand the bytes that left a group: by the
counter of its network card, which sees headers too, by the collectives' own counters, and by the closed formulas: ``(ng - 1) /
ng`` of the buffer for HO-Ring, ``(n - 1) / n`` for a flat ring, twice as much for an all-reduce. (gloo has no formula here.)

The bars take the median over repetitions of the time of overlapped HO-Ring over that of the flat ring in the same repetition, and
its time over the bytes that leave a group divided by the link's rate, each at the worse of all-gather and reduce-scatter.
Grids up to 16 x 8 are added from the model of times alone, with the rate of the link and no latencies, and are marked as such.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.slow_link import SlowLinks, sent_bytes, unavailable
from benchmarks.tables import Table
from strategies.paro.cost_model import Cluster, LinkSpeed
from strategies.paro.grid import RankGrid
from strategies.paro.ho_ring import FlatRing, HORing, WorldCollectives

OVERLAPPED, TWO_PHASE, FLAT, GLOO = "HO-Ring, overlapped", "HO-Ring, two phases", "flat ring", "gloo"
GRIDS = ((2, 2), (4, 2), (2, 4))
MODELLED = ((4, 4), (2, 8), (4, 8), (8, 8), (16, 8))
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce")
BAR_OPERATIONS = ("all_gather", "reduce_scatter")
BAR_GRIDS = ("2x2", "2x4")


class Gloo:
    """The library's collectives, with the interface of ours."""

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        """See `WorldCollectives`."""
        dist.all_gather_into_tensor(out, shard)

    def reduce_scatter(self, out: Tensor, full: Tensor) -> None:
        """See `WorldCollectives`."""
        dist.reduce_scatter_tensor(out, full)

    def all_reduce(self, tensor: Tensor) -> None:
        """See `WorldCollectives`."""
        dist.all_reduce(tensor)


def as_rank(group_size: int, num_bytes: int, repetitions: int) -> None:
    """Body of a rank: rank 0 prints a JSON list of rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    grid = RankGrid(group_size)
    arms: dict[str, WorldCollectives | Gloo] = {
        OVERLAPPED: HORing(grid), TWO_PHASE: HORing(grid, "two_phase"), FLAT: FlatRing(grid), GLOO: Gloo(),
    }  # fmt: skip
    count = num_bytes // 4 // grid.n * grid.n
    full = torch.arange(count, dtype=torch.float32).remainder_(97)
    block = full.view(grid.n, -1)[grid.block].clone()
    rows = []
    for operation in OPERATIONS:
        for repetition in range(-1, repetitions):  # the first one connects
            names = list(arms)
            for turn in range(len(names)):
                name = names[(turn + repetition) % len(names)]
                call = _call(arms[name], operation, full, block)
                dist.barrier()
                before, begin = sent_bytes(), time.perf_counter()
                call()
                seconds = time.perf_counter() - begin
                dist.barrier()
                after = sent_bytes()
                slowest = torch.tensor([seconds], dtype=torch.float64)
                payload = torch.tensor([_sent(arms[name]) / grid.ng], dtype=torch.float64)
                dist.all_reduce(payload)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                if repetition >= 0:
                    rows.append({
                        "operation": operation, "arm": name, "repetition": repetition, "seconds": slowest.item(),
                        "egress": after["inter"] - before["inter"], "payload": payload.item(),
                    })  # fmt: skip
    if grid.rank == 0:
        print(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _sent(arm: WorldCollectives | Gloo) -> float:
    """Bytes that a rank has sent to other groups since it was asked last, by the collectives' own counter."""
    if isinstance(arm, Gloo):
        return math.nan
    sent = sum(number for (_, link), number in arm.sent.items() if link == "inter")
    arm.reset()
    return float(sent)


def _call(arm: WorldCollectives | Gloo, operation: str, full: Tensor, block: Tensor) -> Callable[[], object]:
    if operation == "all_gather":
        out = torch.empty_like(full)
        return lambda: arm.all_gather(out, block)
    if operation == "reduce_scatter":
        shard = torch.empty_like(block)
        return lambda: arm.reduce_scatter(shard, full)
    tensor = full.clone()
    return lambda: arm.all_reduce(tensor)


def formula(arm: str, operation: str, num_groups: int, group_size: int, num_bytes: int) -> float | None:
    """Bytes that leave a group; None for gloo, which has ways of its own."""
    n = num_groups * group_size
    share = {FLAT: (n - 1) / n, GLOO: None}.get(arm, (num_groups - 1) / num_groups)
    return None if share is None else (2 if operation == "all_reduce" else 1) * share * num_bytes


def modelled(num_groups: int, group_size: int, num_bytes: int, megabits: float) -> dict[str, float]:
    """Seconds of an all-gather by the model of times: a card for each group, links inside groups infinitely fast."""
    cluster = Cluster.with_one_card_a_group(
        num_groups * group_size, group_size, LinkSpeed(1e15), LinkSpeed(megabits * 1e6 / 8)
    )  # fmt: skip
    ways = {OVERLAPPED: "overlapped", TWO_PHASE: "two_phase", FLAT: "flat"}
    return {arm: cluster.world_seconds(num_bytes, method=way) for arm, way in ways.items()}  # type: ignore[arg-type]


def measure(
    record: Record, num_groups: int, group_size: int, num_bytes: int, megabits: float, repetitions: int
) -> dict[str, float]:
    """Add the rows of a grid; the figures for its bars."""
    name = f"{num_groups}x{group_size}"
    words = ["benchmarks.ho_ring", "--as-rank", str(group_size), str(num_bytes), str(repetitions)]
    with SlowLinks(num_groups, megabits) as links:
        rows = json.loads(links.run(words, group_size, timeout=600).splitlines()[-1])
    taken: dict[tuple[str, str], list[float]] = {}
    apart = []
    for row in rows:
        operation, arm = row["operation"], row["arm"]
        expected = formula(arm, operation, num_groups, group_size, num_bytes)
        taken.setdefault((operation, arm), []).append(row["seconds"])
        record.row(grid=f"{name} {operation}", arm=arm, repetition=row["repetition"], milliseconds=1000 * row["seconds"],
                   egress_mib=row["egress"] / 2**20)  # fmt: skip
        if expected is not None:
            apart.append(abs(row["payload"] / expected - 1))
            record.row(case=f"{name} {operation}", way=arm, payload_off=apart[-1], card_off=row["egress"] / expected - 1)
    saved, bound = [], []
    for operation in OPERATIONS:
        pairs = zip(taken[operation, OVERLAPPED], taken[operation, FLAT], strict=True)
        gain = statistics.median(1 - ours / flat for ours, flat in pairs)
        leaving = formula(OVERLAPPED, operation, num_groups, group_size, num_bytes)
        assert leaving is not None
        over = statistics.median(taken[operation, OVERLAPPED]) / (leaving * 8 / megabits / 1e6)
        record.row(bound=f"{name} {operation}", less_time_than_flat_ring=gain, time_over_link_bound=over)
        print(f"{name} {operation}: {gain:.1%} less time than the flat ring, {over:.2f} of the link's bound", flush=True)
        if operation in BAR_OPERATIONS:
            saved.append(gain)
            bound.append(over)
    return {"saved": min(saved), "bound": max(bound), "off": max(apart)}


def tables_of() -> tuple[list[Table], list[Plot]]:
    """Tables and plots of the result."""
    return [
        Table("Milliseconds", "grid", ["milliseconds"], columns="arm", digits=0),
        Table("MiB that leave a group, by its network card", "grid", ["egress_mib"], columns="arm"),
        Table("Relative difference of a group's network card to the formula", "case", ["card_off"], columns="way", digits=4),
        Table("Relative difference of their own counters to the formula", "case", ["payload_off"], columns="way", digits=4),
        Table("Overlapped HO-Ring", "bound", ["less_time_than_flat_ring", "time_over_link_bound"]),
        Table("All-gather by the model of times, not measured: milliseconds", "model", ["model_milliseconds"], columns="arm",
              digits=0),
    ], [Plot("All-gather by the model of times (not measured)", "devices", "model_milliseconds", "arm", log="xy")]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ho_ring", description=__doc__)
    parser.add_argument("--megabits", type=float, default=200, help="rate of a group's link, Mbit/s")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each arm")
    parser.add_argument("--smoke", action="store_true", help="one grid and a small buffer; the result is not kept")
    parser.add_argument("--as-rank", nargs=3, type=int, metavar=("GROUP_SIZE", "BYTES", "REPETITIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_rank:
        as_rank(*options.as_rank)
        return Path()
    tables, plots = tables_of()
    record = Record("ho_ring", seeds=[0], smoke=options.smoke, tables=tables, plots=plots)
    num_bytes, repetitions = (1 << 18, 2) if options.smoke else (1 << 24, options.repetitions)
    if reason := unavailable():
        print(f"Not measured: {reason}.", flush=True)
        record.row(not_measured=reason)
        return record.save()
    figures = {}
    for num_groups, group_size in GRIDS[:1] if options.smoke else GRIDS:
        found = measure(record, num_groups, group_size, num_bytes, options.megabits, repetitions)
        figures[f"{num_groups}x{group_size}"] = found
    for num_groups, group_size in (*GRIDS, *MODELLED):
        for arm, seconds in modelled(num_groups, group_size, num_bytes, options.megabits).items():
            record.row(model=f"{num_groups}x{group_size}", arm=arm, devices=num_groups * group_size,
                       model_milliseconds=1000 * seconds)  # fmt: skip
    for grid in BAR_GRIDS:
        if grid in figures:
            record.measure(f"less_time_than_flat_ring_{grid}", figures[grid]["saved"])
            record.measure(f"time_over_link_bound_{grid}", figures[grid]["bound"])
    record.measure("bytes_off_the_formula", max(found["off"] for found in figures.values()))
    return record.save()


if __name__ == "__main__":
    main()
