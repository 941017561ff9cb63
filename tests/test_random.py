"""Random numbers of `zoo.random`: published values, laws, and independence of everything but the sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.random import SampleRandom, splitmix64

GOLDEN = 0x9E3779B97F4A7C15


def signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
    ],
)
def test_splitmix64_gives_the_published_values(seed, outputs):
    states = torch.tensor([signed(seed + i * GOLDEN) for i in range(1, len(outputs) + 1)])
    assert [value % 2**64 for value in splitmix64(states).tolist()] == outputs


def ks_distance(draws, cdf):
    """Kolmogorov-Smirnov distance; the 0.1 % quantile for n draws is 1.95 / sqrt(n)."""
    ordered = draws.flatten().double().sort().values
    expected = cdf(ordered)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_their_laws(dtype):
    random = SampleRandom(0, torch.arange(4000))
    normal, uniform = random.normal("z", (5, 5), dtype), random.uniform("u", (5, 5), dtype)
    assert normal.dtype == uniform.dtype == dtype
    assert normal.shape == uniform.shape == (4000, 5, 5)
    bound = 1.95 / math.sqrt(normal.numel())
    assert ks_distance(normal, torch.special.ndtr) < bound
    assert ks_distance(uniform, lambda u: u) < bound
    assert normal.mean().abs() < 4 / math.sqrt(normal.numel())
    assert abs(normal.square().mean() - 1) < 4 * math.sqrt(2 / normal.numel())
    assert abs(normal.pow(4).mean() - 3) < 4 * math.sqrt(96 / normal.numel())
    assert 0 <= uniform.min() < uniform.max() < 1
    # Elements of a sample, the two halves of a Box-Muller pair among them, are uncorrelated.
    correlation = torch.corrcoef(normal.flatten(1).T.double()) - torch.eye(25)
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_stream_of_one_sample_follows_the_law_too():
    random = SampleRandom(5, torch.tensor([12]))
    assert ks_distance(random.normal("z", (50_000,)), torch.special.ndtr) < 1.95 / math.sqrt(50_000)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(7)), size=st.integers(1, 7))
def test_draws_do_not_depend_on_the_batch(order, size):
    together = SampleRandom(3, torch.arange(7), epoch=2)
    part = torch.tensor(order[:size])
    apart = SampleRandom(3, part, epoch=2)
    assert torch.equal(apart.normal("z", (3,)), together.normal("z", (3,))[part])
    assert torch.equal(apart.uniform("u"), together.uniform("u")[part])
    assert torch.equal(apart.integers("i", 10, (2,)), together.integers("i", 10, (2,))[part])
    assert torch.equal(apart.stratified("t"), together.stratified("t")[part])


def test_draws_do_not_depend_on_the_order_of_draws():
    one, other = SampleRandom(0, torch.arange(3)), SampleRandom(0, torch.arange(3))
    first = one.normal("a", (4,))
    other.normal("b", (9,))
    assert torch.equal(other.normal("a", (4,)), first)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_other_seed_epoch_name_or_sample_is_independent(draw):
    index = torch.arange(2000)
    base = getattr(SampleRandom(0, index), draw)("z", (10,))
    others = {
        "seed": getattr(SampleRandom(1, index), draw)("z", (10,)),
        "epoch": getattr(SampleRandom(0, index, epoch=1), draw)("z", (10,)),
        "evaluation": getattr(SampleRandom(0, index, epoch=-1), draw)("z", (10,)),
        "name": getattr(SampleRandom(0, index), draw)("y", (10,)),
        "sample": getattr(SampleRandom(0, index + 5000), draw)("z", (10,)),
    }
    streams = torch.stack([base.flatten(), *(other.flatten() for other in others.values())])
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 4.5 / math.sqrt(20_000)


def test_float64_draws_are_the_float32_draws_with_more_digits():
    random = SampleRandom(0, torch.arange(1000))
    normal, uniform = random.normal("z", (8,)).double(), random.uniform("u", (8,)).double()
    assert torch.allclose(normal, random.normal("z", (8,), torch.float64), atol=1e-4)
    assert torch.allclose(uniform, random.uniform("u", (8,), torch.float64), rtol=0, atol=2**-24)


def test_integers_are_uniform_and_stay_in_range():
    draws = SampleRandom(0, torch.arange(7000)).integers("class", 7, (10,))
    counts = draws.flatten().bincount(minlength=7).double()
    assert draws.dtype == torch.int64
    assert ((counts - 10_000).square() / 10_000).sum() < 27.9  # chi-squared of 6 degrees of freedom, 0.01 %
    assert SampleRandom(0, torch.arange(9)).integers("one", 1).eq(0).all()
    assert SampleRandom(0, torch.arange(2000)).integers("all", 2**31).max() > 2**31 - 2**24


def test_stratified_draws_cover_the_interval_evenly_in_every_run_of_samples():
    for start in (0, 1000, 123_456_789):
        times = SampleRandom(0, torch.arange(start, start + 233)).stratified("t", torch.float64)
        assert ks_distance(times, lambda u: u) < 3 / 233  # independent draws: about 0.87 / sqrt(233) = 13 / 233
    shifts = torch.cat([SampleRandom(seed, torch.tensor([9])).stratified("t") for seed in range(2000)])
    assert ks_distance(shifts, lambda u: u) < 1.95 / math.sqrt(2000)
    first, second = (SampleRandom(0, torch.arange(3), epoch).stratified("t") for epoch in (0, 1))
    assert first.ne(second).all()


def test_scalars_and_odd_numbers_of_elements():
    random = SampleRandom(0, torch.arange(4))
    assert random.normal("z").shape == random.uniform("u").shape == (4,)
    assert random.normal("z", (3,)).isfinite().all()
    assert random.normal("z", (0,)).shape == (4, 0)
    assert len(random) == 4


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="sample numbers as an integer tensor"):
        SampleRandom(0, torch.zeros(3))
    with pytest.raises(ValueError, match="sample numbers as an integer tensor"):
        SampleRandom(0, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        SampleRandom(0, torch.arange(3)).normal("z", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="high=0"):
        SampleRandom(0, torch.arange(3)).integers("i", 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not measured: no GPU")
def test_gpu_draws_what_the_cpu_draws():
    index = torch.arange(1000)
    cpu, gpu = SampleRandom(0, index), SampleRandom(0, index.cuda())
    assert torch.equal(cpu.bits("b", 9), gpu.bits("b", 9).cpu())
    assert torch.equal(cpu.uniform("u", (9,)), gpu.uniform("u", (9,)).cpu())
    assert torch.allclose(cpu.normal("z", (9,)), gpu.normal("z", (9,)).cpu(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_draws_at_once_are_those_one_after_the_other(dtype):
    random = SampleRandom(3, torch.arange(70))
    names = [f"noise {i}" for i in range(5)]
    together = random.normals(names, (3, 5), dtype)
    assert torch.equal(together, torch.stack([random.normal(name, (3, 5), dtype) for name in names]))
