"""Time of an outer gradient: all tasks in one pass against loops over tasks.

``python -m benchmarks.gmeta_inner`` takes the outer gradient of ``gmeta/movielens``'s model on drawn tasks, forward and backward,
one thread on a CPU: by `zoo.gmeta.meta_loss` in one pass and in its own loop over tasks, by the leanest unrolled loop that we
could write (autograd over the rows of a task and the weights, no module calls), and by the published package ``higher`` 0.2.1
where it is installed (its functional copy of the dense part, with the rows as one more parameter). All four give the same
gradient, which is checked. Arms take turns; a ratio is the median of ratios of neighbours. Peak memory is that of a process of
its own over what it had before the first step.

Claim: ours; that a loop over tasks is unavoidable is what users of other packages are told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding, linear

from benchmarks.plots import Plot
from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from zoo.ctr import DLRMNetwork
from zoo.gmeta import Adaptation, meta_loss, task_rows
from zoo.nn.row_lookup import LocalRows, places

DIMS, NUMBERS, RATE = [1683, 16, 8, 2, 21, 37], 19, 0.1
ONE_PASS, LOOP, UNROLLED, HIGHER = "one pass", "own loop", "unrolled", "higher"
Gradient = list[Tensor]


def network() -> DLRMNetwork:
    """The model of ``gmeta/movielens``."""
    torch.manual_seed(0)
    return DLRMNetwork(DIMS, NUMBERS, 16, (64,), (64, 32), 0.0)


def draw(tasks: int, size: int) -> dict[str, Any]:
    """Tasks of drawn rows."""
    random = torch.Generator().manual_seed(size)
    sets = {}
    for name in ("support", "query"):
        sparse = torch.stack([torch.randint(dim, (tasks, size), generator=random) for dim in DIMS], dim=-1)
        dense = (torch.rand(tasks, size, NUMBERS, generator=random) < 0.1).float()
        label = torch.randint(2, (tasks, size), generator=random).float()
        sets[name] = {"sparse": sparse, "dense": dense, "label": label, "mask": torch.ones(tasks, size, dtype=torch.bool)}
    return sets


def ours(model: DLRMNetwork, sets: dict[str, Any], steps: int, order: Any, vmap: bool) -> Gradient:
    """The outer gradient by `meta_loss`."""
    numbers = [model.row_numbers(a_set["sparse"]) for a_set in sets.values()]
    rows = LocalRows().fetch(model.row_tables(), numbers)
    tasks = {**sets, "rows": task_rows(*numbers, *(a_set["mask"] for a_set in sets.values()))}
    loss_T = meta_loss(model, rows, tasks, Adaptation(model, "maml", RATE), steps, order, vmap)
    return list(torch.autograd.grad(loss_T.mean(), list(model.parameters())))


def scores(weights: Sequence[Tensor], places_SF: Tensor, dense_SN: Tensor, pairs: Tensor) -> Tensor:
    """The model, written out: rows, two layers below, three above."""
    table, w1, b1, w2, b2, w3, b3, w4, b4, w5, b5 = weights
    z_SD = linear(linear(dense_SN, w1, b1).relu(), w2, b2).relu()
    all_SKD = torch.cat([z_SD[:, None], embedding(places_SF, table)], dim=1)
    products_SP = (all_SKD @ all_SKD.transpose(1, 2)).flatten(1)[:, pairs]
    x = linear(linear(torch.cat([z_SD, products_SP], dim=1), w3, b3).relu(), w4, b4).relu()
    return linear(x, w5, b5).squeeze(1)


def own_rows(model: DLRMNetwork, sets: dict[str, Any]) -> Iterator[tuple[Tensor, Any, Any]]:
    """Rows of each task as leaves of its own graph of the table, with (places, numbers, labels) of support and query."""
    numbers = [model.row_numbers(a_set["sparse"]) for a_set in sets.values()]
    rows = LocalRows().fetch(model.row_tables(), numbers)
    (fetched_UD,) = rows.values.values()
    for task in range(len(numbers[0])):
        ids_R = torch.cat([each[task].flatten() for each in numbers]).unique()
        own_RD = embedding(places(rows.ids_U, ids_R), fetched_UD)
        yield (
            own_RD,
            *(
                (places(ids_R, each[task]), a_set["dense"][task], a_set["label"][task])
                for each, a_set in zip(numbers, sets.values(), strict=True)
            ),
        )


def unrolled(model: DLRMNetwork, sets: dict[str, Any], steps: int, order: str) -> Gradient:
    """The outer gradient by a loop over tasks that autograd records."""
    _, *dense = model.parameters()
    pairs = torch.tensor([i * 7 + j for i in range(7) for j in range(i)])
    losses = []
    for own_RD, support, query in own_rows(model, sets):
        weights = [own_RD, *dense]
        for _ in range(steps):
            loss = binary_cross_entropy_with_logits(scores(weights, *support[:2], pairs), support[2])
            gradients = torch.autograd.grad(loss, weights, create_graph=order == "second")
            weights = [weight - RATE * gradient for weight, gradient in zip(weights, gradients, strict=True)]
        losses.append(binary_cross_entropy_with_logits(scores(weights, *query[:2], pairs), query[2]))
    return list(torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters())))


class WithRows(nn.Module):
    """A network whose rows are a parameter, as ``higher`` takes it (it cannot patch classes with abstract methods)."""

    def __init__(self, model: DLRMNetwork, own_RD: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(own_RD.detach())
        self.bottom, self.top, self.output = model.bottom, model.top, model.output

    def forward(self, places_SF: Tensor, dense_SN: Tensor) -> Tensor:
        """Logits (S,)."""
        z_SD = self.bottom(dense_SN)  # type: ignore[misc]
        all_SKD = torch.cat([z_SD[:, None], embedding(places_SF, self.rows)], dim=1)
        first, second = torch.tril_indices(7, 7, -1)
        products_SP = (all_SKD @ all_SKD.transpose(1, 2))[:, first, second]
        found: Tensor = self.output(self.top(torch.cat([z_SD, products_SP], dim=1))).squeeze(1)
        return found


def by_higher(model: DLRMNetwork, sets: dict[str, Any], steps: int, order: str) -> Gradient:
    """The outer gradient by ``higher``'s inner loop."""
    import higher

    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    count, rows = len(sets["query"]["label"]), []
    for own_RD, support, query in own_rows(model, sets):
        task = WithRows(model, own_RD)
        inner = torch.optim.SGD(task.parameters(), lr=RATE)
        with higher.innerloop_ctx(task, inner, track_higher_grads=order == "second", copy_initial_weights=False) as (net, step):
            for _ in range(steps):
                step.step(binary_cross_entropy_with_logits(net(*support[:2]), support[2]))
            loss = binary_cross_entropy_with_logits(net(*query[:2]), query[2]) / count
            start = list(net.parameters()) if order == "first" else list(net.parameters(time=0))
            names = [name for name, _ in task.named_parameters()]
            found = dict(zip(names, torch.autograd.grad(loss, start), strict=True))
        rows.append((own_RD, found.pop("rows")))
        for sum_, (name, _) in zip(total[1:], list(model.named_parameters())[1:], strict=True):
            sum_ += found[name]
    return [*torch.autograd.grad([own for own, _ in rows], parameters[:1], [gradient for _, gradient in rows]), *total[1:]]


