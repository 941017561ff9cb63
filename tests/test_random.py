"""Random numbers of `zoo.base.random`: published values, laws, and independence of everything but the sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.base.random import _FACTORS, _SHIFTS, SampleRandom, _halves, _mix_halves_, splitmix64

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


def test_pairs_of_normal_draws_are_independent_and_reach_as_far_as_they_should():
    draws = SampleRandom(1, torch.arange(20_000)).normal("z", (100,))
    for limit in (1.0, 3.0, 4.0, 4.5):
        expected = draws.numel() * math.erfc(limit / math.sqrt(2))
        assert abs((draws.abs() > limit).sum() - expected) < 4.5 * math.sqrt(expected)
    assert 4.7 < draws.abs().max() < 6.7
    # Both draws of a pair come from one radius and one angle: their cell in the plane, and its eighth of the circle.
    first, second = draws[:, :50].flatten(), draws[:, 50:].flatten()
    sixteenths = (torch.special.ndtr(torch.stack((first, second)).double()) * 16).long()
    cells = (16 * sixteenths[0] + sixteenths[1]).bincount(minlength=256).double()
    angle = torch.atan2(second, first).div(math.pi / 4).floor().long().add(4).clamp(max=7).bincount(minlength=8).double()
    for counts, bound in ((cells, 345.0), (angle, 30.0)):  # chi-squared of 255 and 7 degrees of freedom, 0.01 %
        assert ((counts - counts.mean()).square() / counts.mean()).sum() < bound


def test_mixing_of_halves_can_be_undone():
    words = SampleRandom(0, torch.arange(100)).bits("w", 3).flatten()
    one, other = _mix_halves_(_halves(words)).tolist()
    products = list(zip(_SHIFTS, _FACTORS[1:], strict=False))
    for word, a, b in zip(words.tolist(), one, other, strict=True):
        a -= _FACTORS[4] * b
        b ^= signed(a << 32) >> 32 + _SHIFTS[3]
        for i, (shift, factor) in reversed(list(enumerate(products[:3]))):
            source = signed((a if i % 2 else b) << 32) >> 32
            step = factor * source * (source >> shift)
            a, b = (a, b - step) if i % 2 else (a - step, b)
        b -= _FACTORS[0] * a
        assert signed((a % 2**32 << 32) + b % 2**32) == word


@pytest.mark.parametrize("distance", ["one bit", "one", "at random"])
def test_mixing_of_halves_scatters_neighbouring_words(distance):
    """Words of random keys, and those at a fixed distance: any four bits of both are independent, any bit flips half the time."""
    keys, num = _halves(splitmix64(torch.arange(2**14))), 2**14
    one = _mix_halves_(keys.clone())
    ends = (one[0] >> 28 & 15, one[0] & 15, one[1] >> 28 & 15, one[1] & 15)
    for i in range(64):
        steps = {"one bit": 1 << i, "one": 1 + (i % 2 << 32), "at random": int(splitmix64(torch.tensor(-1 - i)))}
        step = _halves(torch.tensor([signed(steps[distance] % 2**64)]))
        other = _mix_halves_(keys + step)
        for part in ends:
            for end in (other[0] >> 28 & 15, other[0] & 15, other[1] >> 28 & 15, other[1] & 15):
                counts = (16 * part + end).bincount(minlength=256).double()
                assert (counts - num / 256).square().sum() / (num / 256) < 400  # 255 degrees of freedom: 1e-8
        flips = (one ^ other)[..., None] >> torch.arange(32, dtype=torch.int32) & 1
        assert (flips.double().mean(1) - 0.5).abs().max() < 6 / 2 / math.sqrt(num)


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
