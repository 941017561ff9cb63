"""Samplers of continuous data: closed formulas, equivalences, exact solutions, measured orders of convergence (float64)."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import sweep

from zoo.base.random import SampleRandom
from zoo.bfn.continuous_flow import ContinuousFlow
from zoo.bfn.denoiser import Denoiser, InPainting
from zoo.bfn.heads import DeltaHead
from zoo.bfn.solvers import (
    ODE1,
    ODE2M,
    ODE2S,
    ODE3M,
    SDE1,
    SDE2M,
    BFNSampler,
    ODEEuler,
    SDEEuler,
    Solver,
    find_solver,
    random_noise,
    solver_names,
)
from zoo.bfn.statistics import DataStatistics

S2 = 1e-3
FLOW = ContinuousFlow(S2)
ALL = [BFNSampler, SDE1, SDE2M, SDEEuler, ODE1, ODE2M, ODE2S, ODE3M, ODEEuler]
FAST = [cls for cls in ALL if cls is not BFNSampler]
GRIDS = ["uniform", "logsnr", "quadratic"]


def gamma(t):
    return 1 - S2**t


class NoiseNetwork:
    """Gives the noise that a denoiser's estimate implies, as a network would, and records what it was asked."""

    def __init__(self, estimate):
        self.estimate = estimate
        self.times = []

    def __call__(self, mu, t):
        self.times.append(t[0].item())
        g = gamma(t).view(-1, *(1,) * (mu.dim() - 1))
        eps = torch.zeros_like(mu) if t[0] == 0 else (mu - g * self.estimate(mu, t)) / (g * (1 - g)).sqrt()
        return eps[..., None]


def gaussian(mean, std):
    """Posterior mean of data N(mean, std^2)."""

    def estimate(mu, t):
        g = gamma(t).view(-1, *(1,) * (mu.dim() - 1))
        return mean + g * std**2 / (g**2 * std**2 + g * (1 - g)) * (mu - g * mean)

    return estimate


