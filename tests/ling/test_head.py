"""NormHead: identities of the column norm and its gradient; the chunked cross-entropy is the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ling import Engine, LingConfig, LingForCausalLM
from zoo.ling import head as module
from zoo.ling.decode_step import CPUStep
from zoo.ling.head import Head, normalized_weight
from zoo.lm.cross_entropy import IGNORED, cross_entropy

V, D, N = 11, 6, 13
SMALL = LingConfig(
    vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, initializer_range=0.1, pad_token_id=None,
    eos_token_id=None,
)  # fmt: skip


def build(normalize: bool = True) -> Head:
    torch.manual_seed(0)
    head = Head(V, D, normalize).double()
    torch.nn.init.normal_(head.weight)
    return head


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    label_N = torch.randint(0, V, (N,), generator=generator)
    label_N[[0, 4, 12]] = IGNORED
    return torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_(), label_N


def test_scaling_a_column_changes_no_logit() -> None:
    head, (x_ND, _) = build(), inputs()
    logits = head(x_ND)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([0.01, 0.5, 1.0, 2.0, 30.0, 7.0], dtype=torch.float64))
    torch.testing.assert_close(head(x_ND), logits, rtol=1e-4, atol=1e-5)  # not exact: 1e-7 is added to the norm
    plain = build(normalize=False)
    assert (plain(x_ND) - logits).abs().max() > 0.1


def test_norm_is_over_the_vocabulary_and_epsilon_is_added() -> None:
    weight_VD = build().weight.detach()
    expected = torch.stack([column / (column.square().sum().sqrt() + 1e-7) for column in weight_VD.T], dim=1)
    torch.testing.assert_close(normalized_weight(weight_VD), expected, rtol=1e-14, atol=0)
    assert normalized_weight(torch.zeros(V, D)).eq(0).all()  # no division by zero


def test_gradient_is_that_of_the_plain_head_over_the_norm_radial_part_included() -> None:
    head, (x_ND, label_N) = build(), inputs()
    norm_D = head.weight.detach().norm(dim=0) + 1e-7
    plain = (head.weight.detach() / norm_D).requires_grad_()
    F.cross_entropy(x_ND @ plain.T, label_N).backward()
    F.cross_entropy(head(x_ND), label_N).backward()
    assert head.weight.grad is not None and plain.grad is not None
    torch.testing.assert_close(head.weight.grad, plain.grad / norm_D, rtol=1e-12, atol=1e-15)
    radial_D = (head.weight.grad * head.weight.detach()).sum(0)
    assert radial_D.abs().min() > 1e-4  # the gradient of the whole quotient would be orthogonal to each column


def test_evaluation_gives_the_same_logits_and_touches_no_weight() -> None:
    head, (x_ND, label_N) = build(), inputs()
    before = head.weight.detach().clone()
    trained = head.train()(x_ND)
    with torch.no_grad():
        assert torch.equal(head.eval()(x_ND), trained)
    with torch.inference_mode():
        assert torch.equal(head(x_ND), trained)
    assert torch.equal(head.weight, before)
    losses = []
    for between in (False, True):
        fresh = build()
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.5)
        for _ in range(3):
            loss = F.cross_entropy(fresh.train()(x_ND.detach()), label_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if between:
                with torch.no_grad():
                    fresh.eval()(x_ND)
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_the_weight_is_kept_inside_a_generation_only_and_by_it() -> None:
    head, (x_ND, _) = build(), inputs()
    first: list[Tensor] = []
    with torch.inference_mode():
        with head.keep(first):
            logits = head(x_ND)
            assert head.effective_weight() is head.effective_weight() is first[0]
        assert head.effective_weight() is not head.effective_weight()
        head.weight.data.normal_()
        with head.keep([]):
            assert torch.equal(head(x_ND), x_ND @ normalized_weight(head.weight).T)
        with head.keep(first):  # the generation that began before goes on as it began
            assert torch.equal(head(x_ND), logits)


@pytest.mark.parametrize("plain", [True, False], ids=["cpu step", "modules"])
def test_generation_normalises_once_and_every_one_anew(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = LingForCausalLM(SMALL).eval()
    calls = []
    monkeypatch.setattr(module, "normalized_weight", lambda weight: calls.append(1) or normalized_weight(weight))
    monkeypatch.setattr(CPUStep, "supports", lambda *_: plain)
    network.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5)
    assert len(calls) == 1
    network.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5)
    assert len(calls) == 2
    engine = Engine(network, max_tokens=64)
    for _ in range(2):
        for length in (3, 4, 5):
            engine.submit(list(range(1, length)), max_new_tokens=length)
        assert len(list(engine.run())) == 3
    assert len(calls) == 4


@pytest.mark.parametrize("between", [False, True], ids=["step", "evaluation before the step"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_fused_optimizer_is_followed_although_it_counts_no_version(between: bool, compiled: bool) -> None:
    head, (x_ND, label_N) = build().float(), inputs()
    x_ND = x_ND.detach().float()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.5, fused=True)
    train = torch.compile(head, backend="eager") if compiled else head
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(head(x_ND), F.linear(x_ND, normalized_weight(head.weight)))
        F.cross_entropy(train(x_ND), label_N).backward()
        if between:
            with torch.no_grad():
                head(x_ND)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(head(x_ND), F.linear(x_ND, normalized_weight(head.weight)))


def test_evaluation_follows_every_change_of_the_weight() -> None:
    head, (x_ND, _) = build(), inputs()

    def evaluated() -> Tensor:
        with torch.no_grad():
            return head(x_ND)

    def trained() -> Tensor:
        return head(x_ND).detach()

    evaluated()
    with torch.no_grad():
        head.weight[0] += 1
    assert torch.equal(evaluated(), trained())
    head.load_state_dict({"weight": torch.randn(V, D, dtype=torch.float64)})
    assert torch.equal(evaluated(), trained())
    head.weight = torch.nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    assert torch.equal(evaluated(), trained())
    head.float()
    with torch.no_grad():
        assert torch.equal(head(x_ND.float()), F.linear(x_ND.float(), normalized_weight(head.weight)))
    with torch.no_grad():
        head.weight.data.copy_(torch.randn(V, D))  # as averages of a target network are
        assert torch.equal(head(x_ND.float()), F.linear(x_ND.float(), normalized_weight(head.weight)))
    assert head.state_dict().keys() == {"weight"}


def test_a_head_made_in_inference_mode_follows_its_weight_too() -> None:
    with torch.inference_mode():
        head, x_ND = build(), inputs()[0]
        for _ in range(2):
            assert torch.equal(head(x_ND), x_ND @ normalized_weight(head.weight).T)
            head.weight[0] += 1


@pytest.mark.parametrize("chunk", [1, 4, 5, N, 100])
def test_chunks_give_the_plain_loss_and_gradients(chunk: int) -> None:
    head, (x_ND, label_N) = build(), inputs()
    plain, each_N = cross_entropy(x_ND, head.effective_weight(), label_N)
    assert plain.item() == pytest.approx(F.cross_entropy(head(x_ND), label_N, ignore_index=IGNORED).item(), rel=1e-14)
    expected = torch.autograd.grad(3 * plain, [x_ND, head.weight])
    mean, chunked_N = cross_entropy(x_ND, head.effective_weight(), label_N, chunk)
    found = torch.autograd.grad(3 * mean, [x_ND, head.weight])
    torch.testing.assert_close(mean, plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(chunked_N, each_N, rtol=1e-12, atol=1e-15)
    assert chunked_N[label_N == IGNORED].eq(0).all() and chunked_N.sum() > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_chunked_gradient_by_differences() -> None:
    x_ND, label_N = inputs()
    weight_VD = normalized_weight(build().weight.detach()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: cross_entropy(x, weight, label_N, 5)[0], (x_ND, weight_VD))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunked_gradients_in_half_precision_are_as_near_as_the_plain_ones(dtype: torch.dtype) -> None:
    """With a vocabulary and a batch whose probabilities over the number of labels float16 cannot tell from zero."""
    generator = torch.Generator().manual_seed(0)
    x_ND, weight_VD = torch.randn(1024, 16, generator=generator), torch.randn(4096, 16, generator=generator)
    label_N = torch.randint(0, 4096, (1024,), generator=generator)
    label_N[:900] = 7  # its row is the sum over many tokens
    x_ND[:900, 0] = 100.0

    def gradients(chunk: int, autocast: bool, scale: float) -> list[Tensor]:
        x, weight = x_ND.clone().requires_grad_(), normalized_weight(weight_VD).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            mean = cross_entropy(x, weight, label_N, chunk)[0]
        return [gradient / scale for gradient in torch.autograd.grad(mean * scale, [x, weight])]

    def error(found: list[Tensor]) -> list[float]:
        return [((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]

    exact = gradients(0, False, 1.0)
    for scale in (1.0, 2.0**8):
        chunked, plain = (error(gradients(chunk, True, scale)) for chunk in (256, 0))
        assert max(chunked) < 1e-2
        assert scale == 1 or all(one < 1.5 * other + 1e-4 for one, other in zip(chunked, plain, strict=True))


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_label_below_zero_is_no_class(chunk: int) -> None:
    head, (x_ND, label_N) = build(), inputs()
    label_N[3] = -1
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(x_ND, head.effective_weight(), label_N, chunk)


@pytest.mark.parametrize("chunk", [0, 4])
def test_no_label_that_counts_is_a_loss_of_zero(chunk: int) -> None:
    head, (x_ND, label_N) = build(), inputs()
    mean, each_N = cross_entropy(x_ND, head.effective_weight(), torch.full_like(label_N, IGNORED), chunk)
    assert mean.item() == 0 and each_N.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(mean, [x_ND, head.weight]))


@pytest.mark.parametrize("chunk", [0, 4])
def test_frozen_head_gives_inputs_their_gradient_only(chunk: int) -> None:
    head, (x_ND, label_N) = build(), inputs()
    expected = torch.autograd.grad(cross_entropy(x_ND, head.effective_weight(), label_N)[0], [x_ND])[0]
    head.weight.requires_grad_(False)
    cross_entropy(x_ND, head.effective_weight(), label_N, chunk)[0].backward()
    torch.testing.assert_close(x_ND.grad, expected, rtol=1e-11, atol=1e-14)
    assert head.weight.grad is None


@pytest.mark.parametrize("chunk", [0, 4])
def test_half_precision_keeps_loss_and_logits_in_float32(chunk: int) -> None:
    head, (x_ND, label_N) = build().float(), inputs()
    exact = cross_entropy(x_ND, head.effective_weight().double(), label_N)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mean, each_N = cross_entropy(x_ND.float(), head.effective_weight(), label_N, chunk)
    assert mean.dtype == each_N.dtype == torch.float32
    assert mean.item() == pytest.approx(exact.item(), rel=2e-2)
    mean.backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32
    assert head.bfloat16()(x_ND.bfloat16()).dtype == torch.float32
