"""What is sent in a step is what the closed formulas say, to the byte, for every code, on any grid.

The backend ``fake`` sends nothing and lets one process be a rank of any world, so that the counters can be seen at any size.
"""

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from strategies.paro import CODES, Collectives, FlatRing, Granularity, HORing, Partition, RankGrid
from strategies.paro.collectives import Method
from strategies.paro.link import Link, Pending, Ring
from strategies.paro.volume import memory, padded, volume, volume_terms
from strategies.traffic import Traffic

SLOW = [(4, 4), (4, 1), (4, 2), (6, 2), (32, 8)]
GRIDS = [(6, 3), (1, 1), *(pytest.param(*grid, marks=pytest.mark.slow) for grid in SLOW)]
PARAMETERS, GRADIENTS = torch.bfloat16, torch.float32
ROOT, BLOCKS, FROZEN = 37, [33, 1], [50]
"""Elements of the units: one root, trainable blocks, frozen blocks."""


@contextmanager
def rank_of(world_size: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Step:
    """The collectives of one optimizer step of a code, as spelled out in the pseudo-code of the method."""

    def __init__(self, collectives: Collectives, partition: Partition, s: int, async_op: bool = False) -> None:
        self.collectives, self.partition, self.async_op = collectives, partition, async_op
        n = collectives.grid.n
        root, blocks, frozen = padded(ROOT, n), [padded(size, n) for size in BLOCKS], [padded(size, n) for size in FROZEN]
        for _ in range(s):
            for size in [root, *blocks, *frozen, *blocks, *frozen]:  # the root once, the others forward and backward
                self.gather(size, partition.parameters, "N")
            for size in [root, *blocks]:
                if partition.gradients != "N":
                    self.reduce(size, "N", partition.gradients)
        for size in [root, *blocks]:
            self.synchronise(size)

    def synchronise(self, size: int) -> None:
        g, os, p = self.partition.gradients, self.partition.optimizer, self.partition.parameters
        if (g, os) == ("N", "I"):
            self.reduce(size, "N", "I")
            g = "I"
        if g != os:
            self.reduce(size, g, os)
        else:
            self.wait(self.collectives.all_reduce(self.buffer(size, g, GRADIENTS), g, self.async_op))
        self.gather(size, os, p)

    def gather(self, size: int, source: Granularity, target: Granularity) -> None:
        if source != target and "NIG".index(source) > "NIG".index(target):
            out, shard = self.buffer(size, target, PARAMETERS), self.buffer(size, source, PARAMETERS)
            self.wait(self.collectives.all_gather(out, shard, source, target, self.async_op))

    def reduce(self, size: int, source: Granularity, target: Granularity) -> None:
        out, full = self.buffer(size, target, GRADIENTS), self.buffer(size, source, GRADIENTS)
        self.wait(self.collectives.reduce_scatter(out, full, source, target, self.async_op))

    def wait(self, work: Any) -> None:
        assert (work is not None) == self.async_op
        if work is not None:
            work.wait()

    def buffer(self, size: int, granularity: Granularity, dtype: torch.dtype) -> Tensor:
        grid = self.collectives.grid
        return torch.zeros(size // {"N": 1, "I": grid.m, "G": grid.n}[granularity], dtype=dtype)


def formula(code: str, n: int, m: int, s: int) -> tuple[int, int]:
    trainable = [padded(size, n) for size in [ROOT, *BLOCKS]]
    sent = volume(
        Partition.of(code),
        n=n,
        m=m,
        s=s,
        psi=sum(trainable) + sum(padded(size, n) for size in FROZEN),
        psi_trainable=sum(trainable),
        psi_root=padded(ROOT, n),
        bytes_p=2,
        bytes_g=4,
    )
    return sent.intra, sent.inter


def by_link(sent: Counter[tuple[str, str]]) -> tuple[int, int]:
    intra, inter = (sum(size for (_, link), size in sent.items() if link == name) for name in ("intra", "inter"))
    return intra, inter


@pytest.mark.parametrize(("n", "m"), GRIDS)
def test_bytes_of_every_code_are_those_of_the_formula_and_of_the_dispatcher(n: int, m: int) -> None:
    with rank_of(n, n // 2):
        grid = RankGrid(m)
        ways: list[tuple[Method, int]] = [("overlapped", 1), ("overlapped", 3), ("two_phase", 2)]
        for method, s in ways:
            collectives = Collectives(grid, method)
            for code in CODES:
                collectives.reset()
                with Traffic(neighbours=m) as traffic:
                    Step(collectives, Partition.of(code), s)
                assert by_link(collectives.sent) == formula(code, n, m, s), (code, s, method)
                assert (traffic.ring_bytes(link="intra"), traffic.ring_bytes(link="inter")) == by_link(collectives.sent)
                assert n > 1 or not traffic.transfers


def test_asynchronous_operations_send_the_same() -> None:
    with rank_of(6, 4):
        collectives = Collectives(RankGrid(3))
        for code in CODES:
            collectives.reset()
            Step(collectives, Partition.of(code), 2, async_op=True)
            assert by_link(collectives.sent) == formula(code, 6, 3, 2)


def test_threads_end_with_their_grid_and_keep_no_buffer() -> None:
    def serving() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("paro ")}

    others = serving()
    with rank_of(4, 1):
        grid = RankGrid(2)
        out, shard = torch.zeros(8), torch.zeros(2)
        work = HORing(grid).all_gather(out, shard, async_op=True)
        assert work is not None
        work.wait()
        (thread,) = serving() - others
        buffer = weakref.ref(out)
        del out, shard, work
        grid.gather.perform(lambda: None, (), async_op=True).wait()  # type: ignore[union-attr]
        assert buffer() is None
        del grid
        gc.collect()
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("method", ["overlapped", "two_phase", "flat"])
def test_paths_of_the_library_send_the_same(method: Method) -> None:
    """What NCCL would be asked for, on a backend that answers anything."""
    with rank_of(8, 3), patch("strategies.paro.grid._backend", return_value="nccl"):
        collectives = Collectives(RankGrid(4), method)
        for code in CODES:
            collectives.reset()
            with Traffic(neighbours=4) as traffic:
                Step(collectives, Partition.of(code), 2)
            if method != "flat":
                assert by_link(collectives.sent) == formula(code, 8, 4, 2)
                assert (traffic.ring_bytes(link="intra"), traffic.ring_bytes(link="inter")) == by_link(collectives.sent)
            assert traffic.num_bytes("all_to_all") == 0
    assert traffic.num_bytes("reduce_scatter") > 0


def test_a_flat_ring_sends_everything_over_one_link() -> None:
    """The uplink of a group carries (n - 1) / n of a buffer, where the hierarchy takes (ng - 1) / ng: (n - 1) / (n - m) more."""
    n, m, size = 6, 3, 600
    for rank in range(n):
        with rank_of(n, rank):
            grid = RankGrid(m)
            flat = FlatRing(grid)
            with Traffic(neighbours=m) as traffic:
                flat.all_gather(torch.zeros(size), torch.zeros(size // n))
            link = "inter" if rank % m == m - 1 else "intra"
            assert flat.sent == {("all_gather", link): (n - 1) * size // n * 4}
            assert traffic.ring_bytes("send", link) == flat.sent["all_gather", link] == traffic.ring_bytes()
            hierarchical = HORing(grid)
            hierarchical.all_gather(torch.zeros(size), torch.zeros(size // n))
            uplink = m * hierarchical.sent["all_gather", "inter"]
            assert uplink * (n - 1) == (n - 1) * size // n * 4 * (n - m)


def test_nine_codes_send_the_least_between_groups_whatever_the_accumulation() -> None:
    least = {"NNN", "NNI", "NNG", "NII", "NIG", "INI", "ING", "III", "IIG"}
    found = {code: [volume(Partition.of(code), n=32, m=8, s=s, psi=3200).inter for s in (1, 10)] for code in CODES}
    assert {code for code, (once, often) in found.items() if once == often} == least
    assert {tuple(found[code]) for code in least} == {(2 * 3200 * 4 * 3 // 32,) * 2}
    # Summed in float32 and gathered in bfloat16, IIG sends 6 bytes an element, III 8.
    narrow = {code: volume(Partition.of(code), n=32, m=8, s=4, psi=3200, bytes_p=2).inter for code in ("IIG", "III")}
    assert narrow["IIG"] * 8 == narrow["III"] * 6


def test_terms_of_one_group_and_of_groups_of_one() -> None:
    for code in CODES:
        assert volume(Partition.of(code), n=8, m=8, s=3, psi=80).inter == 0
        assert volume(Partition.of(code), n=8, m=1, s=3, psi=80).intra == 0
        assert volume(Partition.of(code), n=1, m=1, s=3, psi=80).total == 0
        as_group, as_world = (code.replace(*letters) for letters in (("G", "I"), ("I", "G")))
        sent = [volume(Partition.of(c), n=8, m=8, s=3, psi=80) for c in (code, as_group, as_world)]
        assert sent[0] == sent[1] == sent[2]
    frozen = volume_terms(Partition.of("GGG"), n=4, m=2, s=2, psi=400, psi_trainable=0, psi_root=400)
    assert (frozen["parameters"].intra, frozen["parameters"].inter) == (2 * 400 * 4 // 2, 2 * 400 * 4 // 4)
    assert frozen["gradients"].total == frozen["sync_gradients"].total == frozen["sync_parameters"].total == 0


@pytest.mark.parametrize(
    ("billions", "share", "gigabytes"),
    [
        (7, 1, {"NNI": 38.5, "NII": 26.25, "III": 14, "IIG": 6.125, "NIG": 18.375, "ING": 18.375, "NNG": 30.625,
                "IGG": 4.8125, "NGG": 17.0625, "GGG": 3.5}),
        (65, 1, {"NNI": 357.5, "NII": 243.75, "III": 130, "IIG": 56.875, "IGG": 44.69, "GGG": 32.5}),
        (65, 16, {"NNI": 144.2, "NII": 137.1, "III": 23.36, "IIG": 18.79, "ING": 25.90, "IGG": 18.03, "GGG": 5.84}),
    ],
)  # fmt: skip
def test_memory_of_the_papers_scenarios(billions: int, share: int, gigabytes: dict[str, float]) -> None:
    psi = billions * 10**9
    for code, size in gigabytes.items():
        found = memory(Partition.of(code), n=32, m=8, psi=psi, psi_trainable=psi // share).total / 1e9
        assert found == pytest.approx(size, abs=0.051 if size > 100 else 0.0051)


def test_impossible_arguments_are_refused() -> None:
    partition = Partition.of("IIG")
    with pytest.raises(ValueError, match="psi=101 is no multiple of n=4"):
        volume(partition, n=4, m=2, s=1, psi=101)
    with pytest.raises(ValueError, match="m must divide n"):
        volume(partition, n=4, m=3, s=1, psi=100)
    with pytest.raises(ValueError, match="parts of psi=100"):
        volume(partition, n=4, m=2, s=1, psi=100, psi_trainable=104)
    with pytest.raises(ValueError, match="psi=-4 must not be negative"):
        memory(partition, n=4, m=2, psi=-4)


def test_blocks_go_on_inside_groups_while_the_next_ones_travel_between_them() -> None:
    """Between the start of each transfer and the wait for it, a collective inside the group is started."""
    log: list[str] = []
    shift, gather, exchange, wait = Ring.shift, Link.all_gather, Link.reduce_scatter, Pending.wait
    transfers: list[Pending] = []

    def shifted(self: Ring, *args: Any) -> Pending:
        log.append("send")
        transfers.append(shift(self, *args))
        return transfers[-1]

    def inside(started: Any) -> Any:
        return lambda self, *args: (log.append(self.name), started(self, *args))[1]

    def waited(self: Pending) -> None:
        if self in transfers:
            log.append("arrived")
        wait(self)

    with (
        rank_of(6, 3),
        patch.object(Ring, "shift", shifted),
        patch.object(Link, "all_gather", inside(gather)),
        patch.object(Link, "reduce_scatter", inside(exchange)),
        patch.object(Pending, "wait", waited),
    ):
        ring = HORing(RankGrid(2))
        ring.all_gather(torch.zeros(60), torch.zeros(10))
        assert log == ["send", "intra", "arrived"] * 2 + ["intra"]
        log.clear()
        ring.reduce_scatter(torch.zeros(10), torch.zeros(60))
        assert log == ["intra"] + ["send", "intra", "arrived"] * 2
