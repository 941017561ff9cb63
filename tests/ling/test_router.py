"""The router: its weights, its losses in their limits, and its stochastic warm-up."""

import math

import pytest
import torch
from torch import Tensor

from zoo.ling.router import Router, balance_loss, warm_up_logits, z_loss

D, E, K = 8, 6, 2


def build(num_experts: int = E, k: int = K, normalize: bool = True, accurate: bool = True) -> Router:
    torch.manual_seed(0)
    router = Router(num_experts, D, k, normalize, accurate)
    torch.nn.init.normal_(router.weight)
    return router


def tokens(count: int = 40) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1))


def test_weights_are_the_chosen_probabilities_over_their_sum() -> None:
    x_ND = tokens()
    for normalize in (True, False):
        routing = build(normalize=normalize)(x_ND)
        probs_NE = (x_ND @ build().weight.T).softmax(-1)
        torch.testing.assert_close(routing.probs_NE, probs_NE)
        chosen_Nk = probs_NE.gather(1, routing.ids_Nk)
        assert chosen_Nk.min(1).values.ge(probs_NE.scatter(1, routing.ids_Nk, 0).max(1).values).all()
        assert chosen_Nk.diff(dim=1).le(0).all()  # by falling probability
        total_N1 = chosen_Nk.sum(1, keepdim=True) if normalize else 1
        torch.testing.assert_close(routing.weights_Nk, chosen_Nk / total_N1)
    assert routing.weights_Nk.sum(1).max() < 1


def test_all_experts_chosen_have_their_probabilities_and_one_alone_is_not_normalised() -> None:
    x_ND = tokens()
    routing = build(k=E)(x_ND)
    assert routing.ids_Nk.sort(1).values.eq(torch.arange(E)).all()
    torch.testing.assert_close(routing.weights_Nk, routing.probs_NE.gather(1, routing.ids_Nk))
    single = build(k=1)(x_ND)
    assert torch.equal(single.weights_Nk[:, 0], single.probs_NE.max(1).values)
    assert single.weights_Nk.max() < 1


def test_renamed_experts_are_chosen_by_their_new_names() -> None:
    router, renamed, x_ND = build(), build(), tokens()
    names_E = torch.tensor([3, 0, 5, 1, 2, 4])
    with torch.no_grad():
        renamed.weight[names_E] = router.weight
    one, other = router(x_ND), renamed(x_ND)
    assert torch.equal(names_E[one.ids_Nk], other.ids_Nk)
    torch.testing.assert_close(one.weights_Nk, other.weights_Nk)


def test_balance_loss_is_1_when_even_and_E_when_all_go_to_one() -> None:
    ids_Nk = torch.randint(0, E, (50, K), generator=torch.Generator().manual_seed(2))
    assert balance_loss(torch.full((50, E), 1 / E), ids_Nk).item() == pytest.approx(1, rel=1e-6)  # whatever f
    one_hot = torch.zeros(50, E)
    one_hot[:, 4] = 1
    assert balance_loss(one_hot, torch.full((50, 1), 4)).item() == pytest.approx(E, rel=1e-6)
    counted = torch.tensor([0, 0, 10, 0, 0, 0])
    assert balance_loss(one_hot, ids_Nk, load_E=counted).item() == 0  # what others counted takes the place of ids


def test_balance_loss_pushes_down_what_is_overloaded() -> None:
    probs_NE = torch.full((6, E), 1 / E, requires_grad=True)
    ids_Nk = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [0, 1]])
    (gradient_NE,) = torch.autograd.grad(balance_loss(probs_NE, ids_Nk), probs_NE)
    assert gradient_NE[0].argmax() == 0  # f itself takes no gradient: what is left is E f_e / N
    torch.testing.assert_close(gradient_NE[0], E * torch.tensor([6, 2, 1, 1, 1, 1]) / 12 / 6)


