"""The order of samples: a pure function from positions of an epoch to indices of the data set, known to every worker.

The data-sharding service hands out ranges of *positions*. Any range may be split or given back at any point, because which
sample a position holds depends on ``(seed, epoch)`` alone, never on who asks or how ranges were cut [derived].
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["SampleOrder", "Shuffle"]

Shuffle = Literal["none", "shard", "global"]

_WORD = 2**64 - 1
_ROUNDS = 4
_KEPT_EPOCHS, _KEPT_BLOCKS = 2, 64


class SampleOrder:
    """Bijection of the positions ``0 .. num_samples - 1`` of an epoch onto sample indices.

    ========  =====================================================================================================
    none      the identity
    shard     blocks of ``shard`` samples in random order, and the samples of each block in random order: reads stay
              within one block for ``shard`` samples
    global    ``torch.randperm`` with a generator seeded ``seed + epoch``, as torch's ``DistributedSampler`` has it
    ========  =====================================================================================================

    A permutation of more than ``table_limit`` items is not stored but computed, item by item, by a Feistel cipher of four
    rounds that walks its cycles until it is back among the items.

    Args:
        num_samples: N, at least 1.
        seed: of the shuffle.
        shuffle: see above.
        shard: S, samples of a block; only ``shard`` uses it.
        table_limit: largest permutation that is stored as a table (8 bytes an item).

    Raises:
        ValueError: a count below 1, or an unknown shuffle.

    Example:
        >>> SampleOrder(4, shuffle="none").indices(0, 1, 3)
        tensor([1, 2])
    """

    def __init__(
        self, num_samples: int, seed: int = 0, shuffle: Shuffle = "global", shard: int = 1024, table_limit: int = 2**27
    ) -> None:
        for name, count in (("num_samples", num_samples), ("shard", shard)):
            if count < 1:
                raise ValueError(f"SampleOrder: {name} is {count}; it must be at least 1.")
        if shuffle not in ("none", "shard", "global"):
            raise ValueError(f"SampleOrder: shuffle is {shuffle!r}; it must be none, shard or global.")
        self.num_samples, self.seed, self.shuffle, self.shard = num_samples, seed, shuffle, shard
        self.table_limit = table_limit
        self._permutations: OrderedDict[int, _Permutation] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def indices(self, epoch: int, lo: int, hi: int) -> Tensor:
        """Sample indices of the positions ``lo .. hi - 1``.

        Returns:
            int64, ``(hi - lo,)``, on the CPU.

        Raises:
            ValueError: the range does not lie within the data set, or the epoch is negative.
        """
        if not 0 <= lo <= hi <= self.num_samples or epoch < 0:
            raise ValueError(
                f"SampleOrder: positions [{lo}, {hi}) of epoch {epoch} lie outside of [0, {self.num_samples}), epochs from 0."
            )
        if self.shuffle == "none" or lo == hi:
            return torch.arange(lo, hi)
        return self._permutation(epoch).items(lo, hi) if self.shuffle == "global" else self._within_blocks(epoch, lo, hi)

    def _permutation(self, epoch: int) -> "_Permutation":
        if epoch not in self._permutations:
            count = self.num_samples if self.shuffle == "global" else -(-self.num_samples // self.shard)
            self._permutations[epoch] = _Permutation(count, self.seed, epoch, self.table_limit)
            while len(self._permutations) > _KEPT_EPOCHS:
                self._permutations.popitem(last=False)
        return self._permutations[epoch]

    def _within_blocks(self, epoch: int, lo: int, hi: int) -> Tensor:
        blocks, size = self._permutation(epoch), self.shard
        # The last block of the grid may be short; positions behind its slot are shifted by what it lacks.
        lacking = blocks.count * size - self.num_samples
        short_slot = blocks.slot_of(blocks.count - 1)
        parts, position = [], lo
        while position < hi:
            slot = position // size
            if slot >= short_slot:
                slot = max(short_slot, (position + lacking) // size)
            start = slot * size - (lacking if slot > short_slot else 0)
            block = int(blocks.items(slot, slot + 1))
            inside = self._block(epoch, block)
            stop = min(hi, start + len(inside))
            parts.append(block * size + inside[position - start : stop - start])
            position = stop
        return torch.cat(parts)

    def _block(self, epoch: int, block: int) -> Tensor:
        """Order inside a block, kept for a while because ranges of a worker follow one another."""
        key = (epoch, block)
        if key not in self._blocks:
            length = min(self.shard, self.num_samples - block * self.shard)
            self._blocks[key] = _Permutation(length, _mix(self.seed, epoch, block), 0, self.table_limit).items(0, length)
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[key]


class _Permutation:
    """A permutation of ``count`` items by ``(seed, epoch)``: a table, or a cipher where a table would be too large."""

    def __init__(self, count: int, seed: int, epoch: int, table_limit: int) -> None:
        self.count = count
        self._table: Tensor | None = None
        self._slots: dict[int, int] = {}
        if count <= table_limit:
            self._table = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._keys = [_mix(seed, epoch, number) >> 1 for number in range(_ROUNDS)]

    def items(self, lo: int, hi: int) -> Tensor:
        """Items at the slots ``lo .. hi - 1``."""
        if self._table is not None:
            return self._table[lo:hi]
        return self._walk(torch.arange(lo, hi), self._encrypt)

    def slot_of(self, item: int) -> int:
        """Slot at which an item stands."""
        if item not in self._slots:
            if self._table is not None:
                self._slots[item] = int((self._table == item).nonzero())
            else:
                self._slots[item] = int(self._walk(torch.tensor([item]), self._decrypt))
        return self._slots[item]

    def _walk(self, values: Tensor, cipher: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the cipher on ``[0, 4^half)`` until each value is below ``count`` again: a bijection of those below."""
        values = cipher(values)
        while len(outside := (values >= self.count).nonzero().squeeze(1)):
            values[outside] = cipher(values[outside])
        return values

    def _encrypt(self, values: Tensor) -> Tensor:
        left, right = values >> self._half, values & ((1 << self._half) - 1)
        for key in self._keys:
            left, right = right, left ^ self._scramble(right, key)
        return left << self._half | right

    def _decrypt(self, values: Tensor) -> Tensor:
        left, right = values >> self._half, values & ((1 << self._half) - 1)
        for key in reversed(self._keys):
            left, right = right ^ self._scramble(left, key), left
        return left << self._half | right

    def _scramble(self, half: Tensor, key: int) -> Tensor:
        mixed = (half ^ key) * 0x2545F4914F6CDD1D  # int64 wraps around, which is what a hash wants
        mixed = (mixed ^ (mixed >> 29)) * 0x1B03738712FAD5C9
        return (mixed >> 32) & ((1 << self._half) - 1)


def _mix(*words: int) -> int:
    """One 64-bit word from several (the finaliser of SplitMix64 on each)."""
    state = 0
    for word in words:
        state = (state + 0x9E3779B97F4A7C15 + word) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state
