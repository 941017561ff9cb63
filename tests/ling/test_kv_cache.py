"""Memory of keys and values: what it holds, how much it takes, and segments that are never lost nor given twice."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zoo.ling import KVCache, preset
from zoo.ling.segments import Segment, SegmentAllocator, runs_of

TINY = preset("ling_tiny")


def test_cache_returns_what_was_stored_and_takes_the_published_bytes() -> None:
    cache = KVCache(TINY, 2, 7)
    key, value = torch.randn(4, 2, 2, 5, 32), torch.randn(4, 2, 2, 5, 32)
    for begin, end in ((0, 3), (3, 4), (4, 5)):
        for layer in range(4):
            found = cache.update(layer, key[layer, :, :, begin:end], value[layer, :, :, begin:end])
            assert torch.equal(found[0], key[layer, :, :, :end]) and torch.equal(found[1], value[layer, :, :, :end])
        cache.advance(end - begin)
    assert torch.equal(cache.keys[:, :, :, :5], key) and torch.equal(cache.values[:, :, :, :5], value)
    slots, seen = cache.open_slot()
    slots[3].fill_(7.0)
    assert bool((cache.keys[3, :, :, 5] == 7).all()) and bool((seen[7][:, :, 5] == 7).all()) and seen[6].shape[2] == 6
    assert cache.keys.numel() + cache.values.numel() == 14 * KVCache.bytes_per_token(TINY, torch.float32) // 4
    assert KVCache.bytes_per_token(preset("ling_lite")) == 57344
    assert KVCache.bytes_per_token(preset("ling_plus")) == 270336


def test_sequence_beyond_the_cache_is_refused() -> None:
    cache = KVCache(TINY, 1, 4)
    cache.advance(3)
    with pytest.raises(ValueError, match="5 tokens is longer than the cache of 4"):
        cache.update(0, torch.zeros(1, 2, 2, 32), torch.zeros(1, 2, 2, 32))
    cache.advance(1)
    with pytest.raises(ValueError, match="5 tokens is longer than the cache of 4"):
        cache.open_slot()
    cache.reset()
    cache.open_slot()
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        KVCache(TINY, 1, 0)


class Memory(RuleBasedStateMachine):
    """Any sequence of calls: slots are free or in exactly one segment, and free runs are as long as can be."""

    @initialize(size=st.integers(1, 40))
    def begin(self, size: int) -> None:
        self.memory = SegmentAllocator(size)
        self.held: list[Segment] = []

    @rule(size=st.integers(1, 15), some=st.booleans())
    def allocate(self, size: int, some: bool) -> None:
        longest = max((stop - start for start, stop in self.memory.free_runs), default=0)
        segment = self.memory.allocate_some(size) if some else self.memory.allocate(size)
        if segment is None:
            assert longest < (1 if some else size)
            return
        assert len(segment) == min(size, longest)
        self.held.append(segment)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), size=st.integers(1, 15))
    def extend(self, data: st.DataObject, size: int) -> None:
        segment = data.draw(st.sampled_from(self.held))
        if segment.owners > 1:
            with pytest.raises(ValueError, match="cannot grow for one"):
                self.memory.extend(segment, size)
            return
        before = len(segment)
        grown = self.memory.extend(segment, size)
        assert len(segment) == before + grown and grown <= size

    @precondition(lambda self: any(len(segment) > 1 for segment in self.held))
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        segment = data.draw(st.sampled_from([segment for segment in self.held if len(segment) > 1]))
        size = data.draw(st.integers(1, len(segment) - 1))
        stop = segment.stop
        rest = self.memory.split(segment, size)
        assert (len(segment), rest.start, rest.stop, rest.owners) == (size, segment.stop, stop, segment.owners)
        self.held.append(rest)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.held)).owners += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        segment = data.draw(st.sampled_from(self.held))
        self.memory.release(segment)
        if not segment.owners:
            self.held.remove(segment)
            with pytest.raises(ValueError, match="free already"):
                self.memory.release(segment)

    @invariant()
    def every_slot_is_somewhere_once(self) -> None:
        if not hasattr(self, "memory"):
            return
        held = [slot for segment in self.held for slot in range(segment.start, segment.stop)]
        free = [slot for start, stop in self.memory.free_runs for slot in range(start, stop)]
        assert sorted(held + free) == list(range(self.memory.num_slots))
        assert self.memory.num_free == len(free)
        runs = self.memory.free_runs
        assert all(left[1] < right[0] for left, right in zip(runs, runs[1:], strict=False))

    def teardown(self) -> None:
        for segment in getattr(self, "held", []):
            while segment.owners:
                self.memory.release(segment)
        if hasattr(self, "memory"):
            assert self.memory.free_runs == [(0, self.memory.num_slots)]


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_runs_are_the_slots_in_the_order_of_tokens() -> None:
    segments = [Segment(5, 9), Segment(9, 12), Segment(0, 3), Segment(20, 21)]
    slots = [slot for segment in segments for slot in range(segment.start, segment.stop)]
    for begin in range(12):
        for end in range(begin, 12):
            runs = runs_of(segments, begin, end)
            assert [slot for start, stop in runs for slot in range(start, stop)] == slots[begin:end]
            assert all(left[1] != right[0] for left, right in zip(runs, runs[1:], strict=False))


def test_split_of_nothing_is_refused() -> None:
    memory = SegmentAllocator(5)
    segment = memory.allocate(3)
    assert segment is not None
    for size in (0, 3):
        with pytest.raises(ValueError, match="cannot be split after"):
            memory.split(segment, size)
    with pytest.raises(ValueError, match="num_slots=0"):
        SegmentAllocator(0)