def test_z_loss_of_zero_logits_and_of_a_shift() -> None:
    assert z_loss(torch.zeros(7, E)).item() == pytest.approx(math.log(E) ** 2, rel=1e-6)
    logits_NE = torch.randn(30, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids_Nk = logits_NE.topk(K).indices
    shifted = logits_NE + 2
    assert z_loss(shifted) > z_loss(logits_NE) + 1
    assert balance_loss(shifted.softmax(-1), ids_Nk).item() == pytest.approx(balance_loss(logits_NE.softmax(-1), ids_Nk).item())


def test_padding_changes_no_loss() -> None:
    routing = build()(tokens())
    valid_N = torch.arange(40) < 25
    alone = build()(tokens()[:25])
    ours = [balance_loss(routing.probs_NE, routing.ids_Nk, valid_N), z_loss(routing.logits_NE, valid_N)]
    theirs = [balance_loss(alone.probs_NE, alone.ids_Nk), z_loss(alone.logits_NE)]
    torch.testing.assert_close(ours, theirs)
    nothing = torch.zeros(40, dtype=torch.bool)
    assert balance_loss(routing.probs_NE, routing.ids_Nk, nothing) == z_loss(routing.logits_NE, nothing) == 0


def test_noise_alone_loads_experts_evenly_and_knows_no_weight() -> None:
    num_tokens = 100_000
    router = build()
    router.update(torch.tensor(0.3), torch.tensor(1.7), 0.9, first=True)
    noise_NE = torch.randn(num_tokens, E, generator=torch.Generator().manual_seed(4))
    x_ND = torch.zeros(num_tokens, D) + tokens(1)
    routing = router(x_ND, noise_NE, share=0.0)
    count_E = torch.bincount(routing.ids_Nk.flatten(), minlength=E).double()
    expected = num_tokens * K / E
    # Counts of k of E without replacement vary less than those of independent draws, by (1 - k/E).
    chi_square = ((count_E - expected).square().sum() / (expected * (1 - K / E)) * (E - 1) / E).item()
    assert 0.1 < chi_square < 20.5  # 99.9 % of a chi-square of 5 degrees lie below 20.5
    with torch.no_grad():
        router.weight.mul_(-3)
    other = router(x_ND, noise_NE, share=0.0)
    assert torch.equal(other.ids_Nk, routing.ids_Nk) and torch.equal(other.weights_Nk, routing.weights_Nk)
    assert torch.equal(routing.probs_NE, (0.3 + 1.7 * noise_NE).softmax(-1))
    learned_E = torch.bincount(router(x_ND).ids_Nk.flatten(), minlength=E)
    assert learned_E.eq(0).sum() == E - K  # equal tokens, no noise


def test_warm_up_ends_where_the_learned_scores_begin_and_keeps_raw_scores() -> None:
    router, x_ND = build(), tokens()
    noise_NE = torch.randn(40, E, generator=torch.Generator().manual_seed(5))
    plain, whole, half = router(x_ND), router(x_ND, noise_NE, share=1.0), router(x_ND, noise_NE, share=0.5)
    for one, other in zip(plain, whole, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(half.logits_NE, plain.logits_NE)  # what the z-loss is of
    assert not torch.equal(half.probs_NE, plain.probs_NE)
    state = torch.get_rng_state()
    router(x_ND)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_has_the_mean_and_deviation_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = 2 + 3 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for share, std in ((0.0, 3.0), (1.0, 3.0), (0.5, 3 / math.sqrt(2))):
        mixed = warm_up_logits(logits, noise, share, torch.tensor(2.0), torch.tensor(3.0))
        assert mixed.mean().item() == pytest.approx(2, abs=0.03)
        assert mixed.std().item() == pytest.approx(std, rel=0.01)


def test_running_statistics_change_in_update_alone() -> None:
    router = build()
    router(tokens(), torch.zeros(40, E), share=0.5)
    assert (router.running_mean.item(), router.running_std.item()) == (0, 1)
    router.update(torch.tensor(2.0), torch.tensor(4.0), 0.75, first=True)
    router.update(torch.tensor(4.0), torch.tensor(8.0), 0.75, first=False)
    assert (router.running_mean.item(), router.running_std.item()) == (2.5, 5)
    other = build()
    other.load_state_dict(router.state_dict())
    assert other.running_mean.item() == 2.5


def test_running_statistics_stay_accurate_in_half_precision() -> None:
    router = build().bfloat16()
    for step in range(500):  # by a hundredth of 0.1, which bfloat16 would round away
        router.update(torch.tensor(1.1 if step else 1.0), torch.tensor(1.5), 0.99, first=step == 0)
    assert router.running_mean.dtype == router.running_std.dtype == torch.float32 and router.weight.dtype == torch.bfloat16
    assert router.running_mean.item() == pytest.approx(1.1, abs=1e-3)
    assert build().double().running_mean.dtype == torch.float64


def test_scores_are_accurate_under_autocast_and_in_half_precision() -> None:
    router, x_ND = build(), tokens()
    exact = router(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(router(x_ND), exact, strict=True):
            assert torch.equal(one, other)
    half = router.bfloat16()
    accurate = half(x_ND.bfloat16())
    expected = x_ND.bfloat16().float() @ half.weight.float().T
    assert accurate.logits_NE.dtype == torch.float32
    torch.testing.assert_close(accurate.logits_NE, expected)
    published = build(accurate=False).bfloat16()(x_ND.bfloat16())
    assert published.logits_NE.dtype == published.weights_Nk.dtype == torch.float32
    assert torch.equal(published.logits_NE, published.logits_NE.bfloat16().float())  # rounded, as published
    assert not torch.equal(accurate.logits_NE, accurate.logits_NE.bfloat16().float())
