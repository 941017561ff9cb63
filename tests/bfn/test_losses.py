"""Losses of continuous, discretised and discrete data: closed forms, limits and equivalences (float64)."""

import math

import pytest
import torch

from zoo.base.random import SampleRandom
from zoo.bfn.bins import bin_centre, bin_index
from zoo.bfn.continuous_flow import ContinuousFlow
from zoo.bfn.discrete_flow import DiscreteFlow
from zoo.bfn.heads import BernoulliHead, Categorical, CategoricalHead, Delta, DeltaHead, DiscretizedNormal, DiscretizedNormalHead
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


# Discrete data


@pytest.mark.parametrize("n", [1, 7, 50])
def test_accuracies_of_class_messages_add_up(n):
    flow = DiscreteFlow(5, 1.5)
    assert math.fsum(flow.alpha(i, n) for i in range(1, n + 1)) == pytest.approx(2.25, rel=1e-12)
    assert [flow.alpha(i, n) for i in range(1, n + 1)] == pytest.approx([2.25 * (2 * i - 1) / n**2 for i in range(1, n + 1)])


def test_updates_of_class_beliefs_follow_the_flow():
    """n messages are worth one draw of the flow at t = 1 whose noise is theirs, weighted by accuracy."""
    flow, n, x = DiscreteFlow(5, 1.5), 13, torch.tensor([[0, 4, 2], [1, 1, 3]])
    state, noise = flow.prior((2, 3), dtype=torch.float64), torch.zeros(2, 3, 5, dtype=torch.float64)
    for i in range(1, n + 1):
        z, alpha = normal(2, 3, 5, seed=i), flow.alpha(i, n)
        state = flow.update(state, flow.sender(flow.encode(x).double(), alpha, z), alpha, flow.beta((i - 1) / n))
        noise += math.sqrt(alpha) * z
    expected = flow.sample(x, torch.ones(2, dtype=torch.float64), noise / 1.5)
    assert torch.allclose(state, expected, atol=1e-12)


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("num_steps", [0, 1, 3, 20])
def test_exact_posterior_of_uniform_classes_costs_ln_k(num_classes, num_steps):
    """Whatever the number of messages, the bound is the entropy of the data; the marginal receiver wastes some."""
    number, flow = 20000, DiscreteFlow(num_classes, 1.5)
    random = SampleRandom(0, torch.arange(number))
    x, shape = random.integers("data", num_classes, (1,)), flow.state_shape((1,))

    def posterior(shown, t):
        return -2 * shown.atanh()[..., None] if num_classes == 2 else shown.log()

    def predict(head, t, name):
        return predict_from_data(posterior, flow, head, x, t, random.normal(name, shape, torch.float64))

    totals = {}
    for receiver in ("joint", "marginal"):
        head = BernoulliHead(receiver, 2) if num_classes == 2 else CategoricalHead(receiver, 2)
        if num_steps:
            step = random.integers("step", num_steps) + 1
            prediction = predict(head, (step - 1).double() / num_steps, "noise")
            loss = discrete_time_loss(flow, prediction, x, step, num_steps, random)
        else:
            t = random.stratified("time", torch.float64)
            loss = continuous_time_loss(flow, predict(head, t, "noise"), x, t)
        totals[receiver] = loss + reconstruction_loss(predict(head, torch.ones(number, dtype=torch.float64), "end"), x)
    error = totals["joint"].std().item() / math.sqrt(number)
    assert error < 0.02 * math.log(num_classes)
    assert totals["joint"].mean().item() == pytest.approx(math.log(num_classes), abs=4.5 * error)
    waste = (totals["marginal"] - totals["joint"]).mean().item()
    assert (waste > 0.02) if 0 < num_steps < 10 else (waste >= 0)


def test_constant_probabilities_cost_half_the_squared_error():
    """½ K b |e_x - p|^2 in continuous time."""
    flow, logits, x = DiscreteFlow(4, 1.5), normal(3, 2, 4), torch.tensor([[0, 1], [2, 3], [3, 3]])
    error = (torch.nn.functional.one_hot(x, 4) - logits.softmax(-1)).square().sum(-1).mean(1)
    nodes, weights = legendre(5)
    parts = [w * continuous_time_loss(flow, Categorical(logits), x, t.expand(3)) for t, w in zip(nodes, weights, strict=True)]
    assert torch.allclose(sum(parts), 4 * 2.25 / 2 * error, rtol=1e-12)


def rows(values, number=40000):
    return torch.as_tensor(values).expand(number, *torch.as_tensor(values).shape)


