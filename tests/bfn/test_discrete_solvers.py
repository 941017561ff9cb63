"""Samplers of discrete data: printed formulas, exact solutions, equivalences, measured orders of convergence (float64)."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from zoo.base.random import SampleRandom
from zoo.bfn import (
    ODE1,
    ODE2M,
    ODE2S,
    ODE3M,
    SDE1,
    SDE2M,
    BernoulliHead,
    BFNSampler,
    CategoricalHead,
    DataStatistics,
    Denoiser,
    DiscreteFlow,
    InPainting,
    ODEEuler,
    SDEEuler,
)
from zoo.bfn.solvers import random_noise

K, LENGTH = 5, 6
FLOW = DiscreteFlow(K, 0.75)
B1 = 0.75**2
FAST = [SDE1, SDE2M, SDEEuler, ODE1, ODE2M, ODE2S, ODE3M, ODEEuler]
ALL = [BFNSampler, *FAST]
SEQUENCES = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 0], [1, 1, 2, 0, 3, 3], [0, 4, 4, 2, 2, 1]])
PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


class Posterior:
    """Exact class probabilities when the data are one of four sequences; records what it was asked."""

    def __init__(self, sequences=SEQUENCES):
        self.known = one_hot(sequences, K).double()
        self.times = []

    def __call__(self, theta, t):
        self.times.append(t[0].item())
        share = (PRIOR.log() + torch.einsum("blk,slk->bs", theta.log(), self.known)).softmax(-1)
        return torch.einsum("bs,slk->blk", share, self.known).log().clamp(min=-80)


class Scheduled:
    """Class probabilities that depend on time alone: p_0 + p_1 t + p_2 t^2."""

    def __init__(self, *terms):
        self.terms = torch.tensor(terms, dtype=torch.float64)

    def __call__(self, theta, t):
        probs = sum(term * t[0] ** i for i, term in enumerate(self.terms))
        return probs.log().expand_as(theta)


class States:
    """Guide that changes nothing and keeps the states it sees, by time."""

    def __init__(self, inner=None):
        self.inner = inner
        self.seen = {}

    def __call__(self, estimate, state, t):
        self.seen[t] = state.clone()
        return estimate if self.inner is None else self.inner(estimate, state, t)


def draw(solver, network=None, num=32, seed=0, flow=FLOW, guide=None, head=None, **options):
    """The samples, the states at each time, and the network that was asked."""
    network, states = network or Posterior(), States(guide)
    denoiser = Denoiser(network, flow, head or CategoricalHead(), states)
    sample = solver.sample(denoiser, (LENGTH,), SampleRandom(seed, torch.arange(num)), **{"dtype": torch.float64, **options})
    return sample, states.seen, network


def final_state(solver, *args, **options):
    return draw(solver, *args, **options)[1][1.0]


def noises(shape=(LENGTH, K), num=32, seed=0):
    return random_noise(SampleRandom(seed, torch.arange(num)), shape, torch.float64)


# Printed formulas


@settings(max_examples=30, deadline=None)
@given(
    times=st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3, unique_by=lambda t: round(t, 3)).map(sorted),
    seed=st.integers(0, 99),
)
def test_steps_are_the_printed_ones(times, seed):
    p, a, b = times
    d = b - a
    zeta, z = torch.randn(2, 3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x, before = torch.rand(2, 3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    slope = (x - before) / (a - p)
    printed = {
        ODE1: b / a * zeta + B1 * b * d * (K * x - 1),
        ODE2M: b / a * zeta + B1 * b * d * (K * (x + d / 2 * slope) - 1),
        SDE1: zeta + B1 * (b**2 - a**2) * (K * x - 1) + math.sqrt(K * B1 * (b**2 - a**2)) * z,
        SDEEuler: zeta + 2 * K * B1 * a * (x - 1 / K) * d + math.sqrt(2 * K * B1 * a * d) * z,
        ODEEuler: zeta + d * (zeta / a + B1 * a * (K * x - 1)),
    }
    printed[SDE2M] = printed[SDE1] + K * B1 / 3 * d**2 * (a + 2 * b) * slope
    for cls, expected in printed.items():
        solver = cls()
        step = solver.coefficients(FLOW, (a, p)[: solver.order], b)
        found = solver.update(FLOW, zeta.clone(), [x, before], step, z if solver.stochastic else None)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_single_step_solver_is_the_printed_one():
    solver, network = ODE2S(nfe=10, eta=0.001, last_drop=False), Posterior()
    zeta = solver.first_state(FLOW, (LENGTH,), noises())
    for a, b in itertools.pairwise(solver.times(FLOW)):
        m = (a + b) / 2
        first = network(zeta.softmax(-1), torch.full((32,), a)).softmax(-1)
        middle = m / a * zeta + B1 * m * (m - a) * (K * first - 1)
        second = network(middle.softmax(-1), torch.full((32,), m)).softmax(-1)
        zeta = b / a * zeta + B1 * b * (b - a) * (K * second - 1)
    assert torch.allclose(final_state(solver), zeta, rtol=0, atol=1e-12)
    dropped, _, asked = draw(ODE2S(nfe=10, eta=0.001))
    assert torch.equal(dropped.x, second.argmax(-1))
    assert asked.times == pytest.approx(network.times)


def test_uniform_grid_gives_the_weights_of_adams_and_bashforth():
    times = ODE2M(nfe=9).times(FLOW)
    assert FLOW.extrapolation((times[4], times[3]), times[5], stochastic=False) == pytest.approx((1.5, -0.5))
    weights = FLOW.extrapolation((times[4], times[3], times[2]), times[5], stochastic=False)
    assert weights == pytest.approx((23 / 12, -16 / 12, 5 / 12))


def test_start_has_the_published_spread():
    flow = DiscreteFlow(27, 0.75)
    first = SDE1(eta=0.001).first_state(flow, (4,), lambda *_: torch.ones(1, 4, 27, dtype=torch.float64))
    assert first == pytest.approx(torch.full((1, 4, 27), 0.00389711, dtype=torch.float64), abs=5e-9)


# Exact solutions


@pytest.mark.parametrize("cls", [ODE1, ODE2M, ODE2S, ODE3M])
@pytest.mark.parametrize("grid", ["uniform", "logsnr", "quadratic"])
def test_constant_estimate_is_solved_exactly_by_any_number_of_calls(cls, grid):
    probs, eta = [0.1, 0.2, 0.3, 0.15, 0.25], 0.01
    start = cls(eta=eta).first_state(FLOW, (LENGTH,), noises())
    expected = start / eta + B1 * (1 - eta) * (K * torch.tensor(probs, dtype=torch.float64) - 1)
    for nfe in (1, 2, 7, 50):
        found = final_state(cls(nfe=nfe, eta=eta, grid=grid, last_drop=False), Scheduled(probs))
        assert torch.allclose(found, expected, rtol=0, atol=1e-11)


def test_linear_and_quadratic_estimates_are_solved_up_to_the_first_step():
    """Single-step: exactly. Multistep: the first step's error is all, and shrinks with the square or cube of the steps."""
    linear = ([0.1, 0.2, 0.3, 0.15, 0.25], [0.2, -0.1, -0.1, 0.1, -0.1])
    quadratic = (*linear, [-0.1, 0.1, 0.1, 0.0, -0.1])

    def errors(cls, terms, calls):
        eta = 0.01
        start = cls(eta=eta).first_state(FLOW, (LENGTH,), noises())
        integral = sum(torch.tensor(c, dtype=torch.float64) * (1 - eta ** (i + 1)) / (i + 1) for i, c in enumerate(terms))
        exact = start / eta + B1 * (K * integral - (1 - eta))
        solvers = [cls(nfe=n, eta=eta, last_drop=False) for n in calls]
        return [(final_state(solver, Scheduled(*terms)) - exact).abs().max().item() for solver in solvers]

    assert max(errors(ODE2S, linear, (2, 10, 40))) < 1e-12
    assert max(errors(ODE3M, linear, (2, 10, 40))) < 1e-12
    few, many = errors(ODE2M, linear, (10, 40))
    assert few / many == pytest.approx(16, rel=1e-6)
    few, many = errors(ODE3M, quadratic, (11, 41))
    assert few / many == pytest.approx(64, rel=1e-6)
    assert few > 1e-6


