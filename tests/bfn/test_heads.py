"""Heads: their distributions against direct densities and quadrature, tails, gradients, draws and refusals (float64)."""

import itertools
import math

import pytest
import torch

from zoo.base.hyperparameters import build
from zoo.base.random import SampleRandom
from zoo.bfn import bins
from zoo.bfn.bins import bin_centre, bin_index, bin_log_probs, bin_mean, normal_log_mass
from zoo.bfn.continuous_flow import ContinuousFlow
from zoo.bfn.discrete_flow import DiscreteFlow
from zoo.bfn.heads import (
    BernoulliHead,
    Categorical,
    CategoricalHead,
    DeltaHead,
    DiscretizedNormal,
    DiscretizedNormalHead,
    Head,
)

LEVELS = [2, 16, 256]
STDS = [1e-3, 0.05, 0.5, 10.0]
MEANS = torch.tensor([0.03, -0.4, 0.71, 0.999, -1.0, 1.5, -3.0, 60.0, -1e4], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def streams(number, seed=0):
    return SampleRandom(seed, torch.arange(number))


def discretized(mean, std, num_bins, **options):
    return DiscretizedNormal(mean, torch.full_like(mean, std), num_bins, **options)


def all_centres(num_bins, dtype=torch.float64):
    return bin_centre(torch.arange(num_bins), num_bins, dtype)


def hermite(n):
    """Nodes and weights of the mean over a standard normal variable, by the eigenvalues of Jacobi's matrix."""
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0].square()


# Probabilities of bins


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("num_bins", LEVELS)
def test_table_of_bins_agrees_with_mean_mode_and_probability(num_bins, std, clip):
    prediction = discretized(MEANS, std, num_bins, clip=clip)
    log_probs, centres = prediction.log_probs(), all_centres(num_bins)
    assert log_probs.isfinite().all()
    assert (log_probs.exp().sum(-1) - 1).abs().max() < 1e-12
    assert torch.allclose(prediction.mean(), log_probs.exp() @ centres, atol=1e-12)
    unequal = log_probs.amax(-1) - log_probs.amin(-1) > 0
    assert torch.equal(prediction.mode()[unequal], centres[log_probs.argmax(-1)][unequal])
    for k in {0, 1, num_bins // 2, num_bins - 1}:
        log_prob = prediction.log_prob(centres[k].expand_as(MEANS))
        sure = log_probs[:, k] >= math.log(1e-5)
        assert torch.allclose(log_prob[sure], log_probs[sure, k], atol=1e-12)
        if clip:
            density = torch.distributions.Normal(MEANS, std).log_prob(centres[k]) + math.log(2 / num_bins)
            assert torch.allclose(log_prob[~sure], density[~sure], rtol=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.5])
def test_bins_have_the_integral_of_the_density(std):
    """16 bins of a normal density, by quadrature; its tails belong to the end bins, or the rest is scaled up."""
    nodes, weights = legendre(40)
    for mean in torch.tensor([0.03, -0.9, 1.2], dtype=torch.float64):
        values = all_centres(16)[:, None] + (2 * nodes - 1) / 16
        inside = torch.distributions.Normal(mean, mean.new_tensor(std)).log_prob(values).exp() @ weights / 8
        probs = discretized(mean, std, 16, clip=False).log_probs().exp()
        assert torch.allclose(probs, inside / inside.sum(), rtol=1e-9)
        clipped = discretized(mean, std, 16).log_probs().exp()
        assert torch.allclose(clipped[1:-1], inside[1:-1], rtol=1e-9)


def test_without_clipping_almost_nothing_inside_means_any_bin():
    prediction = discretized(torch.tensor([[9.0, -9.0]]).double().repeat(20000, 1), 1.0, 4, clip=False)
    assert torch.allclose(prediction.log_probs(), torch.tensor(1 / 4, dtype=torch.float64).log())
    assert torch.equal(prediction.log_prob(torch.full((20000, 2), 0.25).double()), prediction.log_probs()[..., 0])
    assert prediction.mean().abs().max() < 1e-15
    assert prediction.mode()[0].tolist() == [0.75, -0.75]
    assert prediction.sample(streams(20000), "output").mean(0).abs().max() < 0.02


