"""What tests of parameter servers share: parameters, servers and workers in this process, and what one process makes of it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strategies.antdt.control.actions import KillRestart, Versioned
from strategies.antdt.ps.partition import Entry, Layout
from strategies.antdt.ps.server import ServerThread
from strategies.antdt.ps.slices import Gradient
from strategies.antdt.ps.worker import ParameterClient, flatten, unflatten

SHAPES = {"a": (5, 3), "b": (7,), "c": (), "d": (4, 2, 2)}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(table: bool = True) -> dict[str, nn.Parameter]:
    shapes = SHAPES | ({"table": (11, 3)} if table else {})
    return {name: nn.Parameter(random(*shape, seed=number)) for number, (name, shape) in enumerate(shapes.items())}


def layout_of(values: dict[str, nn.Parameter], servers: int) -> Layout:
    groups = {"b": 1}
    return Layout([Entry(name, tuple(value.shape), "float64", groups.get(name, 0), name == "table")
                   for name, value in values.items()], servers)  # fmt: skip


def in_groups(values: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [v for name, v in values.items() if name != "b"]}, {"params": [values["b"]], "lr": 0.05}]


@contextmanager
def servers(count: int, **options: Any) -> Iterator[list[ServerThread]]:
    with ExitStack() as stack:
        started: list[ServerThread] = []
        for index in range(count):
            token = started[0].token if started else None
            started.append(stack.enter_context(ServerThread(index, token, **options)))
        yield started


def client(of: list[ServerThread], worker: int = 0, world_size: int = 1, **options: Any) -> ParameterClient:
    return ParameterClient([s.address for s in of], worker, world_size, **{"patience": 10.0, "pulse_every": 0.0, **options})


def gradient_of(layout: Layout, values: dict[str, nn.Parameter], samples: float = 1.0) -> Gradient:
    """The whole gradient as a worker sends it, tables by the rows that have one."""
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for number in layout.tables:
        grad = list(values.values())[number].grad
        if grad is not None:
            touched = grad.abs().sum(1).nonzero().squeeze(1)
            rows[number] = touched, grad[touched]
    absent = frozenset(n for n in layout.dense if list(values.values())[n].grad is None)
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in values.values()]
    return Gradient(flatten(layout, grads), absent, rows, samples)


def fill(values: dict[str, nn.Parameter], seed: int, without: str = "") -> None:
    """Give each parameter a gradient, the table one of three rows."""
    for number, (name, value) in enumerate(values.items()):
        value.grad = None if name == without else random(*value.shape, seed=100 * seed + number)
        if name == "table" and value.grad is not None:
            keep = torch.zeros(len(value), 1, dtype=torch.float64)
            keep[[seed % 11, (seed + 3) % 11, 7]] = 1
            value.grad.mul_(keep)


def distance(mine: dict[str, nn.Parameter], theirs: list[Tensor]) -> float:
    return max(float((a.detach() - b).abs().max()) for a, b in zip(mine.values(), theirs, strict=True))


def read(of: ParameterClient, layout: Layout, kind: str = "asp") -> list[Tensor]:
    dense = unflatten(layout, of.pull(layout, kind, gate=False))
    tables, _ = of.export(layout, states=False)
    return [(dense | tables)[number] for number in range(len(layout.entries))]


def least_squares(values: dict[str, nn.Parameter], x: Tensor) -> Tensor:
    """A loss, the mean over samples, to which all parameters and some rows of the table matter."""
    rows = (x[:, 0].abs() * 5).long() % 11
    table = nn.functional.embedding(rows, values["table"])
    error = (x @ values["a"].T).sum(1) * values["c"] + (table * x).sum(1) + values["b"].sum() * values["d"].mean() - 1
    return error.square().mean() / 100


def union_steps(name: str, batches: list[Tensor], clip: float = 0.0) -> dict[str, nn.Parameter]:
    """What one process makes of these batches."""
    values = parameters()
    optimizer = OPTIMIZERS[name](in_groups(values))
    for batch in batches:
        optimizer.zero_grad()
        least_squares(values, batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(list(values.values()), clip)
        optimizer.step()
    return values


def train(
    worker: ParameterClient, layout: Layout, groups: Any, batches: list[Tensor], kind: str, clip: float = 0.0
) -> list[bool]:
    """What a worker does, without a loader."""
    values = parameters()
    accepted = []
    for batch in batches:
        dense = unflatten(layout, worker.pull(layout, kind, clip_norm=clip))
        rows = (batch[:, 0].abs() * 5).long() % 11
        found = worker.rows(layout, {4: rows.unique()})[4]
        with torch.no_grad():
            for number, value in enumerate(values.values()):
                value.grad = None
                if number in dense:
                    value.copy_(dense[number])
            values["table"][rows.unique()] = found
        version = worker.version
        least_squares(values, batch).backward()
        accepted.append(worker.push(layout, gradient_of(layout, values, len(batch)), groups, version=version).accepted)
    worker.idle()
    return accepted


def run_workers(count: int, body: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count
    failures: list[BaseException] = []

    def call(worker: int) -> None:
        try:
            results[worker] = body(worker)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=call, args=(worker,)) for worker in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


class Scripted:
    """A controller that wants one server to be started again, and tells what it was told."""

    decide_every, version, failure = 1.0, 1, None
    plan = {"version": 1, "batch": [4], "cap": [None]}  # noqa: RUF012
    events: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.reports: list[tuple[str, list[Any]]] = []
        self.joined: list[str] = []

    def report(self, node: str, samples: Any, now: float, **about: Any) -> None:
        self.reports.append((node, list(samples)))

    def join(self, node: str, now: float, **about: Any) -> None:
        self.joined.append(node)

    def actions_after(self, version: int, node: str) -> list[Versioned]:
        """After three gradients, until it has come back."""
        enough = sum(len(samples) for _, samples in self.reports) >= 3 and self.joined.count("server:0") == 1
        return [Versioned(1, KillRestart("server:0"), "slow")] if enough and version < 1 and node == "server:0" else []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: []
