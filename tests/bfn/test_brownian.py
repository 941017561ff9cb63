"""Brownian noise: exact covariances, additivity, independence of the batch, and one limit of all stochastic solvers (float64)."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.base.random import SampleRandom
from zoo.bfn import ODE2M, SDE1, SDE2M, BFNSampler, BrownianNoise, ContinuousFlow, DeltaHead, Denoiser, DiscreteFlow, SDEEuler
from zoo.bfn.solvers import Solver

FLOWS = [ContinuousFlow(1e-3), ContinuousFlow(1e-6), DiscreteFlow(5, 1.5)]
STOCHASTIC = [SDE1, SDE2M, SDEEuler, BFNSampler]


class Axes:
    """In place of random numbers: each draw is an axis of its own, so that noise shows of which draws it consists."""

    def __init__(self, size=400):
        self.size = size
        self.names = {}

    def normal(self, name, shape, dtype):
        index = self.names.setdefault(name, len(self.names))
        axis = torch.zeros(1, self.size, dtype=dtype)
        axis[0, index] = 1
        return axis


def path(flow, num=3, shape=(2,), seed=0, **options):
    return BrownianNoise(flow, SampleRandom(seed, torch.arange(num)), shape, torch.float64, **options)


# The path


@settings(max_examples=30, deadline=None)
@given(
    times=st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=6, unique_by=lambda t: round(t, 4)).map(sorted),
    flow=st.sampled_from(FLOWS),
)
def test_noise_of_all_steps_is_exactly_standard_and_independent(times, flow):
    noise = BrownianNoise(flow, Axes(), (), torch.float64)
    steps = torch.cat([noise(i, a, b) for i, (a, b) in enumerate(itertools.pairwise([0.0, *times]))])
    assert torch.allclose(steps @ steps.T, torch.eye(len(times), dtype=torch.float64), rtol=0, atol=1e-9)


def test_drawn_noise_is_standard_normal_and_independent():
    noise = path(FLOWS[0], num=20_000, shape=())
    steps = torch.stack([noise(i, a, b) for i, (a, b) in enumerate(itertools.pairwise((0.0, 0.01, 0.3, 0.301, 0.9, 1.0)))])
    assert torch.allclose(torch.cov(steps), torch.eye(5, dtype=torch.float64), rtol=0, atol=4.5 / math.sqrt(20_000))
    assert steps.mean(1).abs().max() < 4.5 / math.sqrt(20_000)
    assert (steps.pow(4).mean(1) - 3).abs().max() < 4.5 * math.sqrt(96 / 20_000)


@pytest.mark.parametrize("flow", FLOWS)
def test_two_steps_noise_combines_to_that_of_both_together(flow):
    start, middle, end = 3 / 64, 5 / 32, 5 / 8
    noise, gain = path(flow), lambda a, b: math.sqrt(flow.beta(b) - flow.beta(a))
    together = gain(start, end) * noise(1, start, end)
    apart = gain(start, middle) * noise(1, start, middle) + gain(middle, end) * noise(2, middle, end)
    assert torch.allclose(together, apart, rtol=0, atol=1e-12)
    assert not torch.allclose(noise(1, start, middle), noise(2, middle, end), atol=0.01)


@settings(max_examples=10, deadline=None)
@given(asked=st.lists(st.tuples(st.floats(0, 0.99), st.floats(0.001, 0.5)), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_noise_depends_on_its_interval_only(asked, seed):
    """Neither on what was asked before, nor on the order of asking."""
    intervals = [(a, min(1.0, a + d)) for a, d in asked]
    noise = path(FLOWS[0], seed=seed)
    forward = [noise(1, *interval) for interval in intervals]
    backward = [noise(2, *interval) for interval in intervals[::-1]][::-1]
    for interval, one, other in zip(intervals, forward, backward, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, path(FLOWS[0], seed=seed)(3, *interval))


def test_noise_depends_on_seed_and_sample_only():
    some = BrownianNoise(FLOWS[0], SampleRandom(0, torch.tensor([5, 2])), (3,), torch.float64)
    everything = path(FLOWS[0], num=8, shape=(3,))(1, 0.2, 0.7)
    assert torch.equal(some(1, 0.2, 0.7), everything[[5, 2]])
    assert not torch.allclose(path(FLOWS[0], num=8, shape=(3,), seed=1)(1, 0.2, 0.7), everything, atol=0.01)
    assert path(FLOWS[0], depth=12)(1, 0.25, 0.75).equal(path(FLOWS[0])(1, 0.25, 0.75))


def test_steps_in_order_draw_each_value_once_and_keep_one_way_through_the_tree():
    axes = Axes(size=2000)
    noise = BrownianNoise(FLOWS[0], axes, (), torch.float64)
    calls = []
    axes.normal = lambda name, *args, inner=axes.normal: calls.append(name) or inner(name, *args)
    times = SDE1(nfe=40).times(FLOWS[0])
    for start, end in itertools.pairwise([0.0, *times]):
        noise(0, start, end)
        assert len(noise._path) <= noise.depth + 2
    assert len(calls) == len(set(calls)) < 40 * 20


def test_steps_below_the_resolution_are_refused_and_empty_ones_are_zero():
    noise = path(FLOWS[0])
    assert noise(0, 0.0, 0.0).eq(0).all()
    with pytest.raises(ValueError, match=r"from t=0\.5 to 0\.5000001 is shorter than the path's resolution 2\^-20"):
        noise(1, 0.5, 0.5000001)
    assert path(FLOWS[0], depth=24)(1, 0.5, 0.5000001).isfinite().all()


# Solvers on it


class Network:
    """Exact for data in the plane that are normal around one of three centres."""

    def __call__(self, mu, t):
        centres = torch.tensor([[-0.6, -0.3], [0.5, 0.4], [0.1, -0.5]], dtype=torch.float64)
        g = (1 - 1e-3**t)[:, None, None].clamp(min=1e-12)
        variance = g**2 * 0.09 + g * (1 - g)
        offset = mu[:, None] - g * centres
        share = (-offset.square().sum(-1) / (2 * variance[..., 0])).softmax(-1)
        x = (share[..., None] * (centres + g * 0.09 / variance * offset)).sum(1)
        return ((mu - g[:, 0] * x) / (g[:, 0] * (1 - g[:, 0])).sqrt())[..., None]


def draw(solver: Solver, index=range(32), seed=0, dtype=torch.float64, **options):
    denoiser = Denoiser(lambda mu, t: Network()(mu.double(), t.double()), FLOWS[0], DeltaHead(clip=1e9))
    return solver.sample(denoiser, (2,), SampleRandom(seed, torch.tensor(list(index))), dtype=dtype, **options).x


@pytest.mark.parametrize("cls", STOCHASTIC)
def test_option_of_the_solver_is_the_noise_that_users_can_pass(cls):
    mine = BrownianNoise(FLOWS[0], SampleRandom(0, torch.arange(32)), (2,), torch.float64)
    assert torch.equal(draw(cls(nfe=6, noise="brownian")), draw(cls(nfe=6), noise=mine))
    assert not torch.allclose(draw(cls(nfe=6, noise="brownian")), draw(cls(nfe=6)), atol=0.01)


@pytest.mark.parametrize("cls", [*STOCHASTIC, ODE2M])
def test_samples_depend_on_seed_and_number_only(cls):
    solver = cls(nfe=5, noise="brownian")
    assert torch.allclose(draw(solver, [5, 2]), draw(solver)[[5, 2]], rtol=0, atol=1e-13)
    assert not torch.allclose(draw(solver, seed=1), draw(solver), atol=0.01)
    assert torch.allclose(draw(solver, dtype=torch.float32).double(), draw(solver), atol=1e-3)


def test_all_stochastic_solvers_converge_along_the_path_to_one_limit():
    """Path by path, with order 1; from t = 1/64 with steps at multiples of 2^-10, where the path is known exactly."""
    options = {"eta": 1 / 64, "noise": "brownian", "last_drop": False}
    reference = draw(SDE2M(nfe=63 * 16, **options), range(128))
    independent = draw(SDE2M(nfe=63 * 2, eta=1 / 64, last_drop=False), range(128))
    assert (independent - reference).square().mean().sqrt() > 0.3
    for cls in (SDE1, SDE2M, SDEEuler):
        solvers = [cls(nfe=n, **options) for n in (21, 42, 84)]
        errors = [(draw(solver, range(128)) - reference).square().mean().sqrt().item() for solver in solvers]
        found = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
        assert found == pytest.approx([1, 1], abs=0.35)
        assert errors[-1] < 0.1


def test_ancestral_sampling_converges_along_the_path_too():
    errors = [
        (draw(BFNSampler(n + 1, noise="brownian")) - draw(BFNSampler(513, noise="brownian"))).abs().mean() for n in (16, 64)
    ]
    assert errors[1] < errors[0] / 2.5


def test_start_lies_on_the_path():
    """Starts at different times are states of one path, whose increments are independent."""
    starts = [SDE1(eta=eta).first_state(FLOWS[0], (2,), path(FLOWS[0], num=500)) for eta in (1 / 64, 1 / 32)]
    known = [s / (FLOWS[0].scale(t)) for s, t in zip(starts, (1 / 64, 1 / 32), strict=True)]
    gain = (known[1] - known[0]).square().mean() / (FLOWS[0].beta(1 / 32) - FLOWS[0].beta(1 / 64))
    assert gain == pytest.approx(1, abs=0.2)
    assert torch.corrcoef(torch.stack([(known[1] - known[0]).flatten(), known[0].flatten()]))[0, 1].abs() < 0.15