def arms() -> dict[str, Callable[..., Gradient]]:
    """What is compared."""
    found: dict[str, Callable[..., Gradient]] = {
        ONE_PASS: lambda *case: ours(*case, vmap=True),
        LOOP: lambda *case: ours(*case, vmap=False),
        UNROLLED: unrolled,
    }
    try:
        import higher  # noqa: F401
    except ImportError:
        return found
    return {**found, HIGHER: by_higher}


def peak_mib(arm: str, tasks: int, size: int, steps: int, order: str) -> float:
    """Peak of memory of a process of its own that takes two gradients, over what it had before."""
    words = ["-m", "benchmarks.gmeta_inner", "--alone", json.dumps([arm, tasks, size, steps, order])]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def alone(arm: str, tasks: int, size: int, steps: int, order: str) -> float:
    """The measurement of `peak_mib` in this process."""

    def kib(name: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])

    model, found = network(), arms()[arm]
    found(model, draw(1, 1), 1, order)
    sets, before = draw(tasks, size), kib("VmRSS")
    for _ in range(2):
        found(model, sets, steps, order)
    return (kib("VmHWM") - before) / 1024


def measure(record: Record, size: int, tasks: int, repeats: int) -> dict[str, list[float]]:
    """Add the rows of a size; ratios of each arm's time to that of one pass, a median for each case."""
    model, sets = network(), draw(tasks, size)
    ratios: dict[str, list[float]] = {arm: [] for arm in arms() if arm != ONE_PASS}
    for order, steps in product(("first", "second"), (1, 3)):
        compared = arms()
        gradients = {arm: gradient(model, sets, steps, order) for arm, gradient in compared.items()}
        for arm, gradient in gradients.items():
            off = max(float((a - b).abs().max()) for a, b in zip(gradients[ONE_PASS], gradient, strict=True))
            if off > 1e-5:
                raise RuntimeError(f"{arm} gives another gradient than one pass, {off:.2g} away.")
        taken: dict[str, list[float]] = {arm: [] for arm in compared}
        for _ in range(repeats):
            for arm, gradient in compared.items():
                begin = time.perf_counter()
                gradient(model, sets, steps, order)
                taken[arm].append(time.perf_counter() - begin)
        for arm, seconds in taken.items():
            times = statistics.median(a / b for a, b in zip(seconds, taken[ONE_PASS], strict=True))
            if arm in ratios:
                ratios[arm].append(times)
            case = f"{size} + {size} rows, {order} order, k = {steps}"
            record.row(case=case, arm=arm, ms=1000 * statistics.median(seconds))
            record.row(ratio_of=case, arm=arm, over_one_pass=times)
            record.row(memory_of=case, arm=arm, peak_mib=peak_mib(arm, tasks, size, steps, order))
            record.row(k=f"{order}, k = {steps}, {size} + {size}", bar_arm=arm, ms_of=1000 * statistics.median(seconds))
    return ratios


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gmeta_inner", description=__doc__)
    parser.add_argument("--tasks", type=int, default=32, help="tasks of a step")
    parser.add_argument("--repeats", type=int, default=15, help="gradients of each arm and case")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="few tasks and repeats; the result is not kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.alone:
        print(alone(*options.alone))
        return Path()
    tasks, repeats, sizes = (4, 2, (3,)) if options.smoke else (options.tasks, options.repeats, (10, 32))
    tables = [
        Table(f"Milliseconds of an outer gradient of {tasks} tasks", "case", ["ms"], "arm", digits=1),
        Table("Time over that of one pass, median of neighbours", "ratio_of", ["over_one_pass"], "arm", digits=1),
        Table("Peak memory beyond model and data, MiB", "memory_of", ["peak_mib"], "arm", digits=1),
    ]
    plots = [Plot(f"Outer gradient of {tasks} tasks, milliseconds", "k", "ms_of", "bar_arm", log="y")]
    record = Record("gmeta_inner", seeds=[0], smoke=options.smoke, tables=tables, plots=plots)
    for size in sizes:
        ratios = measure(record, size, tasks, repeats)
        if size == sizes[0]:
            record.measure("vmap_over_loop", min(ratios[LOOP]))
            record.measure("vmap_over_unrolled", min(ratios[UNROLLED]))
    return record.save()


if __name__ == "__main__":
    main()
