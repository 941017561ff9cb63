"""The flows: accuracies, updates, limits and exact numbers (float64)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.bfn.bins import bin_centre, bin_index, bin_log_prob
from zoo.bfn.continuous_flow import ContinuousFlow, data_to_noise, noise_to_data
from zoo.bfn.discrete_flow import DiscreteFlow

VARIANCES = [1e-6, 1e-3, 0.3]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("min_variance", VARIANCES)
@pytest.mark.parametrize("n", [1, 7, 50])
def test_accuracies_of_all_messages_add_up_to_the_final_accuracy(min_variance, n):
    flow = ContinuousFlow(min_variance)
    total = math.fsum(flow.alpha(i, n) for i in range(1, n + 1))
    assert total == pytest.approx(1 / min_variance - 1, rel=1e-12)
    closed = [min_variance ** (-i / n) * (1 - min_variance ** (1 / n)) for i in range(1, n + 1)]
    assert [flow.alpha(i, n) for i in range(1, n + 1)] == pytest.approx(closed, rel=1e-9)


def test_two_messages_are_worth_one_of_their_summed_accuracy():
    flow, state, x, beta = ContinuousFlow(1e-3), normal(9), normal(9, seed=1), 1.7
    y1, y2 = flow.sender(x, 0.5, normal(9, seed=2)), flow.sender(x, 3.0, normal(9, seed=3))
    twice = flow.update(flow.update(state, y1, 0.5, beta), y2, 3.0, beta + 0.5)
    once = flow.update(state, (0.5 * y1 + 3.0 * y2) / 3.5, 3.5, beta)
    assert torch.allclose(twice, once, rtol=1e-13, atol=0)


@pytest.mark.parametrize("min_variance", VARIANCES)
def test_updates_from_the_prior_follow_the_flow_distribution(min_variance):
    """n updates equal one draw of the flow at t = 1 whose noise is the messages' noise, weighted by accuracy."""
    flow, n, x = ContinuousFlow(min_variance), 13, normal(4, 5).tanh()
    state, noise = flow.prior((4, 5), dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    assert state.eq(0).all()
    for i in range(1, n + 1):
        z, alpha = normal(4, 5, seed=i), flow.alpha(i, n)
        state = flow.update(state, flow.sender(x, alpha, z), alpha, flow.beta((i - 1) / n))
        noise += math.sqrt(alpha) * z
    aggregated = noise / math.sqrt(flow.beta(1.0))
    assert torch.allclose(state, flow.sample(x, torch.ones(4, dtype=torch.float64), aggregated), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(t=st.floats(0.0, 1.0), min_variance=st.sampled_from(VARIANCES))
def test_flow_is_the_scaled_sum_of_messages(t, min_variance):
    flow, x, z = ContinuousFlow(min_variance), normal(3, 2).tanh(), normal(3, 2, seed=1)
    mean, std = flow.scale(t) * flow.beta(t), flow.scale(t) * math.sqrt(flow.beta(t))
    gamma = -math.expm1(math.log(min_variance) * t)
    assert (mean, std) == pytest.approx((gamma, math.sqrt(gamma * (1 - gamma))), abs=1e-12)
    state = flow.sample(x, torch.full((3,), t, dtype=torch.float64), z)
    assert torch.allclose(state, mean * x + std * z, atol=1e-12)
    assert flow.time(flow.beta(t)) == pytest.approx(t, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(t=st.floats(0.01, 0.99), min_variance=st.sampled_from(VARIANCES))
def test_rates_are_derivatives(t, min_variance):
    flow, h = ContinuousFlow(min_variance), 1e-6
    assert (flow.beta(t + h) - flow.beta(t - h)) / (2 * h) == pytest.approx(flow.beta_rate(t), rel=1e-6)
    slope = (math.log(flow.scale(t + h)) - math.log(flow.scale(t - h))) / (2 * h)
    assert slope == pytest.approx(flow.log_scale_rate(t), rel=1e-6)


@pytest.mark.parametrize(
    ("min_variance", "gamma", "std", "log_snr"), [(1e-6, 0.129036, 0.335240, 6.907755), (1e-3, 0.066746, 0.249581, 3.453377)]
)
def test_published_coefficients(min_variance, gamma, std, log_snr):
    flow = ContinuousFlow(min_variance)
    assert flow.scale(0.01) * flow.beta(0.01) == pytest.approx(gamma, abs=5e-7)
    assert flow.scale(0.01) * math.sqrt(flow.beta(0.01)) == pytest.approx(std, abs=5e-7)
    assert math.log(flow.beta(1.0)) / 2 == pytest.approx(log_snr, abs=5e-7)


def test_numbers_and_tensors_give_the_same_coefficients():
    flow = ContinuousFlow(1e-3)
    times = torch.tensor([0.0, 5e-7, 1e-6, 0.2, 1.0], dtype=torch.float64)
    for quantity in (flow.beta, flow.beta_rate, flow.scale, *(lambda t, i=i: flow.noise_coefficients(t)[i] for i in (0, 1))):
        assert quantity(times).tolist() == pytest.approx([quantity(t) for t in times.tolist()], rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(t=st.floats(1e-5, 1.0))
def test_noise_and_data_estimates_convert_into_one_another(t):
    flow, x, z = ContinuousFlow(1e-3), normal(3, 2), normal(3, 2, seed=1)
    state = flow.sample(x, torch.full((3,), t, dtype=torch.float64), z)
    coefficients = flow.noise_coefficients(t)
    assert torch.allclose(noise_to_data(state, z, *coefficients), x, atol=1e-6 / t)
    assert torch.allclose(data_to_noise(state, noise_to_data(state, z, *coefficients), *coefficients), z, atol=1e-9)


def test_limits_are_finite():
    flow, x, z = ContinuousFlow(1e-6), normal(2, 3).tanh(), normal(2, 3, seed=1)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    state = flow.sample(x, ends, z)
    assert state[0].eq(0).all()
    assert torch.allclose(state[1], x[1], atol=5e-3)
    inverse, scale = (c[:, None] for c in flow.noise_coefficients(ends))
    estimate = noise_to_data(state, z, inverse, scale)
    assert estimate[0].eq(0).all()
    assert torch.allclose(estimate[1], x[1], atol=1e-9)


def test_bad_variance_is_refused():
    for value in (0.0, 1.0, -1e-3):
        with pytest.raises(ValueError, match="min_variance"):
            ContinuousFlow(value)


@pytest.mark.parametrize("num_bins", [2, 16, 17, 256])
def test_bins_are_found_again_from_their_centres(num_bins):
    index = torch.arange(num_bins)
    for dtype in (torch.float32, torch.float64):
        centres = bin_centre(index, num_bins, dtype)
        assert torch.equal(bin_index(centres, num_bins), index)
        assert centres.mean().abs() < 1e-6
    assert bin_index(torch.tensor([-7.0, -1.0, 1.0, 7.0]), num_bins).tolist() == [0, 0, num_bins - 1, num_bins - 1]


@pytest.mark.parametrize("std", [1e-3, 0.0221, 0.5, 10.0])
@pytest.mark.parametrize("mean", [0.0, 0.71, -3.0])
def test_bin_probabilities_sum_to_one(mean, std):
    centres = bin_centre(torch.arange(256), 256, torch.float64)
    prob = bin_log_prob(centres, torch.full_like(centres, mean), std, 256).exp()
    # Below 1e-5 the density stands in for the probability.
    assert prob.sum() == pytest.approx(1, abs=256e-5)
    exact = prob[prob > 1e-5]
    assert exact.sum() <= 1 + 1e-12


def test_bin_log_prob_and_its_gradient_stay_finite_far_away():
    mean = torch.tensor([-1.0, 0.0, 50.0], dtype=torch.float64, requires_grad=True)
    log_prob = bin_log_prob(torch.full((3,), 0.9, dtype=torch.float64), mean, 1e-3, 16)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert mean.grad.isfinite().all()
    assert log_prob[0] < log_prob[1] < 0


# Discrete data


@pytest.mark.parametrize(("num_classes", "max_sqrt_beta"), [(27, 0.75), (2, 3.0)])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_accuracies_of_discrete_messages_add_up_to_the_final_accuracy(num_classes, max_sqrt_beta, n):
    flow, b = DiscreteFlow(num_classes, max_sqrt_beta), max_sqrt_beta**2
    assert math.fsum(flow.alpha(i, n) for i in range(1, n + 1)) == pytest.approx(b, rel=1e-12)
    closed = [b * (2 * i - 1) / n**2 for i in range(1, n + 1)]
    assert [flow.alpha(i, n) for i in range(1, n + 1)] == pytest.approx(closed, rel=1e-9)


def test_two_discrete_messages_are_worth_one_of_their_summed_accuracy():
    """Their sum has the mean and, with the noise combined, the spread of one message."""
    flow, p, state = DiscreteFlow(5), normal(3, 5).softmax(-1), normal(3, 5, seed=1)
    z1, z2 = normal(3, 5, seed=2), normal(3, 5, seed=3)
    twice = flow.update(flow.update(state, flow.sender(p, 0.5, z1), 0.5, 0.1), flow.sender(p, 3.0, z2), 3.0, 0.6)
    z = (math.sqrt(0.5) * z1 + math.sqrt(3.0) * z2) / math.sqrt(3.5)
    assert torch.allclose(twice, flow.update(state, flow.sender(p, 3.5, z), 3.5, 0.1), rtol=1e-12)


def test_discrete_updates_from_the_prior_follow_the_flow_distribution():
    flow, n, x = DiscreteFlow(5, 1.5), 13, torch.tensor([[0, 4, 2], [3, 3, 1]])
    state, noise = flow.prior((2, 3), dtype=torch.float64), torch.zeros(2, 3, 5, dtype=torch.float64)
    assert torch.equal(flow.belief(state), torch.full((2, 3, 5), 0.2, dtype=torch.float64))
    for i in range(1, n + 1):
        z, alpha = normal(2, 3, 5, seed=i), flow.alpha(i, n)
        state = flow.update(state, flow.sender(flow.encode(x).double(), alpha, z), alpha, flow.beta((i - 1) / n))
        noise += math.sqrt(alpha) * z
    ones = torch.ones(2, dtype=torch.float64)
    aggregated = noise / math.sqrt(flow.beta(1.0))
    assert torch.allclose(state, flow.sample(x, ones, aggregated), atol=1e-12)
    # The mean of the state at time t is beta (K e_x - 1), its noise has variance beta K.
    mean = flow.sample(x, ones * 0.4, torch.zeros_like(aggregated))
    assert torch.allclose(mean, 0.36 * (5 * flow.encode(x).double() - 1))
    assert torch.allclose(flow.sample(x, ones * 0.4, aggregated) - mean, math.sqrt(0.36 * 5) * aggregated)


def test_message_multiplies_the_probabilities_by_its_exponential():
    flow, state, message = DiscreteFlow(5), normal(3, 5), normal(3, 5, seed=1)
    theta = flow.belief(state) * message.exp()
    updated = flow.belief(flow.update(state, message, 1.0, 0.3))
    assert torch.allclose(updated, theta / theta.sum(-1, keepdim=True), rtol=1e-12)


def test_networks_see_probabilities_and_of_two_classes_the_first_ones_excess():
    state = normal(4, 6, 5)
    assert torch.allclose(DiscreteFlow(5).network_input(state), state.softmax(-1))
    flow, state = DiscreteFlow(2, 3.0), normal(4, 6, 2)
    seen = flow.network_input(state)
    assert torch.allclose(seen, 2 * state.softmax(-1)[..., 0] - 1, atol=1e-14)
    assert seen.shape == (4, 6)
    certain = flow.sample(torch.tensor([[0, 1]]), torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64))
    assert torch.allclose(flow.network_input(certain), torch.tensor([[1.0, -1.0]], dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(t=st.floats(0.01, 0.99))
def test_rates_of_the_discrete_flow_are_derivatives(t):
    flow, h = DiscreteFlow(27, 0.75), 1e-6
    assert (flow.beta(t + h) - flow.beta(t - h)) / (2 * h) == pytest.approx(flow.beta_rate(t), rel=1e-6)
    assert (flow.scale(t), flow.log_scale_rate(t)) == (1, 0)
    assert flow.time(flow.beta(t)) == pytest.approx(t)
    tensor = torch.tensor([t, 0.5], dtype=torch.float64)
    for quantity in (flow.beta, flow.beta_rate, flow.scale):
        assert quantity(tensor)[0].item() == pytest.approx(quantity(t))


def test_classes_are_found_again_from_their_encoding():
    flow, x = DiscreteFlow(7), torch.arange(7).view(1, 7)
    assert torch.equal(flow.decode(flow.encode(x)), x)
    assert flow.encode(x).sum(-1).eq(1).all()
    assert flow.state_shape((4, 3)) == (4, 3, 7)
    assert torch.equal(flow.embed(flow.encode(x)), 7 * torch.eye(7)[None] - 1)
    error = flow.squared_error(x, torch.full((1, 7, 7), 1 / 7))
    assert torch.allclose(error, torch.full((1, 7), 7 * ((6 / 7) ** 2 + 6 / 49)))


def test_bad_discrete_flows_are_refused():
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        DiscreteFlow(1)
    with pytest.raises(ValueError, match="max_sqrt_beta=0 must be positive"):
        DiscreteFlow(2, 0)