@pytest.mark.parametrize(
    ("flow", "prediction", "x"),
    [
        (DiscreteFlow(3, 1.5), Categorical(rows(normal(1, 3)), "joint", 2), rows([2])),
        (DiscreteFlow(3, 1.5), Categorical(rows(normal(1, 3)), "marginal", 2), rows([2])),
        (
            ContinuousFlow(0.05),
            DiscretizedNormal(rows(0.1 * normal(1)), rows(0.4 * normal(1).exp()), 8, message_samples=2),
            rows(bin_centre(torch.tensor([6]), 8, torch.float64)),
        ),
    ],
    ids=["joint", "marginal", "bins"],
)
def test_drawn_messages_tend_to_the_continuous_loss(flow, prediction, x):
    random = SampleRandom(0, torch.arange(len(x)))
    limit = continuous_time_loss(flow, prediction, x, torch.full((len(x),), 0.5, dtype=torch.float64)).mean()
    errors = []
    for n in (4, 2000):
        step = torch.full((len(x),), n // 2 + 1)
        errors.append(abs(discrete_time_loss(flow, prediction, x, step, n, random).mean() / limit - 1).item())
    assert errors[0] > 0.05
    assert errors[1] < 0.02


# Discretised data


def test_certainty_of_one_bin_costs_what_its_centre_costs():
    """With all probability on one bin the message is that of the delta head, drawn in pairs without any error."""
    centre, x = bin_centre(torch.tensor([[3, 11]]), 16, torch.float64), bin_centre(torch.tensor([[4, 2]]), 16, torch.float64)
    sure = DiscretizedNormal(centre, torch.full_like(centre, 1e-3), 16, message_samples=2)
    random = SampleRandom(0, torch.arange(1))
    for n in (1, 10, 1000):
        step = torch.tensor([n // 2 + 1])
        drawn = discrete_time_loss(FLOW, sure, x, step, n, random)
        assert torch.allclose(drawn, discrete_time_loss(FLOW, delta(centre), x, step, n), rtol=1e-9)
    t = torch.tensor([0.4], dtype=torch.float64)
    assert torch.allclose(continuous_time_loss(FLOW, sure, x, t), continuous_time_loss(FLOW, delta(centre), x, t), rtol=1e-9)


def test_reconstruction_is_the_cross_entropy():
    logits, x = normal(2, 3, 5), torch.tensor([[0, 4, 1], [2, 2, 3]])
    expected = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), x, reduction="none").mean(1)
    assert torch.allclose(reconstruction_loss(Categorical(logits), x), expected, rtol=1e-12)
    mean, std = 0.3 * normal(2, 3), 0.3 * normal(2, 3, seed=1).exp()
    x = bin_centre(bin_index(mean + 0.2, 16), 16, torch.float64)
    prediction = DiscretizedNormal(mean, std, 16)
    table = torch.nn.functional.nll_loss(prediction.log_probs().movedim(-1, 1), bin_index(x, 16), reduction="none").mean(1)
    assert torch.allclose(reconstruction_loss(prediction, x), table, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_have_the_float_type_of_the_noise(dtype):
    """Class numbers are integers, outputs may be of half precision: neither decides."""
    for flow, head in (
        (DiscreteFlow(3, 1.5), CategoricalHead()),
        (DiscreteFlow(2, 1.5), BernoulliHead("marginal")),
        (FLOW, DiscretizedNormalHead(16)),
        (FLOW, DeltaHead()),
    ):
        x = torch.tensor([[0, 1, 1], [1, 1, 0]])
        x = bin_centre(x, 2, dtype) if flow is FLOW else x
        noise, t = normal(2, *flow.state_shape((3,))).to(dtype), torch.tensor([0.0, 1.0], dtype=dtype)
        output = normal(2, 3, head.num_outputs_for(flow), seed=1).bfloat16().requires_grad_()
        prediction = predict_from_data(lambda shown, times, output=output: output, flow, head, x, t, noise)
        losses = (
            continuous_time_loss(flow, prediction, x, t),
            discrete_time_loss(flow, prediction, x, torch.tensor([1, 5]), 5, SampleRandom(0, torch.arange(2))),
            reconstruction_loss(prediction, x),
        )
        for loss in losses:
            assert loss.shape == (2,)
            assert loss.dtype == dtype
            assert loss.isfinite().all()
            (gradient,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
            assert gradient.isfinite().all()
        assert losses[0][0] == 0 or flow is FLOW  # of classes nothing is sent at t = 0


def test_weight_of_the_loss_can_be_held_where_the_belief_is_sharp():
    """-½ ln(s^2) / max(s^(2t), m) (x - x̂)^2."""
    x, prediction = normal(4, 2).tanh(), delta(normal(4, 2, seed=1).tanh())
    t = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    loss = continuous_time_loss(FLOW, prediction, x, t, min_variance=0.02)
    expected = -math.log(1e-3) / 2 * (x - prediction.mean()).square().mean(1) / (1e-3**t).clamp(min=0.02)
    assert torch.allclose(loss, expected, rtol=1e-9)
    never = continuous_time_loss(FLOW, prediction, x, t, min_variance=5e-4)
    assert torch.equal(never, continuous_time_loss(FLOW, prediction, x, t))
    for bad, flow in ((0.0, FLOW), (1.5, FLOW), (0.1, DiscreteFlow(3))):
        with pytest.raises(ValueError, match=f"min_variance={bad}"):
            continuous_time_loss(flow, prediction, x, t, min_variance=bad)
