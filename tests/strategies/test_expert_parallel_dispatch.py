"""A layer whose experts are divided among ranks is the layer itself: results, gradients, and what is sent."""

import copy
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strategies.expert import ExpertShards
from zoo.ling.experts import Backend, Experts

E, D, WIDTH, K = 8, 8, 12, 3
CPU = torch.device("cpu")


class Layers(nn.Module):
    """Some layers of experts."""

    def __init__(self, dtype: torch.dtype, backend: Backend = "auto", num_layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts(E, D, WIDTH, backend).to(dtype) for _ in range(num_layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def expert_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


@dataclass
class Case:
    """Tokens of every rank and the experts that they visit."""

    num_tokens: tuple[int, ...]
    experts: range = range(E)
    dtype: torch.dtype = torch.float64
    backend: Backend = "auto"
    autocast: bool = False
    recompute: bool = False
    tolerance: float = 1e-12

    def tokens(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, ids and weights of a rank."""
        draw = torch.Generator().manual_seed(rank)
        N = self.num_tokens[rank]
        x_ND = torch.randn(N, D, generator=draw).to(self.dtype)
        order_NE = torch.rand(N, len(self.experts), generator=draw).argsort(1)
        weights_NK = torch.rand(N, K, generator=draw).to(torch.promote_types(self.dtype, torch.float32))
        return x_ND, order_NE[:, :K] + self.experts.start, weights_NK


@dataclass
class Pass:
    """Results and gradients of a forward and backward pass."""

    y_ND: Tensor
    x_grad: Tensor
    weights_grad: Tensor
    expert_grads: list[Tensor] = field(default_factory=list)


def forward_backward(layers: Layers, case: Case, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Pass:
    x_ND, weights_NK = x_ND.requires_grad_(), weights_NK.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        layer, given = layers.layers[0], (x_ND, ids_NK, weights_NK)
        y_ND = checkpoint(layer, *given, use_reentrant=False) if case.recompute else layer(*given)
    (y_ND.to(weights_NK.dtype) * torch.linspace(-1, 1, D, dtype=weights_NK.dtype)).square().sum().backward()
    assert x_ND.grad is not None and weights_NK.grad is not None
    grads = [p.grad for p in layers.parameters() if p.grad is not None]
    return Pass(y_ND.detach(), x_ND.grad, weights_NK.grad, grads)


def divided(case: Case) -> Pass:
    torch.manual_seed(7)
    layers = Layers(case.dtype, case.backend)
    ExpertShards(layers, dist.group.WORLD, CPU).divide()
    return forward_backward(layers, case, *case.tokens(dist.get_rank()))


CASES = {
    "even": Case((6, 6)),
    "one rank receives nothing": Case((6, 6), experts=range(4)),
    "one rank has no tokens": Case((6, 0)),
    "uneven, four ranks, two receive nothing": Case((5, 1, 9, 2), experts=range(2, 6)),
    "computed again in backward": Case((4, 7), recompute=True),
    "grouped": Case((40, 24), dtype=torch.float32, backend="grouped", tolerance=1e-5),
    "grouped, one rank receives nothing": Case((40, 24), range(4, 8), torch.float32, "grouped", tolerance=1e-5),
    "half precision": Case((40, 24), dtype=torch.bfloat16, tolerance=0.03),
    "autocast": Case((40, 24), dtype=torch.float32, autocast=True, recompute=True, tolerance=0.03),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_divided_layer_is_the_layer(pool: RankPool, case: Case) -> None:
    ranks = pool.run(divided, case, world_size=len(case.num_tokens))
    torch.manual_seed(7)
    layers = Layers(case.dtype, case.backend)
    whole = forward_backward(
        layers, case, *(torch.cat(parts) for parts in zip(*map(case.tokens, range(len(ranks))), strict=True))
    )

    def same(name: str, part: Tensor, total: Tensor) -> None:
        assert part.dtype == total.dtype, name
        torch.testing.assert_close(part, total, rtol=case.tolerance, atol=case.tolerance * float(total.abs().max()), msg=name)

    for name in ("y_ND", "x_grad", "weights_grad"):
        same(name, torch.cat([getattr(rank, name) for rank in ranks]), getattr(whole, name))
    for number, total in enumerate(whole.expert_grads):
        same(f"expert gradient {number}", torch.cat([rank.expert_grads[number] for rank in ranks]), total)


def bytes_sent(num_tokens: int) -> tuple[int, int]:
    """Bytes of tokens that leave this rank in forward and in backward, with every expert used as often."""
    layers = Layers(torch.float32)
    ExpertShards(layers, dist.group.WORLD, CPU).divide()
    rank, sent = dist.get_rank(), [0]
    original = dist.all_to_all_single

    def count(output: Tensor, given: Tensor, outputs: list[int] | None = None, inputs: list[int] | None = None, **kwargs) -> None:
        if given.is_floating_point():
            assert inputs is not None
            sent[-1] += (sum(inputs) - inputs[rank]) * given[0].numel() * given.element_size()
        original(output, given, outputs, inputs, **kwargs)

    ids_Nk = torch.arange(num_tokens * 2).view(-1, 2) % E
    with patch.object(dist, "all_to_all_single", count):
        x_ND = torch.randn(num_tokens, D, requires_grad=True)
        y_ND = layers.layers[0](x_ND, ids_Nk, torch.ones(num_tokens, 2))
        sent.append(0)
        y_ND.sum().backward()
    return sent[0], sent[1]


@pytest.mark.parametrize("size", [2, 4])
def test_traffic_is_the_closed_form(pool: RankPool, size: int) -> None:
    N, k = 16, 2
    each_way = 2 * k * N * D * 4 * (size - 1) / size
    assert pool.run(bytes_sent, N, world_size=size) == [(each_way, each_way)] * size


def own_number_of_passes(passes: list[int]) -> list[float]:
    """Each rank runs two layers as often as it likes, in its own number of tokens; the others compute for it meanwhile."""
    torch.manual_seed(7)
    layers = Layers(torch.float32, num_layers=2)
    expected = copy.deepcopy(layers)
    shards = ExpertShards(layers, dist.group.WORLD, CPU)
    shards.divide()
    assert shards.dispatcher is not None
    differences = []
    for done in (False, True):
        for number in range(passes[dist.get_rank()] + done):
            x_ND = torch.randn(number + 1, D, generator=torch.Generator().manual_seed(number))
            ids_N1 = torch.arange(number + 1)[:, None] % E
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=done):
                y_ND, z_ND = (net.layers[1](net.layers[0](x_ND, ids_N1, torch.ones(number + 1, 1)), ids_N1,
                                            torch.ones(number + 1, 1)) for net in (layers, expected))  # fmt: skip
            differences.append(float((y_ND - z_ND).abs().max()))
        shards.dispatcher.serve(done)
        dist.barrier()  # a collective of all ranks, which no rank may reach while another still needs it
    return differences


def test_ranks_that_are_ready_compute_for_the_others(pool: RankPool) -> None:
    passes = [2, 0, 3, 1]
    for count, differences in zip(passes, pool.run(own_number_of_passes, passes, world_size=4), strict=True):
        assert len(differences) == 2 * count + 1 and max(differences) < 1e-5


def mismatch(kind: str) -> str:
    layers = Layers(torch.float32, num_layers=2)
    shards = ExpertShards(layers, dist.group.WORLD, CPU)
    shards.divide()
    assert shards.dispatcher is not None
    rank = dist.get_rank()
    x_ND, ids_N1, ones_N1 = torch.randn(2, D), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    try:
        if kind == "layers":
            layers.layers[rank](x_ND, ids_N1, ones_N1)
        elif kind == "types":
            layers.layers[0](x_ND.to([torch.float32, torch.bfloat16][rank]), ids_N1, ones_N1)
        elif kind == "twice":
            ExpertShards(layers, dist.group.WORLD, CPU)
        elif rank == 0:
            shards.dispatcher.serve(done=True)
        else:
            layers.layers[0](x_ND, ids_N1, ones_N1)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("layers", "computes layer"),
        ("types", "bfloat16"),
        ("gradients", "equally many training batches"),
        ("twice", "divided already"),
    ],
)
def test_what_would_hang_or_be_wrong_is_said(pool: RankPool, kind: str, message: str) -> None:
    assert all(message in said for said in pool.run(mismatch, kind))


def copied() -> float:
    """A copy of divided layers that goes its own way, and the layers themselves; largest difference from whole ones."""
    torch.manual_seed(7)
    whole, layers = Layers(torch.float32), Layers(torch.float32)
    layers.load_state_dict(whole.state_dict())
    ExpertShards(layers, dist.group.WORLD, CPU).divide()
    other = copy.deepcopy(layers)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other_whole = copy.deepcopy(whole)
    with torch.no_grad():
        for parameter in other_whole.parameters():
            parameter.mul_(2)
    given = Case((5, 3), dtype=torch.float32).tokens(dist.get_rank())
    pairs = ((other, other_whole), (layers, whole))
    return max(float((a.layers[0](*given) - b.layers[0](*given)).abs().max()) for a, b in pairs)


def test_a_copy_has_weights_of_its_own(pool: RankPool) -> None:
    assert max(pool.run(copied)) < 1e-4


def unite(alone: bool) -> bool:
    torch.manual_seed(7 + dist.get_rank())  # ranks begin with other weights: those of rank 0 count
    layers = Layers(torch.float32)
    torch.manual_seed(7)
    first = Layers(torch.float32)
    shards = ExpertShards(layers, dist.group.WORLD, CPU)
    shards.divide()
    assert [len(p) for p in layers.parameters()] == [E // 2] * 2
    other = copy.deepcopy(layers)
    if dist.get_rank() == 0 and alone:
        copy.deepcopy(layers)  # by one rank only: copies can no more be told from one another
    shards.unite()
    if not alone:  # the copy needs no other rank any more
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), first.parameters(), strict=True))
        if dist.get_rank() == 0:
            given = torch.randn(3, D), torch.tensor([[0], [5], [7]]), torch.ones(3, 1)
            assert torch.equal(other.layers[0](*given), first.layers[0](*given))
    same = all(torch.equal(a, b) for a, b in zip(layers.parameters(), first.parameters(), strict=True))
    x_ND, ids_N1 = torch.randn(3, D), torch.tensor([[0], [5], [7]])
    return same and torch.equal(layers.layers[0](x_ND, ids_N1, torch.ones(3, 1)), first.layers[0](x_ND, ids_N1, torch.ones(3, 1)))


@pytest.mark.parametrize("alone", [False, True])
def test_united_again_the_module_is_as_before(pool: RankPool, alone: bool) -> None:
    assert pool.run(unite, alone) == [True, True]
