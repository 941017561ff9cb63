"""Routed experts: every backend is the dense weighted sum, with its gradients, whatever the routing, and the same each time."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sweep import sweep
from torch import Tensor

from zoo.ling import experts as module
from zoo.ling.experts import Backend, Experts, choose_backend
from zoo.nn.sorted_rows import sort_by_expert

BACKENDS: list[Backend] = ["grouped", "loop", "batched", "auto"]
D, WIDTH, E, K = 16, 8, 6, 3


def build(backend: Backend = "auto", dtype: torch.dtype = torch.float32, width: int = WIDTH, hidden: int = D) -> Experts:
    torch.manual_seed(0)
    experts = Experts(E, hidden, width, backend).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def routed(num_tokens: int, dtype: torch.dtype = torch.float32, hidden: int = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    probs_NE = torch.rand(num_tokens, E, generator=generator).to(torch.promote_types(dtype, torch.float32))
    weights_Nk, ids_Nk = probs_NE.topk(K, dim=-1)
    return x_ND.requires_grad_(), ids_Nk, weights_Nk.requires_grad_()


def dense(experts: Experts, x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """Every expert sees every token; those not chosen have weight zero."""
    weights_NE = torch.zeros(len(x_ND), experts.num_experts, dtype=weights_Nk.dtype).scatter_add(1, ids_Nk, weights_Nk)
    gate, up = torch.einsum("nd,ejd->nej", x_ND, experts.gate_up_proj).chunk(2, dim=-1)
    y_NED = torch.einsum("nei,edi->ned", F.silu(gate) * up, experts.down_proj)
    return (y_NED * weights_NE[..., None].to(y_NED.dtype)).sum(1)


def with_gradients(function: Callable[..., Tensor], experts: Experts, *routing: Tensor) -> list[Tensor]:
    x_ND, ids_Nk, weights_Nk = routing
    y_ND = function(x_ND, ids_Nk, weights_Nk)
    seed = torch.randn(y_ND.shape, generator=torch.Generator().manual_seed(2)).to(y_ND.dtype)
    return [y_ND, *torch.autograd.grad(y_ND, [x_ND, weights_Nk, *experts.parameters()], seed)]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_backends_are_the_dense_sum_with_its_gradients(
    backend: Backend, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocked:  # a few rows a block
        monkeypatch.setattr(module, "_LARGE_BYTES", 0)
        monkeypatch.setattr(module, "_BLOCK_BYTES", 2048)
    for num_tokens in (1, 40):
        experts, routing = build(backend), routed(num_tokens)
        expected = with_gradients(partial(dense, experts), experts, *routing)
        close(with_gradients(experts, experts, *routing), expected, 1e-5)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_tokens_and_all_tokens_at_one(backend: Backend, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocked:
        monkeypatch.setattr(module, "_LARGE_BYTES", 0)
        monkeypatch.setattr(module, "_BLOCK_BYTES", 2048)
    experts, (x_ND, ids_Nk, weights_Nk) = build(backend), routed(30)
    for ids in (torch.full_like(ids_Nk[:, :1], 2), ids_Nk[:, :1] % 2 * 5, torch.tensor([[1, 4]]).expand(30, 2)):
        weights = weights_Nk.detach()[:, : ids.shape[1]].clone().requires_grad_()
        expected = with_gradients(partial(dense, experts), experts, x_ND, ids, weights)
        found = with_gradients(experts, experts, x_ND, ids, weights)
        close(found, expected, 1e-5)
        idle = sorted(set(range(E)) - set(ids.flatten().tolist()))
        assert not found[3][idle].any() and not found[4][idle].any()
        assert found[3][ids[0, 0]].any()


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_experts_are_exactly_one_in_half_precision(
    backend: Backend, dtype: torch.dtype, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights sum to 1 in float32; rounded to the type of the tokens they would not."""
    monkeypatch.setattr(module, "_LARGE_BYTES", 0 if blocked else 1 << 30)
    experts, (x_ND, ids_Nk, weights_Nk) = build(backend, dtype), routed(200, dtype)
    for parameter in experts.parameters():
        parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    gate, up = F.linear(x_ND, experts.gate_up_proj[0]).chunk(2, dim=-1)
    one = F.linear(F.silu(gate) * up, experts.down_proj[0])
    found = experts(x_ND, ids_Nk, weights_Nk / weights_Nk.sum(-1, keepdim=True))
    assert (found == one).float().mean() > 0.999  # a tie in the last place may fall to the other side