@pytest.mark.parametrize("cls", [ODE1, ODE2M, ODE2S, ODE3M, ODEEuler])
def test_sum_of_the_logits_over_time_is_conserved(cls):
    _, states, _ = draw(cls(nfe=9, last_drop=False))
    sums = torch.stack([state.sum(-1) / t for t, state in states.items()])
    assert len(sums) == 10
    assert torch.allclose(sums, sums[:1].expand_as(sums), rtol=0, atol=1e-9)
    assert sums.std() > 0.1


# Orders of convergence


def test_ode_solvers_converge_with_their_orders():
    reference = final_state(ODE3M(nfe=1024, eta=0.05, last_drop=False))
    for cls, first in ((ODEEuler, 0.7), (ODE1, 0.85), (ODE2M, 1.75), (ODE2S, 1.6), (ODE3M, 2.7)):
        errors = []
        for n in (10, 20, 40, 80, 160):
            found = final_state(cls(nfe=n, eta=0.05, last_drop=False))
            errors.append((found - reference).square().mean().sqrt().item())
        orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
        assert first < orders[0]
        assert orders[-1] == pytest.approx(cls.order, abs=0.05)


def test_stochastic_solvers_converge_along_one_path_of_noise():
    options = {"eta": 1 / 64, "noise": "brownian", "last_drop": False}
    reference = final_state(SDE2M(nfe=63 * 8, **options))
    for cls in (SDE1, SDE2M, SDEEuler):
        errors = [(final_state(cls(nfe=n, **options)) - reference).abs().mean().item() for n in (9, 63)]
        assert errors[1] < errors[0] / 4
    one, other = (final_state(SDE2M(nfe=63, eta=1 / 64, last_drop=False), seed=seed) for seed in (0, 1))
    assert (one - other).abs().mean() > 20 * errors[1]


