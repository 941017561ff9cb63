"""Every code of PaRO trains as one process does: parameters, norms, recomputation, tied, frozen and unused parameters."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from distributed import RankPool
from torch import Tensor, nn
from torch.distributed import all_gather, get_rank, get_world_size
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from strategies.paro import CODES, Collectives, PaROEngine, Partition, RankGrid, StatePrecision
from strategies.paro.volume import volume

WIDTH, WORDS, SAMPLES, LENGTH = 9, 7, 12, 3
AdamW = "AdamW"


class Layer(nn.Module):
    """A residual layer whose sizes no number of ranks divides; gives its activations as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 11)
        self.down = nn.Linear(11, WIDTH)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inside = self.up(self.norm(x)).tanh()
        return {"x": x + self.down(inside), "penalty": inside.square().mean()}


class Network(nn.Module):
    """An embedding, layers, and a head; ``tied`` heads are the embedding."""

    def __init__(self, depth: int = 3, tied: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.recompute = recompute
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x, penalty = self.words(ids), torch.zeros((), dtype=self.scale.dtype)
        for layer in self.layers:
            output = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x, penalty = output["x"], penalty + output["penalty"]
        loss = nn.functional.cross_entropy((self.scale * self.head(x)).flatten(0, 1), ids.roll(1, 1).flatten())
        return loss + 0.1 * penalty


@dataclass
class Case:
    """What is trained, and how."""

    code: str = "IIG"
    group: int = 2
    micro: int = 1
    steps: int = 3
    dtype: torch.dtype = torch.float64
    optimizer: str = AdamW
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05, "weight_decay": 0.1})
    network: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    groups: bool = False
    clip: float | None = None
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a rank saw."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    memory: dict[str, int]


def build(case: Case) -> tuple[Network, Optimizer]:
    torch.manual_seed(5)
    network = Network(**case.network).to(case.dtype)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(case.frozen) if case.frozen else True)
    parameters = list(network.parameters())
    groups: Any = parameters
    if case.groups:
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in parameters if p.dim() == 1], "lr": 0.01},
        ]
    return network, getattr(torch.optim, case.optimizer)(groups, **case.options)


def batches(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator) for _ in range(case.steps)]


def one_process(case: Case) -> Outcome:
    network, optimizer = build(case)
    losses, norms = [], []
    for batch in batches(case):
        for part in batch.chunk(case.micro):
            loss = network(part) / case.micro
            loss.backward()
            losses.append(loss.item())
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        if case.clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), case.clip)
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses, norms, {name: p.detach().clone() for name, p in network.named_parameters()}, {})


def many_processes(case: Case, grid: RankGrid) -> Outcome:
    network, optimizer = build(case)
    if grid.rank:
        for parameter in network.parameters():
            parameter.data.zero_()  # the values are those of rank 0
    engine = PaROEngine(network, optimizer, Partition.of(case.code), Collectives(grid), **case.engine)
    losses, norms = [], []
    for batch in batches(case):
        for index, part in enumerate(batch.chunk(case.micro)):
            engine.last = index == case.micro - 1
            engine.begin_forward()
            loss = network(part.chunk(grid.n)[grid.rank]) / case.micro
            loss.backward()
            engine.finish_backward()
            losses.append(loss.item())
            assert all(parameter.grad is None for parameter in network.parameters())
        norm = engine.gradient_norm()
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        if case.clip:
            torch.nn.utils.clip_grads_with_norm_(masters, case.clip, norm)
        norms.append(norm.item())
        optimizer.step()
        engine.sync_parameters()
        memory = engine.memory()
        optimizer.zero_grad()
    check_costs(case, engine, memory)
    with engine.full_parameters():
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    return Outcome(losses, norms, weights, memory)


def check_costs(case: Case, engine: PaROEngine, after_step: dict[str, int]) -> None:
    """Bytes sent and bytes kept are those of the closed formulas, padding included [spec 2.7, 2.8]."""
    if case.frozen or case.optimizer != AdamW:
        return
    partition, grid, width = engine.partition, engine.grid, case.dtype.itemsize
    psi = sum(unit.size for unit in engine.units)
    root = sum(unit.size for unit in engine.units if unit.plan.block is None)
    step = volume(partition, n=grid.n, m=grid.m, s=case.micro, psi=psi, psi_root=root, bytes_p=width, bytes_g=width)
    sent = {link: sum(n for (_, on), n in engine.comm.sent.items() if on == link) for link in ("intra", "inter")}
    assert sent == {"intra": case.steps * step.intra, "inter": case.steps * step.inter}, case
    share = {"N": 1, "I": grid.m, "G": grid.n}
    assert after_step["parameters"] == width * psi // share[partition.parameters]
    assert after_step["optimizer"] == 2 * width * psi // share[partition.optimizer]
    assert after_step["masters"] == after_step["gathered"] == 0


def several(cases: list[Case]) -> list[Outcome]:
    grids = {group: RankGrid(group) for group in sorted({case.group for case in cases})}
    return [many_processes(case, grids[case.group]) for case in cases]


def assert_equal(ranks: list[Outcome], one: Outcome, tolerance: float) -> None:
    losses = torch.tensor([rank.losses for rank in ranks], dtype=torch.float64).mean(0)
    torch.testing.assert_close(losses, torch.tensor(one.losses, dtype=torch.float64), rtol=0, atol=tolerance)
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank.norms), torch.tensor(one.norms), rtol=tolerance, atol=tolerance)
        for name, value in rank.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=0, atol=tolerance, msg=name)


