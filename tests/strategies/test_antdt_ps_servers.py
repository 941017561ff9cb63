"""Parameter servers: together they are the optimizer of one process, whatever is asynchronous, lost or restarted."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from strategies.antdt.actions import KillRestart, Versioned
from strategies.antdt.client import Client
from strategies.antdt.inject import SleepInjector, Slowdown
from strategies.antdt.ps.clock import Clock, Consistency, Decision
from strategies.antdt.ps.dispatch import Caller
from strategies.antdt.ps.frames import Connection, encode_frame, pack, unpack
from strategies.antdt.ps.meeting import MeetingError, Meetings
from strategies.antdt.ps.parameter_server import ParameterServer
from strategies.antdt.ps.partition import Entry, Layout
from strategies.antdt.ps.remote_optimizer import OptimizerSpec
from strategies.antdt.ps.server import ServerThread
from strategies.antdt.ps.slices import Gradient, Slices, merge
from strategies.antdt.ps.worker import ParameterClient, ServersUnreachable, flatten, unflatten
from strategies.antdt.server import ServerThread as DataServer
from strategies.antdt.wire import MessageTooLarge, ServiceError

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


# ---- the optimizer of one process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 3])
def test_servers_are_one_optimizer(name: str, count: int) -> None:
    values = parameters()
    optimizer = OPTIMIZERS[name](in_groups(values))
    layout = layout_of(values, count)
    with servers(count) as started:
        worker = client(started)
        worker.configure(layout, OptimizerSpec.of(optimizer), {"mode": "asp"}, list(values.values()))
        worker.enter(0)
        for step in range(6):
            fill(values, step, without="a" if step in (0, 3) else "")
            optimizer.param_groups[0]["lr"] *= 0.9
            worker.push(layout, gradient_of(layout, values), OptimizerSpec.of(optimizer).groups, version=step)
            optimizer.step()
        assert distance(values, read(worker, layout)) < 1e-12
        _, states = worker.export(layout, states=True)
        for value, state in zip(values.values(), states, strict=True):
            for key, kept in optimizer.state[value].items():
                torch.testing.assert_close(torch.as_tensor(state[key]), torch.as_tensor(kept), rtol=0, atol=1e-12)
        # and from there on, on another number of servers
        with servers(2) as others:
            other, second = client(others), layout_of(values, 2)
            other.configure(second, OptimizerSpec.of(optimizer), {"mode": "asp"}, list(values.values()), states, version=6)
            other.enter(0)
            fill(values, 9)
            other.push(second, gradient_of(second, values), OptimizerSpec.of(optimizer).groups, version=6)
            optimizer.step()
            assert distance(values, read(other, second)) < 1e-12
            other.leave()
        worker.leave()


@pytest.mark.parametrize("name", ["sgd", "adagrad_plain", "adam", "momentum"])
def test_lazy_rows_change_only_where_touched(name: str) -> None:
    make = OPTIMIZERS.get(name, lambda p: torch.optim.Adagrad(p, lr=0.1))
    table = nn.Parameter(random(6, 2, seed=0))
    layout = Layout([Entry("table", (6, 2), "float64", 0, table=True)], 1)
    results = {}
    for row_update in ("exact", "lazy"):
        slices = Slices(layout, 0, OptimizerSpec.of(make([nn.Parameter(table.detach().clone())])), row_update)  # type: ignore[arg-type]
        slices.write([], {0: table.detach()})
        for step in range(4):
            rows = torch.tensor([step % 2, 3])
            slices.apply(Gradient({}, rows={0: (rows, random(2, 2, seed=step))}), slices.spec.groups)
        results[row_update] = slices.tables[0].detach().clone()
    assert torch.equal(results["lazy"][[2, 4, 5]], table.detach()[[2, 4, 5]])
    assert torch.equal(results["lazy"], results["exact"]) == (name in ("sgd", "adagrad_plain"))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_merged_gradient_is_that_of_all_samples(counts: list[int], seed: int) -> None:
    data = random(sum(counts), 3, seed=seed)
    parts, start = [], 0
    for count in counts:
        own = data[start : start + count]
        rows, place = (own[:, 0] > 0).long().unique(return_inverse=True)
        values = torch.zeros(len(rows), 3, dtype=torch.float64).index_add_(0, place, own) / count
        parts.append(Gradient({"float64": own.mean(0)}, rows={0: (rows, values)}, samples=count))
        start += count
    merged = merge(parts)
    assert (merged.dense["float64"] - data.mean(0)).abs().max() < 1e-14
    rows, values = merged.rows[0]
    for row, value in zip(rows, values, strict=True):
        assert (value - data[(data[:, 0] > 0).long() == row].sum(0) / len(data)).abs().max() < 1e-14


def test_gradients_of_nothing_are_merged_to_nothing() -> None:
    """Batches without a token, where tokens count."""
    merged = merge([Gradient({"float64": torch.zeros(2, dtype=torch.float64)}, samples=0.0) for _ in range(2)])
    assert merged.samples == 0 and not merged.dense["float64"].any()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 30))
def test_every_element_has_one_place(sizes: list[int], count: int, rows: int) -> None:
    entries = [Entry(str(n), (size,), "float32" if n % 2 else "float64", 0) for n, size in enumerate(sizes)]
    layout = Layout([*entries, Entry("table", (rows, 2), "float32", 0, table=True)], count)
    held: dict[int, list[int]] = {n: [] for n in layout.dense}
    for server in range(count):
        for piece in layout.pieces(server):
            held[piece.entry] += range(piece.offset, piece.offset + piece.length)
    assert all(held[n] == list(range(size)) for n, size in enumerate(sizes))
    masks = layout.split_rows(torch.arange(rows))
    assert [int(mask.sum()) for mask in masks] == [layout.rows(len(sizes), server) for server in range(count)]
    for dtype, size in layout.sizes.items():
        lengths = [hi - lo for lo, hi in (layout.span(dtype, server) for server in range(count))]
        assert sum(lengths) == size and max(lengths) - min(lengths) <= 1
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SparseAdam, torch.optim.ASGD])
def test_optimizers_that_mix_elements_are_refused_by_name(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=rf"cannot run torch.optim.*{optimizer.__name__}.*SGD, Adam, AdamW, Adagrad, RMSprop"):
        OptimizerSpec.of(optimizer([nn.Parameter(torch.zeros(2, 2))]))


def test_subclass_of_an_optimizer_is_refused() -> None:
    class Own(torch.optim.Adam):
        pass

    Own.__name__ = "Adam"
    with pytest.raises(ValueError, match="cannot run"):
        OptimizerSpec.of(Own([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(ValueError, match="no optimizer 'LBFGS'"):
        OptimizerSpec.from_json({"kind": "LBFGS", "groups": []})


# ---- modes --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "count", "clip"), [("adamw", 1, 0.0), ("momentum", 2, 0.0), ("adam", 2, 0.5), ("adagrad", 3, 0.0)]
)
def test_synchronous_steps_are_those_of_one_process_with_the_union_batch(name: str, count: int, clip: float) -> None:
    sizes = [(5, 2, 9), (1, 14, 1), (6, 5, 5), (3, 3, 3), (2, 7, 1)]
    batches = [[random(size, 3, seed=10 * step + worker) for worker, size in enumerate(row)] for step, row in enumerate(sizes)]
    expected = union_steps(name, [torch.cat(row) for row in batches], clip)
    values = parameters()
    layout, spec = layout_of(values, count), OptimizerSpec.of(OPTIMIZERS[name](in_groups(values)))
    with servers(count) as started:

        def body(rank: int) -> list[Tensor]:
            worker = client(started, rank, 3)
            if rank == 0:
                worker.configure(layout, spec, {"mode": "bsp", "clip": clip}, list(values.values()))
            worker.enter(0)
            assert all(train(worker, layout, spec.groups, [row[rank] for row in batches], "bsp", clip))
            worker.pull(layout, "bsp", clip_norm=clip, gate=False)
            worker.gather(None)
            found = read(worker, layout, "bsp")
            worker.gather(None)
            worker.leave()
            return found

        for found in run_workers(3, body):
            assert distance(expected, found) < 1e-10


def test_stale_synchronous_bound_holds_and_the_fast_worker_meets_it() -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    may_go = threading.Event()
    with servers(1) as started:
        gaps: list[int] = []

        def body(rank: int) -> None:
            worker = client(started, rank, 2)
            if rank == 0:
                worker.configure(layout, spec, {"mode": "ssp", "staleness": 3}, list(values.values()))
            worker.enter(0)
            for step in range(20):
                if rank == 1 and step == 1:
                    may_go.wait(20)  # a straggler: the other must not be more than three gradients ahead
                worker.pull(layout, "ssp")
                own = started[0].server.clock.own
                gaps.append(own[rank] - min(own.values()))
                fill(values_of[rank], step)
                worker.push(layout, gradient_of(layout, values_of[rank]), spec.groups, version=worker.version)
                if rank == 0 and own[0] - own.get(1, 0) == 4:
                    may_go.set()  # the next pull of this worker must wait
            worker.idle()
            worker.gather(None)
            worker.leave()

        values_of = [parameters(), parameters()]
        run_workers(2, body)
        assert max(gaps) == 3


@given(st.integers(0, 4), st.lists(st.integers(0, 3), max_size=80))
def test_stale_synchronous_clock_never_lets_a_worker_too_far(staleness: int, order: list[int]) -> None:
    clock = Clock(Consistency("ssp", staleness=staleness))
    clock.enter(range(4))
    for worker in order:
        if clock.may_begin(worker):
            clock.push(worker, clock.version)
        assert max(clock.own.values()) - min(clock.own.values()) <= staleness + 1
    assert any(clock.may_begin(worker) for worker in range(4)), "somebody can always go on"


@given(st.integers(0, 2), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_synchronous_clock_counts_each_worker_once_a_step(backup: int, events: list[tuple[int, bool]]) -> None:
    clock = Clock(Consistency("bsp", backup=backup))
    clock.enter(range(4))
    sent: dict[int, int] = {}
    steps = 0
    for worker, leaves in events:
        if leaves and len(clock.own) > 1 and worker in clock.own:
            decision = clock.idle(worker)
        elif worker in clock.own and sent.get(worker) != clock.version:
            sent[worker] = clock.version
            outcome = clock.push(worker, clock.version)
            assert outcome.accepted in (None, True)
            decision = outcome.decision
        else:
            continue
        if decision is not None:
            assert decision.version == steps and len(set(decision.accepted)) == len(decision.accepted)
            assert len(decision.accepted) >= max(1, len(clock.own) - backup)
            steps += 1
    assert clock.version == steps


def test_backup_worker_is_not_waited_for_and_its_gradient_is_dropped_and_counted() -> None:
    values = parameters()
    layout, spec = layout_of(values, 2), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    batches = [[random(3, 3, seed=10 * step + rank) for rank in range(3)] for step in range(4)]
    slow = threading.Event()
    with servers(2) as started:

        def body(rank: int) -> Any:
            worker = client(started, rank, 3)
            if rank == 0:
                worker.configure(layout, spec, {"mode": "bsp", "backup": 1}, list(values.values()))
            worker.enter(0)
            if rank == 2:  # sends its gradient of step 0 when the others are done
                worker.pull(layout, "bsp")
                slow.wait(20)
                fill(mine := parameters(), 0)
                outcome = worker.push(layout, gradient_of(layout, mine), spec.groups, version=0)
                worker.idle()
                result = outcome.accepted
            else:
                result = train(worker, layout, spec.groups, [row[rank] for row in batches], "bsp")
                worker.look()
                if worker.version == 4:
                    slow.set()
            worker.gather(None)
            found = read(worker, layout, "bsp")
            worker.gather(None)
            worker.leave()
            return result, found

        # With one of three as backup, a step takes two; when one of the two is done, the other one goes on alone.
        (first, found), (second, _), (third, _) = run_workers(3, body)
        assert first == second == [True] * 4 and third is False
        assert started[0].server.clock.counts == {"pushed": 9, "dropped": 1, "stale": 0}
    expected = union_steps("sgd", [torch.cat(row[:2]) for row in batches])
    assert distance(expected, found) < 1e-10


# ---- frames -------------------------------------------------------------------------------------------------------------


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    | st.tuples(inner, inner), max_leaves=8))  # fmt: skip
def test_plain_data_comes_back(value: Any) -> None:
    packed, tensors = pack({"value": value, "tensor": torch.arange(3)})
    found = unpack(packed, tensors)
    assert found["value"] == value and torch.equal(found["tensor"], torch.arange(3))


def test_objects_are_not_sent() -> None:
    with pytest.raises(TypeError, match="object cannot be sent"):
        pack({"value": object()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_travel_bit_by_bit(dtype: torch.dtype) -> None:
    with servers(1) as started:
        worker = client(started)
        value = [(torch.randn(3, 5) * 4).to(dtype), torch.ones((), dtype=dtype), torch.zeros(0, 4, dtype=dtype)]
        worker.enter(0)
        found = worker.gather(value)[0]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, value, strict=True))
        worker.leave()


def test_wrong_token_is_refused_and_the_connection_closed() -> None:
    with servers(1) as started, pytest.raises(ServiceError, match="token is wrong") as refusal:
        ParameterClient([started[0].address._replace(token="guess")], 0, 1, patience=1.0)
    assert refusal.value.kind == "token"


def test_request_before_the_token_is_refused() -> None:
    with servers(1) as started:
        connection = Connection("127.0.0.1", started[0].address.port, 2**20)
        connection.send({"op": "shutdown"})
        with pytest.raises(ServiceError, match="token is wrong"):
            connection.receive()
        assert not started[0].server.stopping
        connection.close()


@pytest.mark.parametrize("known", [False, True])
def test_too_large_frame_is_refused_before_it_is_read(known: bool) -> None:
    with servers(1, frame_limit=2**17) as started:
        connection = Connection("127.0.0.1", started[0].address.port, 2**30)
        if known:
            connection.send({"op": "hello", "token": started[0].token, "worker": 0, "world_size": 1, "session": "s"})
            connection.receive()
            connection.send({"op": "status"}, [torch.zeros(2**13)])  # 2^15 bytes may be sent
            connection.receive()
        size = 2**40 if known else 2**17
        connection._socket.sendall(struct.pack(">IQ", 2, size))  # announced, never sent
        with pytest.raises(ServiceError, match="larger than the limit") as refusal:
            connection.receive()
        assert refusal.value.kind == "too_large"
        connection.close()
        client(started).leave()  # others are served
    with pytest.raises(MessageTooLarge):
        encode_frame({}, [torch.zeros(1000)], limit=1000)


@pytest.mark.parametrize("data", [
    struct.pack(">IQ", 2, 0) + b"[]", struct.pack(">IQ", 4, 0) + b"\xff\xff\xff\xff",
    struct.pack(">IQ", 2, 0) + b"{}", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    struct.pack(">IQ", 36, 0) + b'{"op":"x","tensors":[["int8",[9]]]} ',
    struct.pack(">IQ", 40, 8) + b'{"op":"x","tensors":[["object",[1]]]}   ' + bytes(8),
])  # fmt: skip
def test_garbage_ends_its_connection_only(data: bytes) -> None:
    with servers(1) as started:
        raw = socket.create_connection(("127.0.0.1", started[0].address.port))
        raw.sendall(data)
        raw.settimeout(10)
        assert b"error" in raw.recv(4096)
        with suppress(ConnectionResetError):  # where more was sent than was read
            assert raw.recv(4096) == b""
        raw.close()
        client(started).leave()


# ---- coming, going and coming back --------------------------------------------------------------------------------------


def test_meetings_wait_for_all_and_then_for_those_who_are_left() -> None:
    meetings = Meetings()
    for rank in range(3):
        meetings.hello(rank, 3, f"s{rank}")
    for rank in range(2):
        meetings.bring(rank, 0, rank)
    assert meetings.result(0, 0) is None
    meetings.bring(2, 0, 2)
    assert meetings.result(0, 0) == {0: 0, 1: 1, 2: 2}
    for rank in range(3):
        meetings.enter(rank, 0)
        assert meetings.entered(0) is (rank == 2)
    meetings.bring(0, 1, "a")
    meetings.bring(1, 1, "b")
    assert meetings.result(1, 1) is None
    meetings.lost(2)
    assert meetings.result(1, 1) == {0: "a", 1: "b"}
    with pytest.raises(MeetingError, match="declared lost"):
        meetings.hello(2, 3, "s2", meetings.run)


def test_late_worker_is_let_in_while_others_train_and_never_between_meetings() -> None:
    meetings = Meetings()
    for rank in range(2):
        meetings.hello(rank, 2, f"s{rank}")
        meetings.bring(rank, 0, None)
        meetings.enter(rank, 0)
    assert meetings.result(0, 0) and meetings.entered(0)
    meetings.lost(1)
    assert meetings.hello(1, 2, "new").late
    meetings.enter(1, 0)
    assert meetings.entered(1) and meetings.members[1].met == 1
    meetings.lost(1)
    meetings.bring(0, 1, None)  # the end of the epoch
    meetings.hello(1, 2, "newer")
    meetings.enter(1, 0)
    assert not meetings.entered(1)
    assert meetings.result(0, 1) == {0: None}, "the others do not wait for it"
    meetings.enter(0, 1)
    assert meetings.entered(0) and meetings.entered(1) and meetings.members[1].met == 2


def test_what_a_member_was_told_is_told_the_others_by_the_next_process() -> None:
    """The clock was killed between two answers: one has a meeting, or the beginning of an epoch, behind it, the other waits."""
    meetings = Meetings()
    for rank in range(2):
        meetings.hello(rank, 2, f"s{rank}")
    saved = meetings.state_dict()
    about = {"epoch": 0, "requests": {"stop": 0, "save": 1}, "meeting": 3}
    again = Meetings()
    again.load_state_dict(saved)
    again.bring(1, 3, "b")
    again.enter(1, 0)
    assert again.result(1, 3) is None and not again.entered(1)
    again.remember(0, about, {0: "a", 1: "b"})
    assert again.result(1, 3) == {0: "a", 1: "b"} and again.entered(1) and again.epoch == 0
    assert again.requests == {"stop": 0, "save": 1}
    again.bring(0, 4, 1)
    again.remember(1, {"epoch": 0, "requests": {}, "meeting": 3}, {0: "a", 1: "b"})
    again.bring(1, 4, 2)
    assert again.result(0, 4) == {0: 1, 1: 2}
    with pytest.raises(MeetingError, match="does not take part"):
        again.remember(2, about, None)


@pytest.mark.parametrize("first", [0, 1])
def test_meeting_whose_answers_were_lost_with_the_clock_is_over_for_all(tmp_path: Path, first: int) -> None:
    """Killed when one worker had its answer and the other had not; the file is from before that, as it may be."""
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    workers = [client([server], rank, 2) for rank in range(2)]
    workers[0].configure(layout, spec, {"mode": "ssp", "save_every": 1e9}, list(values.values()))
    brought = [{"weights": random(3, seed=rank), "rank": rank} for rank in range(2)]
    found = run_workers(2, lambda rank: workers[rank].gather(brought[rank]))
    run_workers(2, lambda rank: workers[rank].enter(0))
    server.stop()  # the file knows of neither
    again = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    assert again.server._meetings.epoch == -1
    told, other = workers[first], workers[1 - first]
    for worker in workers:
        worker._disconnect(0)
    other._meeting, other._gathered, other.epoch = 0, None, -1

    def go_on(rank: int) -> Any:
        if workers[rank] is told:
            return told.gather("more")
        repeated = other.gather(brought[rank])
        assert other.enter(0) == 0
        return repeated, other.gather("more")

    results = run_workers(2, go_on)
    repeated, more = results[1 - first]
    assert all(torch.equal(repeated[rank]["weights"], found[0][rank]["weights"]) for rank in range(2))
    assert more == results[first] == {0: "more", 1: "more"}
    assert again.server._meetings.epoch == 0
    for worker in workers:
        worker.leave()
    again.stop()


def test_worker_that_computes_for_long_is_not_lost_with_the_clock() -> None:
    """The clock was started again; one worker gives signs of life, from the others nothing is heard."""
    server = ParameterServer(0, "token")
    for rank in range(2):
        server._membership.hello(Caller(rank, f"s{rank}", pulse=False), {"world_size": 2})
    server._membership.expect_back(100.0)
    server._membership.heard(Caller(0, "s0", pulse=True))
    server._membership.tick(time.monotonic() + 99.0)
    assert server._meetings.members.keys() == {0, 1}
    server._membership.tick(time.monotonic() + 106.0)
    assert server._meetings.members.keys() == {0}
    server._membership.gone(Caller(0, "s0", pulse=False))  # not a restart: a sign of life that was under way does not count
    server._membership.heard(Caller(0, "s0", pulse=True))
    server._membership.tick(time.monotonic() + 6.0)
    assert not server._meetings.members
    server.close()


def test_signs_of_life_find_a_clock_that_was_started_again(tmp_path: Path) -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    now, heard = [server.address], threading.Event()
    worker = client([server], pulse_every=0.05, find=lambda index: now[index])
    worker.configure(layout, spec, {"mode": "asp"}, list(values.values()))
    worker.enter(0)
    server.stop()
    again = ServerThread(0, server.token, slice_file=tmp_path / "slice.safetensors")
    again.server._membership.heard = lambda caller: heard.set() if caller.pulse else None  # type: ignore[method-assign]
    now[0] = again.address
    assert again.address.port != server.address.port and heard.wait(60)
    worker.leave()
    again.stop()


def test_worker_lost_before_training_ends_the_run_with_its_name() -> None:
    meetings = Meetings()
    meetings.hello(0, 2, "s0")
    meetings.hello(1, 2, "s1")
    meetings.lost(1)
    with pytest.raises(MeetingError, match="worker 1 has ended before training began"):
        meetings.bring(0, 0, None)


def test_worker_that_comes_when_all_have_done_begins_no_run_of_its_own() -> None:
    meetings = Meetings()
    meetings.hello(0, 1, "a")
    run = meetings.run
    meetings.enter(0, 0)
    assert meetings.entered(0)
    meetings.leave(0)
    with pytest.raises(MeetingError, match="was to join has ended") as refusal:
        meetings.hello(0, 1, "b", joins=run)
    assert refusal.value.kind == "over" and not meetings.members


def test_processes_of_a_new_group_replace_those_of_the_former() -> None:
    meetings = Meetings()
    for rank in range(2):
        meetings.hello(rank, 2, f"s{rank}", group="run/0")
        meetings.enter(rank, 0)
    assert meetings.entered(0)
    first = meetings.run
    assert not meetings.hello(0, 2, "t0", group="run/1").late, "torchrun has killed the others, too"
    assert meetings.run != first and list(meetings.members) == [0]


def test_new_run_begins_when_all_have_left() -> None:
    meetings = Meetings()
    first = (meetings.hello(0, 1, "a"), meetings.run)[1]
    meetings.leave(0)
    meetings.hello(0, 1, "b")
    assert meetings.run != first
    with pytest.raises(MeetingError, match="a run that has ended"):
        meetings.hello(0, 1, "a", first)


def test_gradient_sent_again_is_taken_once() -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["momentum"](in_groups(values)))
    with servers(1) as started:
        worker = client(started)
        worker.configure(layout, spec, {"mode": "asp"}, list(values.values()))
        worker.enter(0)
        fill(values, 1)
        worker.push(layout, gradient_of(layout, values), spec.groups, version=0)
        before = read(worker, layout)
        worker._number -= 1
        worker._disconnect(0)
        outcome = worker.push(layout, gradient_of(layout, values), spec.groups, version=0)
        assert outcome.accepted and outcome.version == 1
        assert all(torch.equal(a, b) for a, b in zip(before, read(worker, layout), strict=True))
        worker.leave()


def test_server_that_is_started_again_goes_on_from_its_file_and_counts_what_is_lost(tmp_path: Path) -> None:
    values = parameters()
    layout, spec = layout_of(values, 2), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    with servers(1) as first:
        second = ServerThread(1, first[0].token, slice_file=tmp_path / "slice.safetensors")
        worker = client([first[0], second])
        worker.configure(layout, spec, {"mode": "bsp", "save_every": 1e9}, list(values.values()))
        worker.enter(0)
        train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(3)], "bsp")
        worker.pull(layout, "bsp", gate=False)
        second.server.save(wait=True)
        saved = read(worker, layout, "bsp")
        train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(3, 5)], "bsp")
        worker.pull(layout, "bsp", gate=False)
        after = read(worker, layout, "bsp")
        second.stop()
        again = ServerThread(1, first[0].token, second.address.port, slice_file=tmp_path / "slice.safetensors")
        found = read(worker, layout, "bsp")
        assert again.server.version == 5 and again.server.lost == 2
        for number, value in enumerate(found):  # the part of server 0 is new, that of server 1 as it was saved
            assert all(bool(((value == after[number]) | (value == saved[number])).all()) for _ in [0])
        assert any(not torch.equal(a, b) for a, b in zip(found, after, strict=True))
        assert train(worker, layout, spec.groups, [random(4, 3, seed=9)], "bsp") == [True]
        worker.leave()
        again.stop()


def test_clock_that_is_started_again_knows_its_workers(tmp_path: Path) -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    worker = client([server])
    worker.configure(layout, spec, {"mode": "ssp", "staleness": 2}, list(values.values()))
    worker.enter(0)
    train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(3)], "ssp")
    server.server.save(wait=True)
    train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(2)], "ssp")
    server.stop()
    again = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    assert train(worker, layout, spec.groups, [random(4, 3, seed=7)], "ssp") == [True]
    assert worker.version == 6 and again.server.lost == 2
    assert worker.gather("here") == {0: "here"}
    worker.leave()
    again.stop()


def test_synchronous_clock_that_is_started_again_waits_for_all_who_took_part() -> None:
    """What it had saved may say that somebody is idle who trains meanwhile."""
    clock = Clock(Consistency("bsp"))
    clock.enter(range(3))
    clock.idle(1)
    again = Clock(Consistency("bsp"))
    again.load_state_dict(clock.state_dict())
    again.expect_back(range(4))
    assert again.push(0, 0).accepted is None and again.push(2, 0).accepted is None
    assert again.idle(3) is None  # it was idle, and says so again
    assert again.push(1, 0).decision == Decision(0, (0, 1, 2))
    assert again.push(0, 1).decision is None  # the one that was thought idle trains, and is waited for
    again.expect_back([0, 1, 2])
    assert [again.idle(worker) for worker in (1, 2)] == [None, None]
    assert again.idle(0) is None  # all are lost, or have nothing to train


def test_synchronous_gradient_of_a_step_that_is_lost_is_not_dropped() -> None:
    """Its worker has not heard that the former process took it; one of a step before that is late, as ever."""
    clock = Clock(Consistency("bsp"))
    clock.version = 5
    clock.expect_back(range(3))
    clock.enter([2])
    assert clock.advance(7) == 2 and clock.advance(6) == 0
    assert [clock.push(0, version).accepted for version in (6, 5, 4)] == [True, True, False]
    again = Clock(Consistency("bsp"))
    again.load_state_dict(clock.state_dict())
    assert again.advance(8) == 1
    assert [again.push(1, version).accepted for version in (7, 5, 4)] == [True, True, False]
    assert clock.counts["dropped"] == 1 and again.counts["dropped"] == 2
    assert clock.push(2, 7).decision is None, "the third is waited for"
    assert clock.push(0, 7).decision is None and clock.push(1, 7).decision == Decision(7, (0, 1, 2))


@pytest.mark.parametrize("first", ["who was told", "who was not told", "nobody was told"])
@pytest.mark.parametrize("on_drop", ["lose", "requeue"])
def test_synchronous_step_whose_answers_were_lost_with_the_clock_counts(tmp_path: Path, first: str, on_drop: str) -> None:
    """Killed after one worker was told that a step is complete, and before the others were: nothing of it is dropped."""
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    workers = [client([server], rank, 2) for rank in range(2)]
    workers[0].configure(layout, spec, {"mode": "bsp", "save_every": 1e9, "on_drop": on_drop}, list(values.values()))
    run_workers(2, lambda rank: workers[rank].enter(0))
    batches = [[random(4, 3, seed=10 * rank + step) for step in range(3)] for rank in range(2)]

    def step(rank: int, number: int) -> bool:
        dense = unflatten(layout, workers[rank].pull(layout, "bsp"))
        rows = (batches[rank][number][:, 0].abs() * 5).long() % 11
        found = workers[rank].rows(layout, {4: rows.unique()})[4]
        own = parameters()
        with torch.no_grad():
            for index, value in enumerate(own.values()):
                if index in dense:
                    value.copy_(dense[index])
            own["table"][rows.unique()] = found
        least_squares(own, batches[rank][number]).backward()
        sent[rank] = gradient_of(layout, own, 4.0)
        return workers[rank].push(layout, sent[rank], spec.groups, version=number).accepted

    def again(rank: int) -> bool:
        """The answer never came: the same once more."""
        workers[rank]._number -= 1
        return workers[rank].push(layout, sent[rank], spec.groups, version=1).accepted

    sent: dict[int, Gradient] = {}
    assert run_workers(2, lambda rank: step(rank, 0)) == [True, True]
    for worker in workers:  # the step is applied when it is told of
        worker.pull(layout, "bsp", gate=False)
    server.server.save(wait=True)
    assert run_workers(2, lambda rank: step(rank, 1)) == [True, True]
    server.stop()
    second = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    for worker in workers:
        worker._disconnect(0)
    untold = [1] if first != "nobody was told" else [0, 1]
    for rank in untold:
        workers[rank].version, workers[rank]._last = 1, None
    if first == "who was told":
        workers[0].pull(layout, "bsp")
        assert again(1)
    elif first == "who was not told":
        assert run_workers(2, lambda rank: again(1) if rank else len(workers[0].pull(layout, "bsp")) > 0) == [True, True]
    else:
        assert run_workers(2, again) == [True, True]
    assert run_workers(2, lambda rank: step(rank, 2)) == [True, True]
    for worker in workers:
        worker.pull(layout, "bsp", gate=False)
    assert second.server.version == second.server.clock.version == 3
    assert second.server.lost == (0 if first == "nobody was told" else 1)
    assert second.server.clock.counts["dropped"] == 0
    if first == "nobody was told":  # the step is done anew
        expected = union_steps("sgd", [torch.cat([of[number] for of in batches]) for number in range(3)])
        assert distance(expected, read(workers[0], layout, "bsp")) < 1e-12
    for worker in workers:
        worker.leave()
    second.stop()


def test_step_that_is_decided_and_not_applied_is_not_in_the_file(tmp_path: Path) -> None:
    """A server applies a synchronous step when it is told of it: until then a copy of its part does not say that it has."""
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors")
    worker = client([server])
    worker.configure(layout, spec, {"mode": "bsp", "save_every": 1e9}, list(values.values()))
    worker.enter(0)
    assert train(worker, layout, spec.groups, [random(4, 3, seed=step) for step in range(2)], "bsp") == [True, True]
    server.server.save(wait=True)  # the second step waits to be told
    server.stop()
    again = ServerThread(0, server.token, server.address.port, slice_file=tmp_path / "slice.safetensors")
    assert again.server.version == again.server.clock.version == 1
    assert train(worker, layout, spec.groups, [random(4, 3, seed=7)], "bsp") == [True]
    assert worker.version == 3 and again.server.lost == 1
    worker.leave()
    again.stop()


def test_full_disk_is_told_and_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    events: list[dict[str, Any]] = []
    told = threading.Event()

    def event(line: dict[str, Any]) -> None:
        events.append(line)
        if line["kind"] == "not saved":
            told.set()

    write = Slices.write_file

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    server = ServerThread(0, slice_file=tmp_path / "slice.safetensors", event=event)
    worker = client([server])
    worker.configure(layout, spec, {"mode": "asp", "save_every": 0.0}, list(values.values()))
    worker.enter(0)
    monkeypatch.setattr(Slices, "write_file", full)
    assert train(worker, layout, spec.groups, [random(4, 3, seed=0)], "asp") == [True]
    assert told.wait(20)
    monkeypatch.setattr(Slices, "write_file", write)
    assert train(worker, layout, spec.groups, [random(4, 3, seed=1)], "asp") == [True]
    worker.leave()
    server.stop()
    assert "No space left" in next(line["reason"] for line in events if line["kind"] == "not saved")


def test_gradient_that_cannot_be_applied_is_refused_once_and_not_counted() -> None:
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    with servers(1) as started:
        worker = client(started)
        worker.configure(layout, spec, {"mode": "asp"}, list(values.values()))
        worker.enter(0)
        wrong = [{**group, "lr": "fast"} for group in spec.groups]
        with pytest.raises(ServiceError, match="push"):
            train(worker, layout, wrong, [random(4, 3, seed=0)], "asp")
        assert train(worker, layout, spec.groups, [random(4, 3, seed=1)], "asp") == [True]
        assert worker.version == 1 and started[0].server.clock.counts["pushed"] == 1
        worker.leave()


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


def test_controller_sees_a_slow_server_and_has_it_started_again_without_loss(tmp_path: Path) -> None:
    controller = Scripted()
    values = parameters()
    layout, spec = layout_of(values, 1), OptimizerSpec.of(OPTIMIZERS["adam"](in_groups(values)))
    expected = parameters()
    alone = OPTIMIZERS["adam"](in_groups(expected))
    with DataServer(lambda settings: controller) as data:
        owner = Client(data.address, 0)
        owner.configure({"n": 100}, {"class_path": "", "init_args": {}}, world_size=1, global_batch=4)
        slow = SleepInjector(0.0, [Slowdown(rank=0, factor=5.0, pid_bound=True)], cost_per_batch=0.01)
        file = tmp_path / "slice.safetensors"
        started = [ServerThread(0, slice_file=file, delay=slow.delay)]

        def start_again(index: int) -> Any:
            started[-1]._thread.join()  # it has said that it ends
            started.append(ServerThread(0, started[0].token, slice_file=file))
            return started[-1].address

        worker = client(started[:1], resolve=start_again)
        about = {"mode": "asp", "report_every": 0.0, "save_every": 1e9, "data": list(data.address[:3])}
        worker.configure(layout, spec, about, list(values.values()))
        worker.enter(0)
        pushed = 0
        while len(started) == 1:
            push_both(worker, layout, spec, values, alone, expected, pushed)
            pushed += 1
        again = started[1]
        assert again.server.lost == 0 and again.server.version == pushed
        assert distance(expected, read(worker, layout)) < 1e-12
        worker.leave()
        again.stop()
        owner.close()
    seen = [sample for node, samples in controller.reports for sample in samples if node == "server:0"]
    assert seen and all(seconds >= 0.05 for _, _, _, seconds, _ in seen[:3]), "what a gradient takes is what the server reports"


def push_both(
    worker: ParameterClient, layout: Layout, spec: OptimizerSpec, values: Any, alone: Any, expected: Any, step: int
) -> None:
    """A gradient to the servers, and to an optimizer of this process."""
    fill(values, step)
    fill(expected, step)
    worker.push(layout, gradient_of(layout, values), spec.groups, version=step)
    alone.step()


@pytest.mark.parametrize("count", [1, 2])
def test_worker_that_dies_within_a_push_leaves_all_or_its_samples_come_again(count: int) -> None:
    values = parameters()
    layout, spec = layout_of(values, count), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    with DataServer(lambda settings: Scripted()) as data, servers(count, grace=0.0) as started:
        ledger = [Client(data.address, rank) for rank in range(2)]
        ledger[0].configure({"n": 8}, {"class_path": "", "init_args": {}}, world_size=2, global_batch=4,
                            semantics="at_least_once_batch")  # fmt: skip
        workers = [client(started, rank, 2) for rank in range(2)]
        about = {"mode": "asp", "report_every": 1e9, "data": list(data.address[:3])}
        workers[0].configure(layout, spec, about, list(values.values()))
        run_workers(2, lambda rank: (ledger[rank].join(2, barrier=False), workers[rank].enter(0)))
        held = [ledger[rank].fetch(0, (4, 4), 4).ranges[0] for rank in range(2)]
        fill(values, 0)
        gradient = gradient_of(layout, values, 4.0)
        whole, clock = workers[1]._exchange, []

        def die(asked: Any, *args: Any, **kwargs: Any) -> Any:
            if list(asked) == [0]:  # its other servers have their part, the clock has not
                clock.append(workers[1]._number)
                raise KeyboardInterrupt
            return whole(asked, *args, **kwargs)

        workers[1]._exchange = die  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            workers[1].push(layout, gradient, spec.groups, version=0, items=[(held[1].sid, held[1].hi)], gen=ledger[1].gen)
        assert clock
        workers[1].close()
        ledger[1].leave(graceful=False)
        workers[0].push(layout, gradient, spec.groups, version=0, items=[(held[0].sid, held[0].hi)], gen=ledger[0].gen)
        found = ledger[0].fetch(0, (4, 4), 8)
        assert [(item.lo, item.hi) for item in found.ranges] == [(held[1].lo, held[1].hi)], (
            "none is missing, only these come again"
        )
        assert [server.server.version for server in started] == [1, 2][:count]
        workers[0].leave()
        for each in ledger:
            each.close()


def test_run_of_which_some_workers_never_come_gives_up() -> None:
    with servers(1, start_timeout=2.0) as started:
        worker = client(started, 0, 3)
        with pytest.raises(ServiceError, match=r"2 of 3 workers have not come within 2 s: 1, 2"):
            worker.gather(None)
        worker.close()


def test_worker_at_a_meeting_is_not_waited_for_at_the_gate() -> None:
    clock = Clock(Consistency("ssp", staleness=1))
    clock.enter([0, 1])
    for _ in range(2):
        clock.push(0, clock.version)
    assert not clock.may_begin(0)
    clock.idle(1)
    assert clock.may_begin(0)
    clock.push(0, clock.version)
    clock.resume(1, 0)
    assert clock.own[1] == 3, "it counts from the slowest, so that the other need not wait for what it has missed"


def test_server_that_is_gone_is_named(tmp_path: Path) -> None:
    with servers(1) as started:
        worker = client(started, patience=0.3)
    with pytest.raises(ServersUnreachable, match=r"parameter server 0 at 127\.0\.0\.1.*--ckpt_path last"):
        worker.look()
    worker.close()


def test_damaged_slice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slice.safetensors"
    path.write_bytes(b"not a slice")
    with pytest.raises(ValueError, match="no slice of a parameter server, or damaged"):
        ServerThread(0, slice_file=path)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"kind": "async"}, "asp, ssp or bsp"), ({"kind": "asp", "backup": 1}, "bsp only"),
    ({"kind": "bsp", "staleness": 1}, "ssp only"), ({"kind": "ssp", "staleness": -1}, "not be negative"),
])  # fmt: skip
def test_modes_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Consistency(**arguments)


def test_decision_round_trip() -> None:
    assert Decision.from_json(Decision(3, (0, 2)).to_json()) == Decision(3, (0, 2))