# Equivalences


@pytest.mark.parametrize("n", [1, 2, 25])
def test_ancestral_sampling_is_the_first_order_sde_solver_with_drawn_classes(n):
    ancestral, states, network = draw(BFNSampler(nfe=n + 1))
    others = draw(SDE1(nfe=n, eta=0.0, last_drop=False, categorical=True))[1]
    assert list(states) == list(others) == pytest.approx([i / n for i in range(n + 1)])
    for t, state in states.items():
        assert torch.allclose(state.softmax(-1), others[t].softmax(-1), rtol=0, atol=1e-12)
    final = network(states[1.0].softmax(-1), torch.ones(32))
    assert torch.equal(ancestral.x, final.argmax(-1))
    assert not torch.allclose(final_state(SDE1(nfe=n, eta=0.0, last_drop=False)), states[1.0], atol=0.01)


def test_ancestral_updates_multiply_the_probabilities_by_the_exponential_of_the_message():
    _, states, _ = draw(BFNSampler(nfe=2), Scheduled([1.0, 0.0, 0.0, 0.0, 0.0]))
    message = B1 * (K * one_hot(torch.tensor(0), K) - 1) + math.sqrt(B1 * K) * noises()(1, 0.0, 1.0)
    theta = message.exp() / K
    assert torch.allclose(states[1.0].softmax(-1), theta / theta.sum(-1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [SDE1, SDEEuler, ODEEuler])
def test_drawn_classes_follow_the_prediction(cls):
    probs = torch.tensor([0.05, 0.1, 0.2, 0.25, 0.4], dtype=torch.float64)
    sample, _, _ = draw(cls(nfe=4, categorical=True), Scheduled(probs.tolist()), num=2000, record=True)
    drawn = sample.trajectory[:, :3]
    counts = drawn.flatten().bincount(minlength=K).double()
    expected = probs * drawn.numel()
    assert ((counts - expected).square() / expected).sum() < 23.5  # chi-squared of 4 degrees of freedom, 0.01 %
    agreement = (drawn[:, 0] == drawn[:, 1]).double().mean()
    assert agreement == pytest.approx(probs.square().sum().item(), abs=0.02)
    assert sample.x.eq(4).all()  # the last estimate is the mode


@pytest.mark.parametrize("cls", [SDEEuler, ODEEuler])
def test_extra_step_predicts_once_more_at_the_end(cls):
    extra, states, network = draw(cls(nfe=8, extra_step=True), record=True)
    assert extra.nfe == len(network.times) == extra.trajectory.shape[1] == 8
    assert network.times[-1] == 1
    assert torch.equal(states[1.0], final_state(cls(nfe=7, last_drop=False)))
    assert torch.equal(extra.x, network(states[1.0].softmax(-1), torch.ones(32)).argmax(-1))


@pytest.mark.parametrize("cls", ALL)
def test_sampling_is_equivariant_to_a_permutation_of_the_classes(cls):
    order = torch.tensor([3, 0, 4, 2, 1])
    drawn, permuted = noises(), lambda *step: drawn(*step)[..., order.argsort()]
    sample = draw(cls(nfe=6), Greedy() if cls is BFNSampler else None, noise=drawn)[0].x
    renamed = draw(cls(nfe=6), Greedy(order[SEQUENCES]) if cls is BFNSampler else Posterior(order[SEQUENCES]), noise=permuted)
    assert torch.equal(renamed[0].x, order[sample])
    assert len(sample.unique(dim=0)) > 1


class Greedy(Posterior):
    """Certain of the most probable sequence, so that drawing from its prediction takes no randomness."""

    def __call__(self, theta, t):
        return super().__call__(theta, t).mul(1e6)


def test_a_constant_in_the_logits_changes_no_estimate():
    state = noises()(0, 0.0, 0.0)
    denoiser, random = Denoiser(Posterior(), FLOW, CategoricalHead()), SampleRandom(0, torch.arange(32))
    shifted = state + torch.linspace(-3, 3, LENGTH, dtype=torch.float64)[:, None]
    assert torch.allclose(denoiser(state, 0.5, "mean", random), denoiser(shifted, 0.5, "mean", random), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [ODE2M, SDE2M, ODE2S])
def test_two_classes_may_be_read_by_either_head(cls):
    flow = DiscreteFlow(2, 3.0)

    def logit(u, t):
        return torch.stack((torch.zeros_like(u), 2 - 3 * u + t[0]), dim=-1)

    options = {"flow": flow, "num": 500}
    general = draw(cls(nfe=5), logit, **options)[0].x
    binary = draw(cls(nfe=5), lambda u, t: logit(u, t)[..., 1:], head=BernoulliHead(), **options)[0].x
    assert torch.equal(general, binary)
    assert 0.2 < general.double().mean() < 0.98


# Limits


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_few_calls_give_classes(cls, nfe):
    if nfe <= cls.extra_calls:
        with pytest.raises(ValueError, match="at least 2"):
            cls(nfe=nfe)
        return
    sample, states, network = draw(cls(nfe=nfe), record=True)
    assert sample.nfe == len(network.times) == nfe
    keeps = nfe == 1 and cls.keeps_single_step  # the state after the only call is an estimate, too
    assert sample.trajectory.shape == (32, nfe + keeps, LENGTH)
    assert all(state.isfinite().all() for state in states.values())
    assert sample.x.shape == (32, LENGTH)
    assert sample.x.dtype == sample.trajectory.dtype == torch.int64
    assert 0 <= sample.x.min() <= sample.x.max() < K
    assert torch.equal(sample.trajectory[:, -1], sample.x)


@pytest.mark.parametrize("cls", [SDE1, SDE2M, SDEEuler, BFNSampler])
def test_stochastic_solvers_start_at_time_zero_from_no_knowledge(cls):
    options = {"nfe": 5} if cls is BFNSampler else {"nfe": 5, "eta": 0.0}
    sample, states, _ = draw(cls(**options))
    assert states[0.0].eq(0).all()
    assert all(state.isfinite().all() for state in states.values())
    assert len(sample.x.unique(dim=0)) > 1


def test_last_state_or_last_estimate_is_the_sample():
    for cls in FAST:
        kept, states, _ = draw(cls(nfe=6, last_drop=False))
        assert torch.equal(kept.x, states[1.0].argmax(-1))
        dropped, _, network = draw(cls(nfe=6))
        last = list(states)[-2]
        assert torch.equal(dropped.x, network(states[last].softmax(-1), torch.full((32,), last)).argmax(-1))


@pytest.mark.parametrize(("second", "first"), [(ODE2M, ODE1), (SDE2M, SDE1), (ODE3M, ODE1)])
def test_single_step_of_multistep_solvers_is_not_dropped(second, first):
    assert torch.equal(final_state(second(nfe=1)), final_state(first(nfe=1, last_drop=False)))


def test_samples_are_the_data():
    """With enough calls every sampler draws the four sequences, about as often as they are."""
    strong = DiscreteFlow(K, 3.0)
    for cls in (BFNSampler, SDE2M, ODE2M):
        x = draw(cls(nfe=60), num=1500, flow=strong)[0].x
        share = torch.stack([(x == sequence).all(-1).double().mean() for sequence in SEQUENCES])
        assert share.sum() > 0.99
        assert torch.allclose(share, PRIOR, atol=0.05)


# Start


def statistics(path: Path, mean, std):
    DataStatistics(mean, std).save(path)
    return path


def test_optimal_start_has_the_moments_of_the_flow(tmp_path: Path):
    """zeta(eta) ~ N(beta (K p - 1), K beta + K beta^2 tr / L) with p = E[e_x]."""
    eta, known = 0.3, one_hot(SEQUENCES, K).double()
    moments = DataStatistics.of([known])
    path = statistics(tmp_path / "moments.pt", moments.mean, moments.std)
    z = torch.ones(1, LENGTH, K, dtype=torch.float64)
    state = ODE2M(eta=eta, start="optimal", statistics=path).first_state(FLOW, (LENGTH,), lambda *_: z)
    beta = B1 * eta**2
    std = math.sqrt(K * beta + K * beta**2 * known.var(0, correction=0).sum().item() / LENGTH)
    assert torch.allclose(state, beta * (K * known.mean(0) - 1) + std * z, atol=1e-6)
    # The mean and the mean variance of the states' entries are those of the flow at eta.
    x, random = SEQUENCES.repeat(20_000, 1), SampleRandom(0, torch.arange(80_000))
    drawn = FLOW.sample(x, torch.full((80_000,), eta, dtype=torch.float64), random.normal("z", (LENGTH, K), torch.float64))
    assert torch.allclose(drawn.mean(0), (state - std * z)[0], atol=0.02)
    assert drawn.var(0).mean().sqrt() == pytest.approx(std, rel=0.005)


def test_optimal_start_of_even_and_certain_classes_is_the_zero_start(tmp_path: Path):
    path = statistics(tmp_path / "moments.pt", torch.full((LENGTH, K), 1 / K), torch.zeros(LENGTH, K))
    zero, optimal = (final_state(SDE1(last_drop=False, **o)) for o in ({}, {"start": "optimal", "statistics": path}))
    assert torch.allclose(zero, optimal, rtol=0, atol=1e-6)


def test_statistics_of_another_shape_are_refused(tmp_path: Path):
    path = statistics(tmp_path / "moments.pt", torch.zeros(LENGTH), torch.zeros(LENGTH))
    with pytest.raises(ValueError, match=r"shape \(6,\), but the model's data has \(6, 5\)"):
        draw(SDE1(start="optimal", statistics=path))


# Noise, seeds and guides


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("categorical", [False, True])
def test_sample_depends_on_its_seed_and_number_only(cls, categorical):
    if categorical and cls not in (SDE1, SDEEuler, ODEEuler):
        with pytest.raises(TypeError, match="categorical"):
            cls(categorical=True)
        return
    solver = cls(nfe=5, categorical=True) if categorical else cls(nfe=5)
    _, everything, _ = draw(solver, num=7)
    states, random = States(), SampleRandom(0, torch.tensor([5, 2]))
    denoiser = Denoiser(Posterior(), FLOW, CategoricalHead(), states)
    first = solver.sample(denoiser, (LENGTH,), random, dtype=torch.float64)
    last = max(everything)
    assert torch.allclose(states.seen[last], everything[last][[5, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(draw(solver, num=7, seed=1)[1][last], everything[last], atol=1e-3)
    # A denoiser that was used before draws the same.
    assert torch.equal(solver.sample(denoiser, (LENGTH,), random, dtype=torch.float64).x, first.x)


KNOWN = torch.tensor([False, True, True, False, False, False])
MASKS = {
    "data": KNOWN.expand(32, LENGTH),
    "data of every sample": KNOWN,
    "estimate": KNOWN[:, None].expand(32, LENGTH, K),
    "estimate, classes together": KNOWN[:, None].expand(32, LENGTH, 1),
    "estimate of every sample": KNOWN[:, None],
}


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_in_painting_keeps_known_classes_and_guides_the_rest(cls, mask):
    truth = SEQUENCES[3].expand(32, LENGTH)  # the only one of the four with two 4s where it is known
    known = FLOW.encode(truth).double().masked_fill(~KNOWN[:, None], math.nan)
    sample, _, _ = draw(cls(nfe=12), guide=InPainting(known, mask), flow=DiscreteFlow(K, 3.0), record=True)
    assert torch.equal(sample.x[:, KNOWN], truth[:, KNOWN])
    assert torch.equal(sample.trajectory[:, :, KNOWN], truth[:, None, KNOWN].expand(-1, 12, -1))
    free = draw(cls(nfe=12), flow=DiscreteFlow(K, 3.0))[0].x
    unknown = (sample.x == truth)[:, ~KNOWN].double().mean()
    assert unknown > (free == truth)[:, ~KNOWN].double().mean() + 0.15


@pytest.mark.parametrize(
    ("known", "mask", "message"),
    [
        ((4, 6, 5), (4, 5, 6), "fits neither data nor estimate"),
        ((4, 6, 5), (2, 6), "fits neither data nor estimate"),
        ((4, 6, 5), (1, 4, 6, 5), "fits neither data nor estimate"),
        ((5, 5, 5), (5, 5), r"could be meant for the data or for the estimate .* give it 3 axes"),
    ],
)
def test_masks_that_fit_nothing_or_twice_are_refused(known, mask, message):
    with pytest.raises(ValueError, match=message):
        InPainting(torch.zeros(known), torch.zeros(mask, dtype=torch.bool))


@pytest.mark.parametrize("cls", ALL)
def test_float32_follows_float64(cls):
    exact = draw(cls(nfe=10))[1]
    single = draw(cls(nfe=10), lambda theta, t: Posterior()(theta.double(), t.double()), dtype=torch.float32)[1]
    for t, state in exact.items():
        assert single[t].dtype == torch.float32
        assert torch.allclose(single[t].double(), state, atol=1e-3)