def legendre(n):
    """Gauss's nodes and weights on [0, 1]."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (values + 1) / 2, vectors[0].square()


@pytest.mark.parametrize("z", [0.5, 6.0, 40.0, 3e3])
def test_mass_far_out_is_that_of_the_normal_tail(z):
    """One-sided intervals against log_ndtr, on both sides; narrow ones against the density."""
    near, far = torch.tensor([z], dtype=torch.float64), torch.tensor([1e9], dtype=torch.float64)
    assert normal_log_mass(near, far).item() == pytest.approx(torch.special.log_ndtr(-near).item(), rel=1e-12)
    assert torch.equal(normal_log_mass(-far, -near), normal_log_mass(near, far))
    width = 1e-5 / z
    narrow = normal_log_mass(near - width / 2, near + width / 2)
    assert narrow.item() == pytest.approx(-z * z / 2 - math.log(2 * math.pi) / 2 + math.log(width), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bins", LEVELS)
def test_predictions_far_away_have_finite_losses_and_gradients(num_bins, dtype):
    mean = torch.tensor([[0.0, 0.3, -1.0, 7.0, -380.0, 1e5]], dtype=dtype).repeat(3, 1).requires_grad_()
    std = torch.tensor([[1e-3], [0.1], [10.0]], dtype=dtype).expand(3, 6).clone().requires_grad_()
    x = all_centres(num_bins, dtype)[[0, -1, 1, 0, -1, 0]].expand(3, 6)
    for clip in (True, False):
        prediction = DiscretizedNormal(mean, std, num_bins, clip=clip)
        alpha = torch.tensor([1e-4, 1.0, 1e6], dtype=dtype)
        parts = prediction.log_prob(x), prediction.log_probs(), prediction.mean(), prediction.message_kl(x, alpha, streams(3))
        for part in parts:
            assert part.isfinite().all()
            for gradient in torch.autograd.grad(part.sum(), (mean, std), retain_graph=True):
                assert gradient.isfinite().all()


def test_far_predictions_are_pulled_back_even_where_probabilities_underflow():
    """The gradient of ln p grows like that of the density: nothing is flat because it is improbable."""
    mean = torch.tensor([0.8], dtype=torch.float32, requires_grad=True)
    x = torch.tensor([-0.5])
    prediction = DiscretizedNormal(mean, torch.full((1,), 0.01), 256)
    prediction.log_prob(bin_centre(bin_index(x, 256), 256)).sum().backward()
    assert mean.grad.item() == pytest.approx(-(0.8 + 0.498) / 0.01**2, rel=1e-2)


def test_single_precision_knows_the_mode_of_far_means():
    mean = torch.tensor([-1e4, -1.0, 1.0, 1e4])
    for std in (1e-3, 10.0):
        assert discretized(mean, std, 256).mode().tolist() == [-1 + 1 / 256] * 2 + [1 - 1 / 256] * 2
        assert discretized(mean, std, 256).mean().double().allclose(discretized(mean.double(), std, 256).mean(), atol=1e-6)


def test_large_tables_are_made_in_chunks_with_the_same_result(monkeypatch):
    mean, std = normal(6, 5).requires_grad_(), normal(6, 5, seed=1).exp().requires_grad_()
    x, alpha = bin_centre(bin_index(normal(6, 5, seed=2), 16), 16, torch.float64), torch.full((6,), 3.0, dtype=torch.float64)

    def results(clip):
        prediction = DiscretizedNormal(mean, std, 16, clip=clip, message_samples=3)
        values = prediction.mean(), prediction.message_kl(x, alpha, streams(6))
        return [*values, *torch.autograd.grad(sum(v.square().sum() for v in values), (mean, std))]

    for clip in (True, False):
        whole = results(clip)
        with monkeypatch.context() as patch:
            patch.setattr(bins, "_MAX_TABLE", 200)
            assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(whole, results(clip), strict=True))


@pytest.mark.parametrize(
    "prediction",
    [Categorical(normal(4, 3, 5).requires_grad_()), DiscretizedNormal(normal(4, 3).requires_grad_(), normal(4, 3).exp(), 16)],
    ids=["classes", "bins"],
)
def test_memory_does_not_grow_with_the_number_of_messages(prediction):
    x = torch.ones(4, 3, dtype=torch.int64) if isinstance(prediction, Categorical) else torch.zeros(4, 3, dtype=torch.float64)
    kept = {}
    for number in (2, 40):
        prediction.message_samples = number
        tables = set()

        def pack(tensor, tables=tables):
            if tensor.numel() >= 48:
                tables.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = prediction.message_kl(x, torch.ones(4, dtype=torch.float64), streams(4))
            kept[number] = len(tables)
        del loss
    assert kept[2] == kept[40]


# Messages


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("alpha", [0.02, 3.0, 200.0])
def test_divergence_of_discretised_messages_is_that_of_the_densities(alpha, clip):
    """E_y[ln N(y; x, 1/alpha) - ln sum_k p_k N(y; c_k, 1/alpha)], by quadrature over y."""
    number, num_bins = 20000, 8
    centres, mean = all_centres(num_bins), torch.full((number, 1), 0.2, dtype=torch.float64)
    prediction = discretized(mean, 0.3, num_bins, clip=clip, message_samples=2)
    x = centres[6].expand(number, 1)
    drawn = prediction.message_kl(x, torch.full((number,), alpha, dtype=torch.float64), streams(number))
    nodes, weights = hermite(120)
    y = centres[6] + nodes / math.sqrt(alpha)
    kernel = torch.distributions.Normal(centres, 1 / math.sqrt(alpha))
    mixture = (kernel.log_prob(y[:, None]).exp() @ prediction.log_probs()[0, 0].exp()).log()
    expected = weights @ (torch.distributions.Normal(centres[6], 1 / math.sqrt(alpha)).log_prob(y) - mixture)
    value, error = mean_and_error(drawn)
    assert error < 0.02 * expected
    assert value == pytest.approx(expected.item(), abs=5 * error)


@pytest.mark.parametrize("receiver", ["joint", "marginal"])
@pytest.mark.parametrize("alpha", [0.02, 0.7, 4.0])
def test_divergence_of_class_messages_is_that_of_the_densities(alpha, receiver):
    """Three classes: the mixture in R^3, or the product of its three marginals, by quadrature over y."""
    number, num_classes, truth = 20000, 3, 1
    logits = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64)
    p = logits.softmax(-1)
    prediction = Categorical(logits.expand(number, 1, 3), receiver, message_samples=2)
    x = torch.full((number, 1), truth)
    drawn = prediction.message_kl(x, torch.full((number,), alpha, dtype=torch.float64), streams(number))
    nodes, weights = hermite(40)
    grid = torch.tensor(list(itertools.product(nodes.tolist(), repeat=3)), dtype=torch.float64)
    weight = torch.tensor(list(itertools.product(weights.tolist(), repeat=3)), dtype=torch.float64).prod(-1)
    means, std = alpha * (num_classes * torch.eye(3, dtype=torch.float64) - 1), math.sqrt(alpha * num_classes)
    y = means[truth] + std * grid
    each = torch.distributions.Normal(means, std).log_prob(y[:, None])  # (y, class, coordinate)
    if receiver == "joint":
        log_receiver = (each.sum(-1).exp() @ p).log()
    else:
        log_receiver = torch.einsum("yjk,j->yk", each.exp(), p).log().sum(-1)
    expected = weight @ (each[:, truth].sum(-1) - log_receiver)
    value, error = mean_and_error(drawn)
    assert error < 0.02 * expected
    assert value == pytest.approx(expected.item(), abs=5 * error)


def test_pairs_of_opposite_messages_estimate_weak_ones_far_better():
    """The noise of a message of accuracy alpha is of order sqrt(alpha), what it says of order alpha."""
    number, alpha = 2000, torch.full((2000,), 1e-4, dtype=torch.float64)
    for prediction, x in (
        (Categorical(normal(4).expand(number, 1, 4)), torch.ones(number, 1, dtype=torch.int64)),
        (discretized(torch.zeros(number, 1, dtype=torch.float64), 0.5, 8), torch.full((number, 1), 0.375).double()),
    ):
        spread = []
        for samples in (1, 2):
            prediction.message_samples = samples
            spread.append(prediction.message_kl(x, alpha, streams(number)).std().item())
        assert spread[1] < 0.05 * spread[0]


def test_last_message_of_ten_is_where_the_receivers_differ():
    """Joint against marginal for guesses that know nothing (standard normal logits), per element and n = 10.

    Two classes, accuracy 9: 6.0 against 7.8 nats at the last message, 30 % more; the same at the first. 27 classes of
    accuracy 0.5625: the same within 2 % at every message.
    """
    number, n = 20000, 10
    for num_classes, beta, step, expected in ((2, 9.0, 10, 1.3), (2, 9.0, 1, 1.02), (27, 0.5625, 1, 1.0), (27, 0.5625, 10, 1.0)):
        logits, x = normal(number, 1, num_classes), streams(number).integers("x", num_classes, (1,))
        alpha = torch.full((number,), DiscreteFlow(num_classes, math.sqrt(beta)).alpha(step, n), dtype=torch.float64)
        joint, marginal = (
            n * Categorical(logits, receiver, message_samples=2).message_kl(x, alpha, streams(number)).mean().item()
            for receiver in ("joint", "marginal")
        )
        assert marginal / joint == pytest.approx(expected, abs=0.02)
        if step == 10 and num_classes == 2:
            assert (joint, marginal) == pytest.approx((6.0, 7.8), abs=0.1)


@pytest.mark.parametrize("receiver", ["joint", "marginal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_underflow_have_finite_losses_and_gradients(dtype, receiver):
    logits = torch.tensor([[0.0, -1e3, 1e4], [1e6, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)[:, None].requires_grad_()
    prediction, x = Categorical(logits, receiver), torch.tensor([[0], [1], [2]])
    for alpha in (1e-8, 1.0, 100.0):
        for part in (prediction.log_prob(x), prediction.message_kl(x, torch.full((3,), alpha), streams(3))):
            assert part.isfinite().all()
            (gradient,) = torch.autograd.grad(part.sum(), logits, retain_graph=True)
            assert gradient.isfinite().all()
    assert prediction.log_prob(x)[0, 0].item() == pytest.approx(-1e4)


# Draws


def test_draws_have_the_predicted_frequencies():
    number = 40000
    classes = torch.tensor([0.0, 0.5, 0.1, 0.4], dtype=torch.float64)
    predictions = [Categorical(classes.log().expand(number, 1, 4)), Categorical(classes.flip(0).log().expand(number, 1, 4))]
    drawn = [p.sample(streams(number), "output")[:, 0] for p in predictions]
    expected = [classes, classes.flip(0)]
    for clip, mean in itertools.product((True, False), (0.6, -1.3)):
        prediction = discretized(torch.full((number, 1), mean, dtype=torch.float64), 0.5, 6, clip=clip)
        index = bin_index(prediction.sample(streams(number), "output")[:, 0], 6)
        drawn.append(torch.nn.functional.one_hot(index, 6).double())
        expected.append(prediction.log_probs()[0, 0].exp())
    for draws, p in zip(drawn, expected, strict=True):
        assert draws.sum(-1).eq(1).all()
        error = (draws.mean(0) - p).abs() / (p * (1 - p) / number + 1e-12).sqrt()
        assert error.max() < 4.5


@pytest.mark.parametrize("head", [CategoricalHead(), BernoulliHead(), DiscretizedNormalHead(16)], ids=lambda h: type(h).__name__)
def test_draws_depend_on_the_sample_alone(head):
    """Whatever the batch, a sample has the same draws and the same loss."""
    flow = ContinuousFlow() if isinstance(head, DiscretizedNormalHead) else DiscreteFlow(2, 1.5)
    state, output = normal(5, *flow.state_shape((3,))), normal(5, 3, head.num_outputs_for(flow), seed=1)
    x = streams(5).integers("x", 2, (3,))
    if isinstance(flow, ContinuousFlow):
        x = bin_centre(x, 2, torch.float64)

    def draws(rows):
        prediction = head(output[rows], state[rows], 0.4, flow)
        random = SampleRandom(3, torch.tensor([7, 1, 9, 4, 2])[rows])
        alpha = torch.linspace(0.5, 2, 5, dtype=torch.float64)[rows]
        return prediction.sample(random, "output"), prediction.message_kl(x[rows], alpha, random)

    together = draws(slice(None))
    for row in range(5):
        alone = draws([row])
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.allclose(alone[1][0], together[1][row], rtol=1e-12)
    assert not torch.equal(together[0][0], together[0][1]) or not torch.equal(together[0][0], together[0][2])


# Heads


def test_noise_estimate_implies_mean_and_spread_of_the_data():
    """The true noise with log deviation l: the data as mean, sqrt(v / gamma) exp(l) as standard deviation."""
    flow, head = ContinuousFlow(1e-3), DiscretizedNormalHead(16, min_std=1e-2, max_std=2.0)
    x, z, t = normal(4, 3).tanh(), normal(4, 3, seed=1), torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    log_std = torch.tensor([1.0, -1.0, 40.0], dtype=torch.float64).expand(4, 3)
    prediction = head(torch.stack((z, log_std), -1), flow.sample(x, t, z), t, flow)
    assert torch.allclose(prediction.location, x, atol=1e-9)
    v = 1e-3 ** t[:, None]
    expected = ((v / (1 - v)).sqrt() * log_std.clamp(max=10).exp()).clamp(1e-2, 2.0)
    assert torch.allclose(prediction.std, expected, rtol=1e-9)
    for row in range(4):
        single = head(torch.stack((z, log_std), -1), flow.sample(x, t, z), t[row].item(), flow)
        assert torch.allclose(single.location[row], prediction.location[row], rtol=1e-9)
        assert torch.allclose(single.std[row], prediction.std[row], rtol=1e-9)


@pytest.mark.parametrize("at", [torch.tensor([0.0, 9e-7], dtype=torch.float64), 0.0])
def test_before_anything_is_known_the_estimate_is_a_standard_normal(at):
    flow, head = ContinuousFlow(1e-3), DiscretizedNormalHead(16)
    prediction = head(normal(2, 3, 2), normal(2, 3, seed=1), at, flow)
    assert prediction.location.eq(0).all()
    assert prediction.std.eq(1).all()
    assert prediction.mean().abs().max() < 1e-15


@pytest.mark.parametrize(
    "head", [CategoricalHead(), DiscretizedNormalHead(16), BernoulliHead(), DeltaHead()], ids=lambda h: type(h).__name__
)
def test_prior_and_certainty_are_finite(head):
    discrete = issubclass(head.flow_type, DiscreteFlow)
    flow = DiscreteFlow(2, 3.0) if discrete else ContinuousFlow(1e-6)
    x = torch.zeros(2, 3, dtype=torch.int64) if discrete else bin_centre(torch.full((2, 3), 9), 16)
    t = torch.tensor([0.0, 1.0])
    state = flow.sample(x, t, normal(2, *flow.state_shape((3,))).float())
    assert flow.network_input(state).isfinite().all()
    if discrete:
        assert flow.belief(state[:1]).eq(0.5).all()
    prediction = head(50 * normal(2, 3, head.num_outputs_for(flow), seed=1).float(), state, t, flow)
    values = prediction.mean(), prediction.mode(), prediction.sample(streams(2), "output"), prediction.log_prob(x)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in values)
    assert prediction.message_kl(x, torch.tensor([1e-9, 1e5]), streams(2)).isfinite().all()


def test_one_logit_means_what_two_logits_mean():
    """Logits (0, l) of two classes are the single logit l of class 1."""
    flow, logit = DiscreteFlow(2, 1.5), 3 * normal(6, 4, seed=2)
    x, state, alpha = streams(6).integers("x", 2, (4,)), normal(6, 4, 2), torch.full((6,), 0.8, dtype=torch.float64)
    for receiver in ("joint", "marginal"):
        one = BernoulliHead(receiver)(logit[..., None], state, 0.5, flow)
        two = CategoricalHead(receiver)(torch.stack((torch.zeros_like(logit), logit), -1), state, 0.5, flow)
        assert torch.equal(one.mean(), two.mean())
        assert torch.equal(one.sample(streams(6), "output"), two.sample(streams(6), "output"))
        assert torch.allclose(one.mean()[..., 1], logit.sigmoid())
        sign = torch.where(x == 1, 1.0, -1.0)
        assert torch.allclose(one.log_prob(x), torch.nn.functional.logsigmoid(sign * logit))
        assert torch.equal(one.message_kl(x, alpha, streams(6)), two.message_kl(x, alpha, streams(6)))
        assert torch.equal(flow.decode(one.mode()), (logit > 0).long())


def test_input_and_output_of_binary_networks_have_opposite_signs():
    """Of class 0 the input is near 1; the network that says the belief back returns -2 artanh of its input."""
    flow, x, t = DiscreteFlow(2, 3.0), torch.tensor([[0, 1]]), torch.ones(1, dtype=torch.float64)
    state = flow.sample(x, t, torch.zeros(1, 2, 2, dtype=torch.float64))
    value = flow.network_input(state)
    assert value[0, 0] > 0.99
    assert value[0, 1] < -0.99
    prediction = BernoulliHead()(-2 * value.atanh()[..., None], state, 1.0, flow)
    assert torch.allclose(prediction.mean(), flow.belief(state))
    assert torch.equal(flow.decode(prediction.mode()), x)


def test_half_precision_outputs_are_read_in_the_states_precision():
    classes = (CategoricalHead(), DiscreteFlow(5)), (BernoulliHead(), DiscreteFlow(2))
    for head, flow in (*classes, (DiscretizedNormalHead(4), ContinuousFlow())):
        output = normal(2, 3, head.num_outputs_for(flow)).bfloat16()
        state = normal(2, *flow.state_shape((3,))).float()
        for prediction in (head(output, state, 0.5, flow), head(output, state, torch.full((2,), 0.5), flow)):
            assert prediction.dtype == prediction.mean().dtype == prediction.mode().dtype == torch.float32


def test_autocast_changes_nothing():
    """Estimates, draws and losses are computed in the state's precision, whatever the network runs in."""
    x, alpha = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2)
    for prediction, data in (
        (Categorical(normal(2, 3, 4).float(), "joint"), x),
        (Categorical(normal(2, 3, 4).float(), "marginal"), x),
        (DiscretizedNormal(normal(2, 3).float(), normal(2, 3).float().exp(), 16), x.float()),
        (DiscretizedNormal(normal(2, 3).float(), normal(2, 3).float().exp(), 16, clip=False), x.float()),
    ):

        def results(prediction=prediction, data=data):
            shown = prediction.mean(), prediction.mode(), prediction.sample(streams(2), "output")
            return *shown, prediction.log_prob(data), prediction.message_kl(data, alpha, streams(2))

        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            cast = results()
        with torch.inference_mode():
            assert all(torch.equal(a, b) for a, b in zip(cast, results(), strict=True))