def check(pool: RankPool, cases: list[Case], world_size: int, tolerance: float = 1e-10) -> list[list[Outcome]]:
    outcomes = list(zip(*pool.run(several, cases, world_size=world_size, timeout=200), strict=True))
    for case, ranks in zip(cases, outcomes, strict=True):
        assert_equal(list(ranks), one_process(case), tolerance)
    return [list(ranks) for ranks in outcomes]


def of_two_steps(code: str, group: int, micro: int) -> Case:
    return Case(code, group, micro, steps=2, clip=0.8, network={"depth": 2})


@pytest.mark.slow
def test_all_codes_train_as_one_process(pool: RankPool) -> None:
    check(pool, [of_two_steps(code, group=2, micro=3) for code in CODES], 4)


def test_sizes_of_groups_that_are_no_powers_of_two(pool: RankPool) -> None:
    check(pool, [of_two_steps(code, group=3, micro=2) for code in ("NNI", "NIG", "IIG", "GGG")], 6)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "groups"), [(4, (2, 4, 1)), (6, (3, 2)), (1, (1,))])
def test_all_codes_train_as_one_process_on_every_grid(pool: RankPool, world_size: int, groups: tuple[int, ...]) -> None:
    micro = 2 if world_size == 6 else 1
    check(pool, [of_two_steps(code, group, micro) for group in groups for code in CODES], world_size)


VARIANTS = {
    "tied": {"network": {"tied": True}},
    "recomputed": {"network": {"recompute": True}, "micro": 3},
    "groups": {"groups": True},
    "frozen": {"frozen": ("words", "layers.0", "layers.1.up", "layers.2.down")},
    "tied, frozen, recomputed": {"network": {"tied": True, "recompute": True}, "frozen": ("layers.1",)},
    "synchronous": {"engine": {"overlap": False}, "micro": 3},
    "two ahead": {"engine": {"prefetch": 2}, "micro": 3},
    "merged": {"engine": {"min_unit_params": 10**6}},
}


@pytest.mark.slow
@pytest.mark.parametrize("code", ["IIG", "GGG"])
def test_variants_train_as_one_process(pool: RankPool, code: str) -> None:
    check(pool, [Case(code, steps=2, **variant) for variant in VARIANTS.values()], 4)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {"initial_accumulator_value": 0.3},
    "Adadelta": {},
    "ASGD": {},
    "Rprop": {},
}


def halves(code: str) -> tuple[list[float], dict[str, int], list[float]]:
    """bfloat16 weights and wire beside float32 masters: losses, memory, and the deviation of replicas."""
    case = Case(code, dtype=torch.float32, steps=20, options={"lr": 0.02})
    network, optimizer = build(case)
    precision = StatePrecision("bfloat16", "bfloat16", "float32")
    engine = PaROEngine(network, optimizer, Partition.of(code), Collectives(RankGrid(2)), precision=precision)
    network.scale = network.scale.bfloat16()
    losses = []
    batch = batches(case)[0].chunk(get_world_size())[get_rank()]
    for _ in range(case.steps):
        engine.begin_forward()
        loss = network(batch)
        # Two backward passes of one loss are one of twice the loss.
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()
        engine.finish_backward()
        optimizer.step()
        engine.sync_parameters()
        memory = engine.memory()
        optimizer.zero_grad()
        losses.append(loss.item())
    deviation = []
    for unit in engine.units:
        flat = engine.read(unit).double().sum()
        sums = [torch.zeros_like(flat) for _ in range(get_world_size())]
        all_gather(sums, flat)
        deviation.append(float(max((each - flat).abs() for each in sums)))
    return losses, memory, deviation


def test_half_precision_learns_as_float32_does(pool: RankPool) -> None:
    ranks = {code: pool.run(halves, code) for code in ("IIG", "NIG")}
    case = Case(dtype=torch.float32, steps=20, options={"lr": 0.02})
    network, optimizer = build(case)
    expected = []
    for _ in range(case.steps):
        loss = network(batches(case)[0])
        loss.backward()
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for outcomes in ranks.values():
        mean = torch.tensor([losses for losses, _, _ in outcomes]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(expected), rtol=0.05, atol=0.05)
        assert mean[-1] < 0.7 * mean[0]
        for _, memory, deviation in outcomes:
            assert max(deviation) == 0.0
            assert memory["optimizer"] == 2 * memory["masters"] > 0
    assert ranks["IIG"][0][1]["parameters"] * 2 == ranks["NIG"][0][1]["parameters"]


@pytest.mark.slow
def test_elementwise_optimizers_are_exact(pool: RankPool) -> None:
    cases = [Case("IIG", optimizer=name, options=options) for name, options in OPTIMIZERS.items()]
    fused = Case("IIG", dtype=torch.float32, options={"lr": 0.05, "fused": True})
    check(pool, cases, 4, 1e-8)
    check(pool, [fused, Case("GIG", dtype=torch.float32)], 4, 2e-5)


ON_RANKS = {(0, 3): Case("IIG", group=1, clip=0.1), (1, 2): Case("GGG", group=2, micro=2)}


def engines() -> Outcome:
    """Two models, each on ranks of its own."""
    ranks = next(ranks for ranks in ON_RANKS if get_rank() in ranks)
    return many_processes(ON_RANKS[ranks], RankGrid(ON_RANKS[ranks].group, ranks=ranks))


def test_two_models_train_on_ranks_of_their_own(pool: RankPool) -> None:
    outcomes = pool.run(engines, world_size=4)
    for ranks, case in ON_RANKS.items():
        one = one_process(case)
        for rank in ranks:
            assert outcomes[rank].norms == pytest.approx(one.norms, rel=1e-10)
            for name, value in outcomes[rank].weights.items():
                torch.testing.assert_close(value, one.weights[name], rtol=1e-10, atol=1e-10, msg=name)
