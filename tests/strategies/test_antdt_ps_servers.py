"""Parameter servers: together they are the optimizer of one process, in each mode, and take no strange message."""

import socket
import struct
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from antdt_ps_runs import (
    OPTIMIZERS,
    client,
    distance,
    fill,
    gradient_of,
    in_groups,
    layout_of,
    parameters,
    random,
    read,
    run_workers,
    servers,
    train,
    union_steps,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from strategies.antdt.ps.clock import Clock, Consistency, Decision
from strategies.antdt.ps.frames import Connection, encode_frame, pack, unpack
from strategies.antdt.ps.partition import Entry, Layout
from strategies.antdt.ps.remote_optimizer import OptimizerSpec
from strategies.antdt.ps.slices import Gradient, Slices, merge
from strategies.antdt.ps.worker import ParameterClient
from strategies.antdt.service.wire import MessageTooLarge, ServiceError

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


def test_a_gradient_with_nan_is_clipped_as_torch_clips_it() -> None:
    values = parameters()
    layout, spec = layout_of(values, 2), OptimizerSpec.of(OPTIMIZERS["sgd"](in_groups(values)))
    with servers(2) as started:
        worker = client(started, 0, 1)
        worker.configure(layout, spec, {"mode": "bsp", "clip": 0.5}, list(values.values()))
        worker.enter(0)
        worker.pull(layout, "bsp", clip_norm=0.5)
        fill(values, 1)
        values["a"].grad[0] = torch.nan  # type: ignore[index]
        worker.push(layout, gradient_of(layout, values), spec.groups, version=worker.version)
        worker.pull(layout, "bsp", clip_norm=0.5)
        found = dict(zip(values, read(worker, layout, "bsp"), strict=True))
    assert all(found[name].isnan().all() for name in ("a", "b", "c", "d"))


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


@settings(max_examples=30, deadline=None)
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


# ---- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    ({"kind": "async"}, "asp, ssp or bsp"), ({"kind": "asp", "backup": 1}, "bsp only"),
    ({"kind": "bsp", "staleness": 1}, "ssp only"), ({"kind": "ssp", "staleness": -1}, "not be negative"),
])  # fmt: skip
def test_modes_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Consistency(**arguments)


def test_decision_round_trip() -> None:
    assert Decision.from_json(Decision(3, (0, 2)).to_json()) == Decision(3, (0, 2))