def mixture(mu, t):
    """Posterior mean of a mixture of three Gaussians in the plane."""
    centres = torch.tensor([[-0.6, -0.3], [0.5, 0.4], [0.1, -0.5]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    std, g = 0.3, gamma(t)[:, None, None]
    variance = g**2 * std**2 + g * (1 - g)
    offset = mu[:, None] - g * centres
    responsibility = (weights.log() - offset.square().sum(-1) / (2 * variance[..., 0])).softmax(-1)
    return (responsibility[..., None] * (centres + g * std**2 / variance * offset)).sum(1)


def draw(solver, estimate, shape=(2,), num=64, seed=0, **options):
    """The samples, and the network that was asked."""
    network = NoiseNetwork(estimate)
    head = DeltaHead(clip=options.pop("clip", 1e9))
    denoiser = Denoiser(network, FLOW, head, options.pop("guide", None))
    random = SampleRandom(seed, torch.arange(num))
    return solver.sample(denoiser, shape, random, dtype=torch.float64, **options), network


# Formulas of the paper


def coefficients(cls, *times, end):
    return cls().coefficients(FLOW, times, end)


def flat(step):
    return (step.state, *step.estimates, step.noise)


@settings(max_examples=30, deadline=None)
@given(times=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3, unique_by=lambda t: round(t, 2)).map(sorted))
def test_steps_are_those_of_the_paper(times):
    p, a, b = times
    v, g, lam = (lambda t: S2**t), gamma, lambda t: 0.5 * math.log(S2**-t - 1)
    h, r = lam(b) - lam(a), (lam(a) - lam(p)) / (lam(b) - lam(a))
    q, slope = math.exp(-2 * h), 1 / (2 * r)
    ode = (math.sqrt(g(b) * v(b) / (g(a) * v(a))), g(b) * (1 - math.sqrt(q)))
    sde = (v(b) / v(a), g(b) * (1 - q), math.sqrt(g(b) * v(b) * (1 - q)))
    near = {"rel": 1e-7, "abs": 1e-12}
    assert flat(coefficients(ODE1, a, end=b)) == pytest.approx((*ode, 0), **near)
    assert flat(coefficients(SDE1, a, end=b)) == pytest.approx(sde, **near)
    second = (ode[0], ode[1] * (1 + slope), -ode[1] * slope, 0)
    assert flat(coefficients(ODE2M, a, p, end=b)) == pytest.approx(second, **near)
    second = (sde[0], sde[1] * (1 + slope), -sde[1] * slope, sde[2])
    assert flat(coefficients(SDE2M, a, p, end=b)) == pytest.approx(second, **near)
    assert coefficients(ODE2M, a, end=b) == coefficients(ODE1, a, p, end=b)  # the first step has no estimate before it


@settings(max_examples=30, deadline=None)
@given(a=st.floats(0.01, 0.98), d=st.floats(0.001, 0.02), mu=st.floats(-1, 1), x=st.floats(-1, 1), z=st.floats(-3, 3))
def test_euler_steps_are_those_of_the_paper(a, d, mu, x, z):
    g, v, log_variance = gamma(a), S2**a, math.log(S2)
    drift, diffusion = log_variance * v / g, math.sqrt(-log_variance * v)
    score = -(mu - g * x) / math.sqrt(g * v) / math.sqrt(g * v)
    sde = mu + (-drift * mu + diffusion**2 * score) * d + diffusion * math.sqrt(d) * z
    ode = mu + (-drift * mu + diffusion**2 * score / 2) * d
    c = coefficients(SDEEuler, a, end=a + d)
    assert c.state * mu + c.estimates[0] * x + c.noise * z == pytest.approx(sde, rel=1e-9, abs=1e-9)
    c = coefficients(ODEEuler, a, end=a + d)
    assert c.state * mu + c.estimates[0] * x == pytest.approx(ode, rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(a=st.floats(0.01, 0.9), d=st.floats(0.01, 0.1), mu=st.floats(-1, 1), x=st.floats(-1, 1))
def test_first_order_step_in_noise_form_is_the_same(a, d, mu, x):
    b, sd = a + d, lambda t: math.sqrt(gamma(t) * S2**t)
    h = 0.5 * math.log((S2**-b - 1) / (S2**-a - 1))
    eps = (mu - gamma(a) * x) / sd(a)
    c = coefficients(ODE1, a, end=b)
    noise_form = gamma(b) / gamma(a) * mu - sd(b) * math.expm1(h) * eps
    assert c.state * mu + c.estimates[0] * x == pytest.approx(noise_form, rel=1e-9, abs=1e-9)


# Equivalences


def half_log_snr(t):
    return math.log(gamma(t) / math.sqrt(gamma(t) * S2**t))


def predict(mu, t):
    return mixture(mu, torch.full((len(mu),), t, dtype=torch.float64))


def dpm_solver_pp(mu, times, noises, order, stochastic):
    """DPM-Solver++ as its authors write it, with alpha = gamma and sigma = sqrt(gamma (1 - gamma))."""
    alpha, sigma, lam = gamma, lambda t: math.sqrt(gamma(t) * S2**t), half_log_snr
    previous = None
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        data = predict(mu, s)
        h = lam(t) - lam(s)
        slope = 0.0
        if order == 2 and previous is not None:
            slope = (data - previous) * h / (lam(s) - lam(times[i - 1]))
        if stochastic:
            decay = math.exp(-h)
            mu = sigma(t) / sigma(s) * decay * mu - alpha(t) * math.expm1(-2 * h) * (data + slope / 2)
            mu = mu + sigma(t) * math.sqrt(-math.expm1(-2 * h)) * noises[i]
        else:
            mu = sigma(t) / sigma(s) * mu - alpha(t) * math.expm1(-h) * (data + slope / 2)
        previous = data
    return mu


@pytest.mark.parametrize(("cls", "order"), [(ODE1, 1), (ODE2M, 2), (SDE1, 1), (SDE2M, 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_solvers_are_dpm_solver_pp(cls, order, grid):
    solver = cls(nfe=12, grid=grid, last_drop=False)
    noise = random_noise(SampleRandom(0, torch.arange(64)), (2,), torch.float64)
    noises = [noise(i, 0, 0) for i in range(1, 13)]
    start = solver.first_state(FLOW, (2,), noise)
    expected = dpm_solver_pp(start, solver.times(FLOW), noises, order, cls.stochastic)
    assert torch.allclose(draw(solver, mixture)[0].x, expected, rtol=0, atol=1e-11)


def two_calls(mu, s, t):
    """A step of DPM-Solver++(2S) with its middle at half the log-SNR, and the times and values of its two predictions."""
    middle = FLOW.time(math.sqrt(FLOW.beta(s) * FLOW.beta(t)))
    sigma, h = lambda t: math.sqrt(gamma(t) * S2**t), half_log_snr(t) - half_log_snr(s)
    assert half_log_snr(middle) - half_log_snr(s) == pytest.approx(h / 2)
    first = predict(mu, s)
    half = sigma(middle) / sigma(s) * mu - gamma(middle) * math.expm1(-h / 2) * first
    second = predict(half, middle)
    return sigma(t) / sigma(s) * mu - gamma(t) * math.expm1(-h) * second, [(s, first), (middle, second)]


@pytest.mark.parametrize("grid", GRIDS)
def test_single_step_solver_is_dpm_solver_pp_2s(grid):
    solver = ODE2S(nfe=12, grid=grid, last_drop=False)
    mu = solver.first_state(FLOW, (2,), random_noise(SampleRandom(0, torch.arange(64)), (2,), torch.float64))
    assert solver.num_steps == 6
    for s, t in itertools.pairwise(solver.times(FLOW)):
        mu, predictions = two_calls(mu, s, t)
    assert torch.allclose(draw(solver, mixture)[0].x, mu, rtol=0, atol=1e-11)
    dropped = draw(ODE2S(nfe=12, grid=grid), mixture)[0].x
    assert torch.allclose(dropped, predictions[1][1], rtol=0, atol=1e-10)


def dpm_solver_pp_3m(grid, square, n=12):
    """DPM-Solver++(3M) after a step of 2S, with a factor of the term in which the square of the log-SNR is integrated."""
    solver = ODE3M(nfe=n, grid=grid)
    mu = solver.first_state(FLOW, (2,), random_noise(SampleRandom(0, torch.arange(64)), (2,), torch.float64))
    times = solver.times(FLOW)
    mu, known = two_calls(mu, *times[:2])
    for s, t in itertools.pairwise(times[1:]):
        known.append((s, predict(mu, s)))
        (t2, m2), (t1, m1), (_, m0) = known[-3:]
        h, l0, l1, l2 = half_log_snr(t) - half_log_snr(s), half_log_snr(s), half_log_snr(t1), half_log_snr(t2)
        r0, r1 = (l0 - l1) / h, (l1 - l2) / h
        d10, d11 = (m0 - m1) / r0, (m1 - m2) / r1
        d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
        phi1 = math.expm1(-h)
        phi2 = phi1 / h + 1
        phi3 = phi2 / h - 0.5
        decay = math.sqrt(gamma(t) * S2**t / (gamma(s) * S2**s))
        mu = decay * mu + gamma(t) * (-phi1 * m0 + phi2 * d1 - square * phi3 * d2)
    return mu


@pytest.mark.parametrize("grid", GRIDS)
def test_third_order_solver_is_dpm_solver_pp_3m_with_the_whole_square(grid):
    """The authors' code multiplies the divided difference, half a second derivative, by phi_3 instead of 2 phi_3."""
    found = draw(ODE3M(nfe=12, grid=grid, last_drop=False), mixture)[0].x
    assert torch.allclose(found, dpm_solver_pp_3m(grid, square=2), rtol=0, atol=1e-10)
    assert not torch.allclose(found, dpm_solver_pp_3m(grid, square=1), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(times=st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4, unique_by=lambda t: round(t, 2)).map(sorted))
def test_third_order_weights_integrate_quadratics_in_the_log_snr(times):
    *before, start, end = times
    lam = lambda t: math.log(FLOW.beta(t)) / 2  # noqa: E731
    weights = FLOW.extrapolation((start, *before[::-1]), end, stochastic=False)
    a, h = lam(start), lam(end) - lam(start)
    for power in range(3):
        # The mean of (l - a)^power under the density exp(l), by Simpson's rule in l.
        points = torch.linspace(0, h, 2001, dtype=torch.float64)
        simpson = torch.tensor([1.0, *([4.0, 2.0] * 1000)[:-1], 1.0], dtype=torch.float64) * points.exp()
        exact = (simpson * points**power).sum() / simpson.sum()
        found = sum(w * (lam(t) - a) ** power for w, t in zip(weights, (start, *before[::-1]), strict=True))
        assert found == pytest.approx(exact.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 25])
def test_ancestral_sampling_sends_the_estimate_and_updates_the_belief(n):
    """Algorithm 3, written out; it is the first-order SDE solver from t = 0."""
    ancestral, network = draw(BFNSampler(nfe=n + 1), mixture, clip=1.0)
    assert network.times == pytest.approx([i / n for i in range(n + 1)])
    predict, random = Denoiser(NoiseNetwork(mixture), FLOW, DeltaHead()), SampleRandom(0, torch.arange(64))
    noise, state = random_noise(random, (2,), torch.float64), FLOW.prior((64, 2), dtype=torch.float64)
    for step in range(1, n + 1):
        estimate, alpha = predict(state, (step - 1) / n, "sample", random), FLOW.alpha(step, n)
        state = FLOW.update(state, FLOW.sender(estimate, alpha, noise(step, 0.0, 1.0)), alpha, FLOW.beta((step - 1) / n))
    assert torch.allclose(ancestral.x, predict(state, 1.0, "mode", random), rtol=0, atol=1e-11)
    other = draw(SDE1(nfe=n, eta=0.0, last_drop=False), mixture, clip=1.0)[0].x
    assert torch.allclose(other, state, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cls", [ODE1, ODE2M, ODE2S, ODE3M, SDE1, SDE2M])
@pytest.mark.parametrize("grid", sweep(GRIDS))
def test_constant_estimate_is_solved_exactly_by_any_number_of_steps(cls, grid):
    """ODE: the noise that the state seems to hold is scaled down; SDE: the steps' noise adds up to that of one step."""
    x, eta, results = 0.4, 1 / 64, []
    for n in (1, 7, 50):
        solver = cls(nfe=n, eta=eta, grid=grid, last_drop=False, noise="brownian" if cls.stochastic else "independent")
        results.append(draw(solver, lambda mu, t: torch.full_like(mu, x))[0].x)
    for result in results[1:]:
        # The Brownian path is known at multiples of 2^-20 in time; the steps' noise is right in size, not quite in place.
        assert torch.allclose(result, results[0], rtol=0, atol=2e-3 if cls.stochastic else 1e-12)
    if not cls.stochastic:
        z = random_noise(SampleRandom(0, torch.arange(64)), (2,), torch.float64)(0, 0, eta)
        seen = z - gamma(eta) * x / math.sqrt(gamma(eta) * S2**eta)  # the state at eta starts without x
        expected = gamma(1.0) * x + math.sqrt(gamma(1.0) * S2) * seen
        assert torch.allclose(results[0], expected, atol=1e-12)


# Exact solutions


def test_gaussian_data_are_solved_with_the_published_errors():
    """The ODE keeps xi = (mu - gamma m) / sqrt(gamma^2 s^2 + gamma (1 - gamma)); the errors at t = 1 for |xi| <= 2."""
    mean, std, eta = 0.2, 0.15, 0.01
    xi = torch.linspace(-2, 2, 81, dtype=torch.float64)
    spread = lambda t: math.sqrt(gamma(t) ** 2 * std**2 + gamma(t) * S2**t)  # noqa: E731
    start = gamma(eta) * mean + spread(eta) * xi
    exact = gamma(1.0) * mean + spread(1.0) * xi

    def error(cls, n):
        z = (start / math.sqrt(gamma(eta) * S2**eta))[:, None]
        solver = cls(nfe=n, eta=eta, last_drop=False)
        result, _ = draw(solver, gaussian(mean, std), shape=(1,), num=81, noise=lambda *_: z)
        return (result.x[:, 0] - exact).abs().max().item()

    assert [error(ODE1, n) for n in (20, 80, 320)] == pytest.approx([1.4e-2, 3.5e-3, 8.8e-4], rel=0.03)
    assert [error(ODE2M, n) for n in (20, 80, 320)] == pytest.approx([6.6e-4, 8.3e-5, 7.5e-6], rel=0.03)


def test_spread_of_gaussian_data_tends_to_the_exact_one():
    """The SDE's states stay Gaussian: their standard deviation follows from the steps' coefficients alone."""
    std = 0.15
    limit = math.sqrt(gamma(1.0) ** 2 * std**2 + gamma(1.0) * S2)
    found = []
    for n in (10, 100, 1000):
        solver = SDE1(nfe=n, last_drop=False)
        variance = gamma(0.01) * S2**0.01
        for step in solver.plan(FLOW):
            (a, (b,), d), g = step.coefficients, gamma(step.start)
            gain = g * std**2 / (g**2 * std**2 + g * (1 - g))
            variance = (a + b * gain) ** 2 * variance + d**2
        found.append(math.sqrt(variance))
    assert found == pytest.approx([0.1306, 0.1506, 0.1529], abs=1e-4)
    assert limit == pytest.approx(0.15315, abs=1e-5)
    assert limit - found[2] < limit - found[1] < limit - found[0]


# Orders of convergence


def orders(cls, reference, steps, **options):
    """log2 of the ratio of errors at each doubling of the steps."""
    errors = []
    for n in steps:
        found = draw(cls(nfe=n, last_drop=False, **options), mixture)[0].x
        errors.append((found - reference).square().mean().sqrt().item())
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def test_ode_solvers_converge_with_their_orders():
    reference = draw(ODE3M(nfe=2048, last_drop=False), mixture)[0].x
    steps = (20, 40, 80, 160, 320)
    assert orders(ODE1, reference, steps)[1:] == pytest.approx([1, 1, 1], abs=0.03)
    assert orders(ODEEuler, reference, steps)[1:] == pytest.approx([1, 1, 1], abs=0.05)
    for cls, first, last in ((ODE2M, 1.3, 1.7), (ODE2S, 1.6, 1.9), (ODE3M, 1.9, 2.5)):
        found = orders(cls, reference, steps)
        assert found == sorted(found)  # still approaching 2, 2 and 3
        assert found[0] > first
        assert last < found[-1] < cls().order + 0.1


def test_ode_solvers_have_reached_their_orders_on_the_log_snr_grid():
    reference = draw(ODE3M(nfe=1024, grid="logsnr", last_drop=False), mixture)[0].x
    for cls, order in ((ODE1, 1), (ODE2M, 2), (ODE2S, 2), (ODE3M, 3)):
        assert orders(cls, reference, (40, 80, 160), grid="logsnr") == pytest.approx([order] * 2, abs=0.05)


def test_better_solvers_are_closer_to_the_solution_at_equal_calls():
    reference = draw(ODE3M(nfe=512, last_drop=False), mixture)[0].x
    error = {c: (draw(c(nfe=20), mixture)[0].x - reference).square().mean() for c in (ODEEuler, ODE1, ODE2M, ODE3M)}
    assert error[ODE3M] < error[ODE2M] < error[ODE1] < error[ODEEuler]


# Calls, names and options


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("nfe", [2, 3, 10])
def test_network_is_called_as_often_as_asked(cls, nfe):
    sample, network = draw(cls(nfe=nfe), mixture, record=True)
    assert sample.nfe == len(network.times) == nfe
    assert sample.trajectory.shape == (64, nfe, 2)
    assert torch.equal(sample.trajectory[:, -1], sample.x)
    assert network.times == sorted(network.times)


@pytest.mark.parametrize("cls", FAST)
def test_last_estimate_or_last_state_is_the_sample(cls):
    dropped, _ = draw(cls(nfe=9), mixture)
    kept, network = draw(cls(nfe=9, last_drop=False), mixture, record=True)
    assert kept.nfe == len(network.times) == 9
    assert kept.trajectory.shape[1] == 10
    assert torch.allclose(kept.trajectory[:, 8], dropped.x, atol=1e-12)
    assert not torch.allclose(kept.x, dropped.x, atol=1e-5)


@pytest.mark.parametrize(("second", "first"), [(ODE2M, ODE1), (SDE2M, SDE1)])
def test_single_step_of_second_order_solvers_is_not_dropped(second, first):
    assert torch.equal(draw(second(nfe=1), mixture)[0].x, draw(first(nfe=1, last_drop=False), mixture)[0].x)
    dropped = draw(first(nfe=1), mixture)[0]
    start = first().first_state(FLOW, (2,), random_noise(SampleRandom(0, torch.arange(64)), (2,), torch.float64))
    assert torch.allclose(dropped.x, mixture(start, torch.full((64,), 0.01, dtype=torch.float64)), atol=1e-9)


def test_single_step_solver_with_an_odd_number_of_calls_ends_in_one_of_first_order():
    for nfe in (1, 7):
        kept, dropped = ODE2S(nfe=nfe, last_drop=False), ODE2S(nfe=nfe)
        times = kept.times(FLOW)
        mu = kept.first_state(FLOW, (2,), random_noise(SampleRandom(0, torch.arange(64)), (2,), torch.float64))
        for s, t in itertools.pairwise(times[:-1]):
            mu, _ = two_calls(mu, s, t)
        assert torch.allclose(draw(dropped, mixture)[0].x, predict(mu, times[-2]), rtol=0, atol=1e-9)
        c = coefficients(ODE1, times[-2], end=1.0)
        expected = c.state * mu + c.estimates[0] * predict(mu, times[-2])
        assert torch.allclose(draw(kept, mixture)[0].x, expected, rtol=0, atol=1e-9)


def test_third_order_solver_with_few_calls_is_one_of_lower_order():
    def same(one, other):
        assert torch.equal(draw(one, mixture)[0].x, draw(other, mixture)[0].x)

    same(ODE3M(nfe=1), ODE1(nfe=1, last_drop=False))
    same(ODE3M(nfe=2), ODE2S(nfe=2))
    same(ODE3M(nfe=2, last_drop=False), ODE2S(nfe=2, last_drop=False))


@pytest.mark.parametrize("cls", [SDEEuler, ODEEuler])
@pytest.mark.parametrize("last_drop", [True, False])
def test_extra_step_predicts_once_more_at_the_end(cls, last_drop):
    extra, network = draw(cls(nfe=8, extra_step=True, last_drop=last_drop), mixture, record=True)
    assert extra.nfe == len(network.times) == extra.trajectory.shape[1] == 8
    assert network.times == pytest.approx(cls(nfe=7).times(FLOW))
    state = draw(cls(nfe=7, last_drop=False), mixture)[0].x
    assert torch.allclose(extra.x, predict(state, 1.0), rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="nfe=1 must be at least 2"):
        cls(nfe=1, extra_step=True)


@pytest.mark.parametrize("cls", [SDE1, SDEEuler, ODEEuler])
def test_drawing_from_a_prediction_of_one_value_changes_nothing(cls):
    assert torch.equal(draw(cls(categorical=True), mixture)[0].x, draw(cls(), mixture)[0].x)


@pytest.mark.parametrize("nfe", [0, -3])
@pytest.mark.parametrize("cls", ALL)
def test_no_calls_are_refused(cls, nfe):
    with pytest.raises(ValueError, match=f"{cls.__name__}: nfe={nfe} must be at least"):
        cls(nfe=nfe)


def test_ancestral_sampling_needs_two_calls():
    with pytest.raises(ValueError, match="at least 2"):
        BFNSampler(nfe=1)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("ode_bfnsolver1", ODE1),
        ("BFN-Solver++1", ODE1),
        ("ode_bfnsolver2_multi_step", ODE2M),
        ("ode_bfnsolver2_single_step", ODE2S),
        ("ode2s", ODE2S),
        ("ode3m", ODE3M),
        ("BFN-Solver1", ODE1),
        ("BFN-Solver2", ODE2M),
        ("SDE-BFN-Solver1", SDE1),
        ("SDE-BFN-Solver2", SDE2M),
        ("SDE-Euler", SDEEuler),
        ("ODE-Euler", ODEEuler),
        ("BFN-Solver++2", ODE2M),
        ("sde_bfnsolver2_multi_step", SDE2M),
        ("SDE-BFN-Solver++2", SDE2M),
        ("sde_bfnsolver1", SDE1),
        ("sde-bfn-solver2", SDE2M),
        ("sde_euler", SDEEuler),
        ("ode_euler", ODEEuler),
        ("bfn", BFNSampler),
        ("ancestral", BFNSampler),
        ("ODE2M", ODE2M),
        ("BFNSampler", BFNSampler),
    ],
)
def test_published_names_find_their_solver(name, cls):
    assert find_solver(name) is cls
    assert find_solver(cls.names[0]) is cls
    assert cls.names[0] in solver_names()


def test_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"no sampler 'ode4m'\. Did you mean .*ode[23]m"):
        find_solver("ode4m")


class Halfway(ODE1):
    """A user's solver."""

    def __init__(self, gain: float = 1.0, nfe: int = 4) -> None:
        super().__init__(nfe=nfe)
        self.gain = gain


def test_users_solvers_are_found_and_rebuilt():
    assert find_solver("Halfway") is Halfway
    again = Halfway(gain=2.0).rebuilt(nfe=6)
    assert (type(again), again.gain, again.nfe) == (Halfway, 2.0, 6)
    assert find_solver("ode1") is ODE1


def test_rebuilding_keeps_what_both_solvers_have():
    solver = ODE2M(nfe=7, eta=0.05, grid="logsnr").rebuilt("sde1")
    assert (type(solver), solver.nfe, solver.eta, solver.grid) == (SDE1, 7, 0.05, "logsnr")
    assert SDE1(eta=0.05).rebuilt("ancestral", 5).init_config["init_args"] == {"nfe": 5, "noise": "independent"}
    assert BFNSampler(nfe=9).rebuilt("ode2m").eta == 0.01
    assert BFNSampler(noise="brownian").rebuilt("sde2m").noise == "brownian"
    drawn = SDEEuler(categorical=True, extra_step=True).rebuilt("sde1")
    assert (drawn.statistic, drawn.extra_calls) == ("sample", 0)
    assert drawn.rebuilt("ode2m").statistic == "mean"


@pytest.mark.parametrize(
    ("grid", "scale"),
    [("uniform", lambda t: t), ("logsnr", lambda t: math.log(FLOW.beta(t))), ("quadratic", lambda t: math.sqrt(t - 0.02))],
)
def test_grids_are_even_on_their_scale(grid, scale):
    times = ODE1(nfe=8, eta=0.02, grid=grid).times(FLOW)
    assert (times[0], times[-1], len(times)) == (0.02, 1.0, 9)
    gaps = [scale(b) - scale(a) for a, b in itertools.pairwise(times)]
    assert gaps == pytest.approx([gaps[0]] * 8)
    assert ODE1(nfe=1, eta=0.02, grid=grid).times(FLOW) == [0.02, 1.0]


def test_bad_options_are_refused(tmp_path: Path):
    for options, message in [
        ({"eta": 1.0}, "eta=1.0 must lie in"),
        ({"eta": -0.1}, "eta=-0.1 must lie in"),
        ({"grid": "log"}, "grid='log'"),
        ({"start": "best"}, "start='best' must be one of 'zero', 'optimal'"),
        ({"noise": "white"}, "noise='white' must be one of 'independent', 'brownian'"),
        ({"start": "optimal"}, "belong together"),
        ({"statistics": tmp_path / "a.pt"}, "belong together"),
    ]:
        with pytest.raises(ValueError, match=message):
            SDE1(**options)
    for cls, options in [(ODE1, {}), (ODE2M, {}), (ODE2S, {}), (ODE3M, {}), (ODEEuler, {}), (SDE1, {"grid": "logsnr"})]:
        with pytest.raises(ValueError, match="eta must be greater than 0"):
            cls(eta=0.0, **options)


@pytest.mark.parametrize("cls", [SDE1, SDE2M, SDEEuler])
def test_sde_solvers_start_at_time_zero(cls):
    result = draw(cls(eta=0.0, nfe=8), mixture)[0]
    assert result.x.isfinite().all()
    # Second-order extrapolation from t = 0, infinitely far away in the log-SNR, has no weight.
    second = coefficients(SDE2M, 0.1, 0.0, end=0.2)
    assert second == coefficients(SDE1, 0.1, end=0.2)._replace(estimates=(*coefficients(SDE1, 0.1, end=0.2).estimates, 0.0))


# Start


def test_optimal_start_of_centred_points_is_the_zero_start(tmp_path: Path):
    path = tmp_path / "statistics.pt"
    DataStatistics(torch.zeros(2), torch.zeros(2)).save(path)
    zero, optimal = draw(SDE1(), mixture)[0], draw(SDE1(start="optimal", statistics=path), mixture)[0]
    assert torch.equal(zero.x, optimal.x)


def test_optimal_start_has_the_moments_of_the_flow(tmp_path: Path):
    """mu(eta) ~ N(gamma m, gamma (1 - gamma) + gamma^2 tr / D)."""
    data = torch.tensor([[0.5, -0.1], [0.1, 0.7], [0.3, 0.6]], dtype=torch.float64)
    path = tmp_path / "statistics.pt"
    statistics = DataStatistics.of([data[:2], data[2:]])
    assert torch.allclose(statistics.mean, data.mean(0))
    assert torch.allclose(statistics.std, data.std(0, correction=0))
    statistics.save(path)
    z, eta = torch.ones(1, 2, dtype=torch.float64), 0.05
    state = SDE1(eta=eta, start="optimal", statistics=path).first_state(FLOW, (2,), lambda *_: z)
    g = gamma(eta)
    std = math.sqrt(g * (1 - g) + g**2 * data.var(0, correction=0).sum().item() / 2)
    assert torch.allclose(state, g * data.mean(0) + std * z, atol=1e-6)


def test_bad_statistics_are_refused(tmp_path: Path):
    path = tmp_path / "statistics.pt"
    DataStatistics(torch.zeros(3), torch.zeros(3)).save(path)
    with pytest.raises(ValueError, match=r"shape \(3,\), but the model's data has \(2,\)"):
        draw(SDE1(start="optimal", statistics=path), mixture)
    torch.save({"mu": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds mu; data statistics need `mean` and `std`"):
        DataStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        DataStatistics.load(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="one shape"):
        DataStatistics(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="no data"):
        DataStatistics.of([])


# Noise, seeds and guides


@pytest.mark.parametrize("cls", ALL)
def test_sample_depends_on_its_seed_and_number_only(cls):
    everything = draw(cls(nfe=5), mixture, num=7)[0].x
    network = NoiseNetwork(mixture)
    some = SampleRandom(0, torch.tensor([5, 2]))
    part = cls(nfe=5).sample(Denoiser(network, FLOW, DeltaHead(clip=1e9)), (2,), some, dtype=torch.float64).x
    assert torch.allclose(part, everything[[5, 2]], rtol=0, atol=1e-13)
    assert not torch.allclose(draw(cls(nfe=5), mixture, num=7, seed=1)[0].x, everything, atol=1e-3)


@pytest.mark.parametrize("cls", ALL)
def test_noise_of_the_caller_replaces_the_drawn_one(cls):
    asked = []

    def noise(number, start, end):
        asked.append((number, round(start, 6), round(end, 6)))
        return torch.zeros(3, 2, dtype=torch.float64)

    result = draw(cls(nfe=4), lambda mu, t: 0.5 * torch.ones_like(mu), num=3, noise=noise)[0]
    assert torch.allclose(result.x, torch.full((3, 2), 0.5, dtype=torch.float64), atol=1e-9)
    times = [0.0, *cls(nfe=4).times(FLOW)]
    drawn = 3 if cls.stochastic else 0
    assert asked == [(i, round(times[i], 6), round(times[i + 1], 6)) for i in range(drawn + 1)]


def two_points(mu, t):
    """Posterior mean of vectors whose elements are all 0.5 or all -0.5."""
    g = gamma(t)[:, None]
    return 0.5 * torch.tanh(0.5 * mu.sum(-1, keepdim=True) / (1 - g)).expand_as(mu)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("last_drop", [True, False])
def test_in_painting_keeps_what_is_known_and_guides_the_rest(cls, last_drop):
    known = torch.full((64, 20), 0.5, dtype=torch.float64)
    known[:, 15:] = math.nan
    options = {} if cls is BFNSampler else {"last_drop": last_drop}
    free, _ = draw(cls(nfe=40, **options), two_points, shape=(20,))
    assert free.x.gt(0).double().mean() == pytest.approx(0.5, abs=0.25)
    guide = InPainting(known, torch.arange(20) < 15)
    result, _ = draw(cls(nfe=40, **options), two_points, shape=(20,), guide=guide)
    assert result.x[:, :15].eq(0.5).all()
    assert result.x[:, 15:].gt(0).double().mean() > 0.9


def test_guide_sees_every_estimate_with_its_state_and_time():
    seen = []

    def guide(estimate, state, t):
        seen.append((t, state.shape))
        return estimate + 0.1

    plain = draw(ODE1(nfe=1), mixture)[0].x
    guided = draw(ODE1(nfe=1), mixture, guide=guide)[0].x
    assert torch.allclose(guided, plain + 0.1)
    assert seen == [(0.01, (64, 2))]


def test_estimates_are_clipped_at_every_step():
    _, network = draw(ODE2M(nfe=6), lambda mu, t: torch.full_like(mu, 5.0), clip=1.0)
    clipped = draw(ODE2M(nfe=6), lambda mu, t: torch.full_like(mu, 5.0), clip=1.0, record=True)[0]
    assert clipped.trajectory.eq(1).all()
    assert len(network.times) == 6


@pytest.mark.parametrize("cls", ALL)
def test_float32_follows_float64(cls):
    exact = draw(cls(nfe=10), mixture)[0].x
    random = SampleRandom(0, torch.arange(64))
    denoiser = Denoiser(lambda mu, t: NoiseNetwork(mixture)(mu.double(), t.double()), FLOW, DeltaHead(clip=1e9))
    single = cls(nfe=10).sample(denoiser, (2,), random).x
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), exact, atol=2e-4)


def test_every_solver_states_its_interface():
    for cls in ALL:
        assert issubclass(cls, Solver)
        assert cls().init_config["init_args"]["nfe"] == 10