def test_heads_say_what_they_belong_to():
    continuous, text, binary = ContinuousFlow(), DiscreteFlow(27), DiscreteFlow(2)
    fits = {
        (DeltaHead(num_bins=256), continuous): (1, 256),
        (DiscretizedNormalHead(16), continuous): (2, 16),
        (CategoricalHead(), text): (27, 27),
        (CategoricalHead(), binary): (2, 2),
        (BernoulliHead(), binary): (1, 2),
    }
    for (head, flow), (num_outputs, num_levels) in fits.items():
        head.check(flow)
        assert (head.num_outputs_for(flow), head.num_levels(flow)) == (num_outputs, num_levels)
    for head, flow, complaint in (
        (DeltaHead(), text, "DeltaHead belongs to a ContinuousFlow, not to a DiscreteFlow"),
        (DiscretizedNormalHead(16), binary, "DiscretizedNormalHead belongs to a ContinuousFlow"),
        (CategoricalHead(), continuous, "CategoricalHead belongs to a DiscreteFlow, not to a ContinuousFlow"),
        (BernoulliHead(), continuous, "BernoulliHead belongs to a DiscreteFlow"),
        (BernoulliHead(), text, "num_classes=27"),
    ):
        with pytest.raises(ValueError, match=complaint):
            head.check(flow)


