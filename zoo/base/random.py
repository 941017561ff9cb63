"""Random numbers as a pure function of who asks: seed, epoch, sample, name of the draw, element.

A generator with a state gives each sample whatever comes next, so that results depend on the batch size, the rank and
on what was drawn before. Here each number is computed from its own counter instead (the counter form of SplitMix64),
which makes runs resumable in mid-epoch without stored state, and equal for any number of processes and on any device.

Shape suffixes: B samples, N words per sample.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["SampleRandom", "splitmix64"]

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's increment
_MANTISSA = {torch.float32: 24, torch.float64: 53}
_WORDS_PER_THREAD = 2**17  # drawn at a time on a CPU: few enough for its cache, many enough that starting a pass costs little
# Numbers of `_mix_halves_`: odd factors as int32, and shifts.
_FACTORS = (-0x61C8864F, -0x7A143595, -0x3D4D51CB, 0x27D4EB2F, 0x165667B1)
_SHIFTS = (9, 14, 11, 16)


def splitmix64(state: Tensor) -> Tensor:
    """The output function of SplitMix64, applied to each 64-bit state.

    The generator's i-th output (i = 1, 2, ...) from a seed is ``splitmix64(seed + i * 0x9E3779B97F4A7C15)``.
    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

    Args:
        state: int64 tensor of any shape, read as 64 bits without sign.

    Returns:
        New int64 tensor of the same shape: 64 well-mixed bits for each state.
    """
    return _mix_(state.clone())


def _mix_(z: Tensor) -> Tensor:
    """`splitmix64` in place."""
    shifted = torch.empty_like(z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z.bitwise_xor_(_shift_right(z, shift, out=shifted)).mul_(_signed(factor))
    return z.bitwise_xor_(_shift_right(z, 31, out=shifted))


class SampleRandom:
    """The random numbers of a batch, one independent stream for each (seed, epoch, sample index, name).

    The same sample draws the same numbers in any batch, on any rank and device (up to the rounding of logarithm and
    cosine), in any order of draws. A name stands for one draw: use another name for another draw.

    Args:
        seed: seed of the run.
        index_B: integer tensor (B,) with the sample's global number; draws appear on its device.
        epoch: pass over the data; the same sample draws anew in each.

    Raises:
        ValueError: ``index_B`` is not a one-dimensional integer tensor.

    Example:
        >>> one = SampleRandom(0, torch.tensor([3, 7])).normal("noise", (2, 2))
        >>> torch.equal(SampleRandom(0, torch.tensor([7])).normal("noise", (2, 2))[0], one[1])
        True
    """

    def __init__(self, seed: int, index_B: Tensor, epoch: int = 0) -> None:
        if index_B.dim() != 1 or index_B.is_floating_point() or index_B.is_complex() or index_B.dtype == torch.bool:
            raise ValueError(
                "SampleRandom needs sample numbers as an integer tensor (B,),"
                f" got {index_B.dtype} of shape {tuple(index_B.shape)}."
            )
        self.seed = seed
        self.epoch = epoch
        self.index_B = index_B.to(torch.int64)
        self._run_key = _hash(f"{seed}/{epoch}")
        self._key_B = _mix_(self.index_B * _signed(_GOLDEN) + self._run_key)
        self._counters: dict[int, Tensor] = {}
        self._counter_halves: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.index_B)

    def bits(self, name: str, num_words: int) -> Tensor:
        """Raw draws: (B, num_words) int64, all 64 bits random."""
        return _mix_(self._counter(num_words) + (self._key_B + _hash(name))[:, None])

    def _counter(self, num_words: int) -> Tensor:
        """Counters of a sample's words, (num_words,)."""
        if num_words not in self._counters:
            counter_N = torch.arange(1, num_words + 1, device=self.index_B.device)
            self._counters[num_words] = counter_N.mul_(_signed(_GOLDEN))
        return self._counters[num_words]

    def uniform(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1).

        Args:
            name: what is drawn.
            shape: shape per sample.
            dtype: float32 (multiples of 2^-24) or float64 (multiples of 2^-53; the same draws with more digits).

        Returns:
            Tensor (B, *shape).
        """
        _check(dtype)
        words = self.bits(name, math.prod(shape))
        mantissa = _MANTISSA[dtype]
        return _shift_right(words, 64 - mantissa).to(dtype).mul_(2.0**-mantissa).view(len(self), *shape)

    def normal(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws by Box and Muller's transform; 64 random bits give a pair, so that |draw| < 6.7.

        Args:
            name: what is drawn.
            shape: shape per sample.
            dtype: float32 or float64 (the same draws, rounded less).

        Returns:
            Tensor (B, *shape).
        """
        return self.normals([name], shape, dtype)[0]

    def normals(self, names: Sequence[str], shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Several draws of `normal` at once, which takes less time than one after the other where they are small.

        Args:
            names: what is drawn.
            shape: shape per sample and name.
            dtype: float32 or float64.

        Returns:
            Tensor (len(names), B, *shape), equal to ``normal(name, shape, dtype)`` for each name.
        """
        _check(dtype)
        num_elements = math.prod(shape)
        num_words = (num_elements + 1) // 2
        key_R = _mix_(torch.cat([self._key_B + _hash(name) for name in names]))
        key_2R, counter_2N = _halves(key_R), self._halves_of_counter(num_words)
        draws_R2N = torch.empty(len(key_R), 2, num_words, dtype=dtype, device=key_R.device)
        for part in self._parts(len(key_R), num_words):
            numbers_2RN = _mix_halves_(counter_2N[:, None] + key_2R[:, part, None]).to(dtype)
            _box_muller(numbers_2RN, out=draws_R2N[part].unbind(1))
        return draws_R2N.flatten(1)[:, :num_elements].reshape(len(names), len(self), *shape)

    def _halves_of_counter(self, num_words: int) -> Tensor:
        """`_counter`, mixed, as int32 (2, num_words)."""
        if num_words not in self._counter_halves:
            self._counter_halves[num_words] = _halves(splitmix64(self._counter(num_words)))
        return self._counter_halves[num_words]

    def _parts(self, num_rows: int, num_words: int) -> list[slice]:
        """Portions of the rows whose words a CPU's cache holds; on other devices all at once."""
        rows = max(1, _WORDS_PER_THREAD * torch.get_num_threads() // max(1, num_words))
        if self.index_B.device.type != "cpu":
            rows = max(1, num_rows)
        return [slice(start, start + rows) for start in range(0, num_rows, rows)]

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Integers in [0, high), uniform up to a relative bias below high / 2^32.

        Args:
            name: what is drawn.
            high: number of possible values, 1 to 2^31.
            shape: shape per sample.

        Returns:
            int64 tensor (B, *shape).

        Raises:
            ValueError: ``high`` out of range.
        """
        if not 1 <= high <= 2**31:
            raise ValueError(f"SampleRandom.integers: high={high} must lie in 1 ... 2^31.")
        words = self.bits(name, math.prod(shape))
        return (_shift_right(words, 32) * high >> 32).view(len(self), *shape)

    def stratified(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1) that lie evenly spread for consecutive samples.

        Sample i draws the fractional part of (shift + i / golden ratio), Kronecker's sequence of low discrepancy with
        one random shift per seed, epoch and name: each draw alone is uniform, any run of neighbours covers the interval
        evenly, whatever the batch size, and the samples that several ranks hold do so together.

        Returns:
            Tensor (B,).
        """
        _check(dtype)
        shift = _signed(_hash(f"{self._run_key}/{name}"))
        mantissa = _MANTISSA[dtype]
        words = self.index_B * _signed(_GOLDEN) + shift
        return _shift_right(words, 64 - mantissa).to(dtype).mul_(2.0**-mantissa)


def _halves(words_N: Tensor) -> Tensor:
    """The upper and the lower 32 bits of words, int32 (2, N)."""
    return torch.stack((words_N >> 32, words_N)).to(torch.int32)


def _mix_halves_(words_2RN: Tensor) -> Tensor:
    """A permutation of the 64-bit words that two int32 halves make, in place, which scatters neighbours as chance would.

    It takes less than half of `splitmix64`'s time, for CPUs multiply and shift 32 bits in one instruction where they need
    several for 64. The halves act on one another in turn, as in a Feistel network, so each step can be undone: an odd
    multiple of one is added to the other, which carries low bits upwards; three times an odd multiple of the product of a
    half and its own upper bits, which is not linear; the upper bits alone are added bit by bit, so that the lowest bits are as
    good as the others; and a multiple once more. With one product less the words pass the same tests; the third is there for
    safety. The keys that enter are mixed by `splitmix64` before. Source: [derived].

    Args:
        words_2RN: int32 (2, ...), upper and lower halves.
    """
    one, other = words_2RN
    shifted = torch.empty_like(one)
    other.add_(one, alpha=_FACTORS[0])
    for source, target, shift, factor in zip((other, one, other), (one, other, one), _SHIFTS, _FACTORS[1:], strict=False):
        target.addcmul_(source, torch.bitwise_right_shift(source, shift, out=shifted), value=factor)
    other.bitwise_xor_(torch.bitwise_right_shift(one, _SHIFTS[3], out=shifted))
    one.add_(other, alpha=_FACTORS[4])
    return words_2RN


def _box_muller(words_2RN: Tensor, out: Sequence[Tensor]) -> None:
    """Two independent normal draws (R, N) each, from the halves of words in a float type, which are overwritten."""
    angle, radius = words_2RN
    # sqrt(-2 ln |u|), u in [-1, 1] and never 0: of both signs, as floats are finest around 0, where the radius is large.
    torch.add(radius.new_full((), 2.0**-32), radius, alpha=2.0**-31, out=radius).pow_(-2).log_().sqrt_()
    # Cosine and sine by the tangent of half the angle: (1 - t^2) / (1 + t^2) and 2 t / (1 + t^2).
    tangent = angle.mul_(math.pi * 2.0**-32).tan_()
    diameter = torch.addcmul(angle.new_full((), 0.5), tangent, tangent, value=0.5)
    torch.div(radius, diameter, out=diameter)
    torch.sub(diameter, radius, out=out[0])
    torch.mul(diameter, tangent, out=out[1])


def _shift_right(z: Tensor, shift: int, out: Tensor | None = None) -> Tensor:
    """Shift in zeros from the left (int64's own shift repeats the sign)."""
    shifted = torch.bitwise_right_shift(z, shift, out=out)
    return shifted.bitwise_and_((1 << (64 - shift)) - 1)


def _signed(word: int) -> int:
    """The int64 with these 64 bits."""
    return (word + 2**63) % 2**64 - 2**63


@lru_cache(maxsize=4096)
def _hash(text: str) -> int:
    """64 bits of a text as an int64, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _check(dtype: torch.dtype) -> None:
    if dtype not in _MANTISSA:
        raise ValueError(f"SampleRandom draws float32 or float64, not {dtype}: convert the result.")