@pytest.mark.parametrize("blocked", [False, True])
def test_errors_in_half_precision_are_those_of_the_loop(blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE_BYTES", 0 if blocked else 1 << 30)
    routing = routed(400, torch.bfloat16)
    seed = torch.randn(400, D, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = build("loop", torch.bfloat16).double()

    def run(experts: Experts, *routing: Tensor) -> list[Tensor]:
        y_ND = experts(*routing)
        inputs = [routing[0], routing[2], *experts.parameters()]
        return [y_ND, *torch.autograd.grad(y_ND, inputs, seed.to(y_ND.dtype))]

    x_ND, ids_Nk, weights_Nk = routing
    expected = run(exact, x_ND.detach().double().requires_grad_(), ids_Nk, weights_Nk.detach().double().requires_grad_())

    def errors(chosen: Backend) -> list[float]:
        found = run(build(chosen, torch.bfloat16), *routing)
        return [((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)]

    grouped, loop = errors("grouped"), errors("loop")
    assert grouped[0] < 1.01 * loop[0]
    assert all(ours < 1.25 * theirs for ours, theirs in zip(grouped[1:], loop[1:], strict=True))  # of 0.4 % each


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_at_all(backend: Backend) -> None:
    experts, (x_ND, ids_Nk, weights_Nk) = build(backend), routed(0)
    y_ND = experts(x_ND, ids_Nk, weights_Nk)
    assert y_ND.shape == (0, D)
    for gradient in torch.autograd.grad(y_ND.sum(), [x_ND, weights_Nk, *experts.parameters()]):
        assert not gradient.any()


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_layout(backend: Backend, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE_BYTES", 0 if blocked else 1 << 30)
    experts, (x_ND, ids_Nk, weights_Nk) = build(backend), routed(12)
    inputs = [x_ND, weights_Nk, *experts.parameters()]
    seed = torch.randn(D, 12, generator=torch.Generator().manual_seed(5))
    for layout in (seed.T, seed[:1, :1].expand(12, D)):
        found, expected = (
            torch.autograd.grad(experts(x_ND, ids_Nk, weights_Nk), inputs, gradient) for gradient in (layout, layout.contiguous())
        )
        close(list(found), list(expected), 1e-6)


@pytest.mark.parametrize("function", sweep(["_Blocked", "loop"]))
def test_gradients_in_float64_and_odd_sizes(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = build("auto" if function == "loop" else "grouped", torch.float64, width=3 if function == "loop" else 4, hidden=8)
    monkeypatch.setattr(module, "_LARGE_BYTES", 0)
    x_ND, ids_Nk, weights_Nk = routed(5, torch.float64, hidden=8)
    parameters = dict(experts.named_parameters())

    def call(x_ND: Tensor, weights_Nk: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(experts, dict(zip(parameters, tensors, strict=True)), (x_ND, ids_Nk, weights_Nk))

    assert torch.autograd.gradcheck(call, (x_ND, weights_Nk, *parameters.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_experts_are_that_expert_and_their_names_do_not_matter(backend: Backend) -> None:
    experts, (x_ND, ids_Nk, weights_Nk) = build(backend), routed(20)
    weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
    names_E = torch.randperm(E, generator=torch.Generator().manual_seed(3))
    renamed = build(backend)
    with torch.no_grad():
        for one, other in zip(renamed.parameters(), experts.parameters(), strict=True):
            one[names_E] = other
    close([renamed(x_ND, names_E[ids_Nk], weights_Nk)], [experts(x_ND, ids_Nk, weights_Nk)], 1e-6)
    order_N = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    permuted = experts(x_ND[order_N], ids_Nk[order_N], weights_Nk[order_N])
    close([permuted], [experts(x_ND, ids_Nk, weights_Nk)[order_N]], 1e-6)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    gate, up = (x_ND @ experts.gate_up_proj[0].T).chunk(2, dim=-1)
    close([experts(x_ND, ids_Nk, weights_Nk)], [(F.silu(gate) * up) @ experts.down_proj[0].T], 1e-5)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_mixed_types_and_stays_near_float32(
    backend: Backend, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGE_BYTES", 0 if blocked else 1 << 30)
    experts, (x_ND, ids_Nk, weights_Nk) = build(backend), routed(24)
    exact = with_gradients(experts, experts, x_ND, ids_Nk, weights_Nk)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (x_ND, x_ND.detach().bfloat16().requires_grad_()):
            y_ND = experts(x, ids_Nk, weights_Nk)
            assert y_ND.dtype == torch.bfloat16
            gradients = torch.autograd.grad(y_ND.float().square().sum(), [x, weights_Nk, *experts.parameters()])
            assert [gradient.dtype for gradient in gradients] == [x.dtype, *[torch.float32] * 3]
            assert (y_ND - exact[0]).abs().max() < 0.03 * exact[0].abs().max()
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_rows_that_grouped_products_leave_undefined_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.utils.deterministic.fill_uninitialized_memory  # with NaN, where algorithms are deterministic
    for large in (0, 1 << 30):
        monkeypatch.setattr(module, "_LARGE_BYTES", large)
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1024)
        experts, (x_ND, ids_Nk, weights_Nk) = build("grouped"), routed(30)
        ids_Nk = ids_Nk.clamp(max=3)  # two experts are idle
        torch.use_deterministic_algorithms(True)
        try:
            found = with_gradients(experts, experts, x_ND, ids_Nk, weights_Nk)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("blocked", [False, True])
def test_the_same_bits_each_time_with_two_threads(blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE_BYTES", 0 if blocked else 1 << 30)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        experts, routing = build("grouped", width=32, hidden=64), routed(700, hidden=64)
        first = with_gradients(experts, experts, *routing)
        for _ in range(3):
            assert all(map(torch.equal, first, with_gradients(experts, experts, *routing)))
    finally:
        torch.set_num_threads(threads)


def test_blocks_cover_every_expert_and_row_once() -> None:
    for counts in ([0, 0, 0], [5], [3, 4, 9, 0, 1], [0, 2, 2, 2, 2, 0]):
        for most in (1, 4, 100):
            blocks = module._blocks(counts, most)
            assert (blocks[0][0], blocks[-1][1], blocks[0][2], blocks[-1][3]) == (0, len(counts), 0, sum(counts))
            assert all((one[1], one[3]) == (other[0], other[2]) for one, other in pairwise(blocks))
            for first, last, start, stop in blocks:
                assert stop - start == sum(counts[first:last])
                assert stop - start <= most or sum(count > 0 for count in counts[first:last]) == 1


def test_assignments_are_sorted_by_expert_then_token() -> None:
    for num_experts in (6, 300):
        ids_Nk = torch.randint(0, num_experts, (50, 3), generator=torch.Generator().manual_seed(0))
        order_M, inverse_M, offset_E = sort_by_expert(ids_Nk, num_experts)
        key_M = ids_Nk.flatten() * 150 + torch.arange(150)
        assert torch.equal(order_M, key_M.argsort())
        assert torch.equal(order_M[inverse_M], torch.arange(150))
        assert torch.equal(offset_E, torch.bincount(ids_Nk.flatten(), minlength=num_experts).cumsum(0).int())


def test_compiled_graph_is_whole_and_gives_the_same() -> None:
    experts, routing = build("grouped"), routed(40)
    expected = with_gradients(experts, experts, *routing)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    close(with_gradients(compiled, experts, *routing), expected, 1e-5)


def test_what_auto_takes() -> None:
    assert choose_backend(1000, 64, 32, torch.float32) == "grouped"
    assert choose_backend(8, 64, 32, torch.float32) == "batched"
    assert choose_backend(8, 64, 32, torch.float32, "cpu") == "grouped"
    assert choose_backend(1000, 64, 30, torch.float32) == "loop"
    assert choose_backend(1000, 64, 36, torch.bfloat16) == "loop"  # 72 bytes
    assert choose_backend(1000, 64, 32, torch.float64) == "loop"


def test_wrong_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="experts='fast' must be one of auto, grouped, loop, batched"):
        Experts(4, 8, 8, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="moe_intermediate_size=6 to be multiples of 4"):
        Experts(4, 8, 6, "grouped")
    for dtype in (torch.float64, torch.bfloat16):  # in bfloat16 12 numbers are 24 bytes
        experts, routing = build("grouped", dtype, width=12, hidden=12), routed(5, dtype, hidden=12)
        with pytest.raises(ValueError, match=f"not {dtype} with hidden_size=12 and moe_intermediate_size=12"):
            experts(*routing)