@pytest.mark.parametrize("head", [CategoricalHead("marginal", 3), BernoulliHead("joint", 4), DiscretizedNormalHead(16, False)])
def test_heads_are_built_again_from_plain_data(head):
    again = build(Head, head.init_config)
    assert type(again) is type(head)
    assert vars(again) | {"_init_arguments": None} == vars(head) | {"_init_arguments": None}


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: CategoricalHead(receiver="product"), "CategoricalHead: receiver='product'"),
        (lambda: CategoricalHead(message_samples=0), "CategoricalHead: message_samples=0"),
        (lambda: BernoulliHead(message_samples=-1), "BernoulliHead: message_samples=-1"),
        (lambda: DiscretizedNormalHead(1), "DiscretizedNormalHead: num_bins=1"),
        (lambda: DiscretizedNormalHead(16, message_samples=0), "DiscretizedNormalHead: message_samples=0"),
        (lambda: DiscretizedNormalHead(16, min_std=0.0), "min_std=0.0"),
        (lambda: DiscretizedNormalHead(16, min_std=2.0, max_std=1.0), "max_std=1.0"),
        (lambda: DiscretizedNormalHead(16, min_prob=0.0), "min_prob=0.0"),
    ],
)
def test_bad_arguments_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_messages_need_random_numbers():
    alpha = torch.ones(1)
    for prediction, x in (
        (Categorical(torch.zeros(1, 2, 3)), torch.zeros(1, 2, dtype=torch.int64)),
        (discretized(torch.zeros(1, 2), 1.0, 4), torch.zeros(1, 2)),
    ):
        with pytest.raises(ValueError, match="random=None"):
            prediction.message_kl(x, alpha)


def test_eight_bit_levels_are_the_bins_of_256():
    levels = torch.arange(256)
    assert torch.equal(bin_index(levels / 255 * 2 - 1, 256), levels)
    mean = bin_mean(all_centres(256), torch.full((256,), 1e-3, dtype=torch.float64), 256)
    assert torch.allclose(mean, all_centres(256), atol=1e-4)
    assert torch.equal(bin_log_probs(all_centres(256), torch.full((256,), 1e-3, dtype=torch.float64), 256).argmax(-1), levels)
