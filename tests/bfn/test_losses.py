"""Losses of continuous data with the delta head: closed forms, limits and equivalences (float64)."""

import math

import pytest
import torch

from zoo.bfn.bins import bin_centre
from zoo.bfn.continuous_flow import ContinuousFlow
from zoo.bfn.heads import Delta, DeltaHead
from zoo.bfn.losses import bits, continuous_time_loss, discrete_time_loss, predict_from_data, reconstruction_loss

FLOW = ContinuousFlow(1e-3)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def delta(value):
    return Delta(value, clip=1.0, num_bins=16, std=0.7 * math.sqrt(1e-3))


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_constant_estimate_costs_the_same_for_any_number_of_messages(n):
    """Both losses are ½ beta(1) (x - x̂)^2 then: all messages together have the accuracy beta(1)."""
    x, estimate = normal(5, 3, seed=1).tanh(), torch.full((5, 3), 0.3, dtype=torch.float64)
    expected = FLOW.beta(1.0) * (x - estimate).square().mean(1) / 2
    discrete = sum(discrete_time_loss(FLOW, delta(estimate), x, torch.full((5,), i), n) for i in range(1, n + 1)) / n
    assert torch.allclose(discrete, expected, rtol=1e-10)
    nodes, weights = legendre(60)
    continuous = sum(w * continuous_time_loss(FLOW, delta(estimate), x, t.expand(5)) for t, w in zip(nodes, weights, strict=True))
    assert torch.allclose(continuous, expected, rtol=1e-10)


def legendre(n):
    """Gauss's nodes and weights on [0, 1], by the eigenvalues of Jacobi's matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (values + 1) / 2, vectors[0].square()


def test_discrete_loss_tends_to_the_continuous_one():
    t, x, estimate = torch.tensor([0.25, 0.75], dtype=torch.float64), normal(2, 4).tanh(), normal(2, 4, seed=1).tanh()
    limit = continuous_time_loss(FLOW, delta(estimate), x, t)
    errors = []
    for n in (100, 200, 400):
        loss = discrete_time_loss(FLOW, delta(estimate), x, (t * n).long() + 1, n)
        errors.append((loss / limit - 1).abs().max().item())
    assert errors[2] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


def test_loss_is_a_weighted_error_of_the_noise():
    """-½ ln(s^2) (eps - network)^2 / gamma where nothing is clipped: denoising score matching."""
    x, z, t = normal(6, 4).tanh(), normal(6, 4, seed=1), torch.linspace(0.05, 1, 6, dtype=torch.float64)
    guess = normal(6, 4, seed=2)
    head = DeltaHead(clip=1e9)
    prediction = predict_from_data(lambda mu, times: guess[..., None], FLOW, head, x, t, z)
    gamma = 1 - 1e-3**t
    expected = -math.log(1e-3) / 2 * ((z - guess).square() / gamma[:, None]).mean(1)
    assert torch.allclose(continuous_time_loss(FLOW, prediction, x, t), expected, rtol=1e-9)


def test_true_noise_costs_nothing_and_unknown_time_costs_the_prior():
    x, z = normal(3, 4).tanh(), normal(3, 4, seed=1)
    t = torch.tensor([0.3, 0.9, 0.0], dtype=torch.float64)
    prediction = predict_from_data(lambda mu, times: z[..., None], FLOW, DeltaHead(), x, t, z)
    loss = continuous_time_loss(FLOW, prediction, x, t)
    assert loss[:2].abs().max() < 1e-20
    # At t = 0 the estimate is 0, whatever the network says.
    assert loss[2] == pytest.approx(-math.log(1e-3) / 2 * x[2].square().mean().item())


def test_clipping_stops_the_gradient_and_can_be_switched_off():
    x = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    t = torch.tensor([0.5], dtype=torch.float64)
    for clip, moves in ((True, [False, True]), (False, [True, True])):
        estimate = torch.tensor([[1.5, 0.5]], dtype=torch.float64, requires_grad=True)
        continuous_time_loss(FLOW, delta(estimate), x, t, clip=clip).sum().backward()
        assert estimate.grad.ne(0)[0].tolist() == moves


def test_reconstruction_is_the_probability_of_the_bins():
    """Two bins: the probability of the upper one is Phi(x̂ / std), whatever lies outside [-1, 1]."""
    value = torch.tensor([[0.01, -0.02]], dtype=torch.float64)
    prediction = Delta(value, clip=1.0, num_bins=2, std=0.05)
    x = bin_centre(torch.tensor([[1, 1]]), 2, torch.float64)
    expected = -torch.special.ndtr(value / 0.05).log().mean()
    assert reconstruction_loss(prediction, x).item() == pytest.approx(expected.item(), rel=1e-12)


def test_perfect_prediction_reconstructs_16_levels_at_almost_no_cost():
    x = bin_centre(torch.arange(16)[None], 16, torch.float64)
    loss = reconstruction_loss(delta(x), x)
    inside = math.log(math.erf(1 / 16 / (0.7 * math.sqrt(1e-3)) / math.sqrt(2)))
    half = math.log((1 + math.erf(1 / 16 / (0.7 * math.sqrt(1e-3)) / math.sqrt(2))) / 2)
    assert loss.item() == pytest.approx(-(14 * inside + 2 * half) / 16, rel=1e-9)
    assert bits(loss).item() == pytest.approx(loss.item() / math.log(2))


def test_half_precision_outputs_are_scored_in_float32():
    x, z, t = normal(2, 3).tanh().float(), normal(2, 3, seed=1).float(), torch.tensor([0.4, 0.8])
    prediction = predict_from_data(lambda mu, times: z[..., None].bfloat16(), FLOW, DeltaHead(), x, t, z)
    assert continuous_time_loss(FLOW, prediction, x, t).dtype == prediction.mean().dtype == torch.float32


def test_bad_heads_are_refused():
    with pytest.raises(ValueError, match="num_bins=1"):
        DeltaHead(num_bins=1)
    with pytest.raises(ValueError, match="clip=0"):
        DeltaHead(clip=0)
