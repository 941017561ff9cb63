"""Ownership of the slots of a memory of fixed size: contiguous segments that grow, split, and may be shared.

Source: arXiv 2503.05139, section 2.4 (the memory of the report's inference engine).
"""

from bisect import bisect_left
from dataclasses import dataclass

__all__ = ["Segment", "SegmentAllocator", "runs_of"]


@dataclass(slots=True, eq=False)
class Segment:
    """Slots ``start`` to ``stop - 1``.

    Attributes:
        start: first slot.
        stop: slot after the last.
        owners: Number of holders; 0: it is free.
    """

    start: int
    stop: int
    owners: int = 1

    def __len__(self) -> int:
        return self.stop - self.start


class SegmentAllocator:
    """Hands out segments of ``num_slots`` slots and takes them back; what is free is kept in runs as long as can be.

    Args:
        num_slots: Number of slots.

    Raises:
        ValueError: fewer than one.

    Example:
        >>> memory = SegmentAllocator(10)
        >>> one, two = memory.allocate(4), memory.allocate(3)
        >>> memory.extend(two, 5), memory.extend(one, 1), memory.num_free
        (3, 0, 0)
        >>> memory.release(one), memory.free_runs
        (None, [(0, 4)])
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"SegmentAllocator: num_slots={num_slots} must be at least 1.")
        self.num_slots = num_slots
        self.free_runs: list[tuple[int, int]] = [(0, num_slots)]  # sorted; no two touch
        self.num_free = num_slots

    def allocate(self, size: int) -> Segment | None:
        """A segment from the beginning of the shortest free run that holds it; None if none does.

        Args:
            size: slots, at least 1.
        """
        fitting = [(stop - start, start) for start, stop in self.free_runs if stop - start >= size]
        if not fitting:
            return None
        start = min(fitting)[1]
        self._take(start, start + size)
        return Segment(start, start + size)

    def allocate_some(self, size: int) -> Segment | None:
        """As `allocate`, but the whole of the longest free run where none is long enough; None if nothing is free.

        Args:
            size: slots wanted, at least 1.
        """
        longest = max((stop - start for start, stop in self.free_runs), default=0)
        return self.allocate(min(size, longest)) if longest else None

    def extend(self, segment: Segment, size: int) -> int:
        """Move the end of a segment into its neighbour, as far as that is free; returns by how much.

        Args:
            segment: held by one owner.
            size: slots wanted.

        Raises:
            ValueError: others hold the segment too.
        """
        if segment.owners != 1:
            raise ValueError(f"{segment} has {segment.owners} owners: it cannot grow for one of them.")
        place = bisect_left(self.free_runs, (segment.stop, 0))
        if place == len(self.free_runs) or self.free_runs[place][0] != segment.stop:
            return 0
        start, stop = self.free_runs[place]
        grown = min(size, stop - start)
        self._take(start, start + grown)
        segment.stop += grown
        return grown

    def split(self, segment: Segment, size: int) -> Segment:
        """Leave the first ``size`` slots to a segment; the rest becomes a new one of as many owners.

        Args:
            segment: of more than ``size`` slots.
            size: at least 1.

        Raises:
            ValueError: there is nothing to split.
        """
        if not 0 < size < len(segment):
            raise ValueError(f"{segment} of {len(segment)} slots cannot be split after {size}.")
        rest = Segment(segment.start + size, segment.stop, segment.owners)
        segment.stop = rest.start
        return rest

    def release(self, segment: Segment) -> None:
        """Take one owner away; with the last one the slots become free.

        Raises:
            ValueError: nobody holds it.
        """
        if segment.owners < 1:
            raise ValueError(f"{segment} is free already.")
        segment.owners -= 1
        if segment.owners:
            return
        start, stop = segment.start, segment.stop
        self.num_free += stop - start
        place = bisect_left(self.free_runs, (start, stop))
        if place < len(self.free_runs) and self.free_runs[place][0] == stop:
            stop = self.free_runs.pop(place)[1]
        if place and self.free_runs[place - 1][1] == start:
            place -= 1
            start = self.free_runs.pop(place)[0]
        self.free_runs.insert(place, (start, stop))

    def _take(self, start: int, stop: int) -> None:
        """Cut slots off the beginning of a free run."""
        place = bisect_left(self.free_runs, (start, 0))
        end = self.free_runs[place][1]
        if stop == end:
            del self.free_runs[place]
        else:
            self.free_runs[place] = (stop, end)
        self.num_free -= stop - start


def runs_of(segments: list[Segment], begin: int, end: int) -> list[tuple[int, int]]:
    """Slots of the tokens ``begin`` to ``end - 1`` of a sequence: (first slot, slot after the last) of each run, in order.

    Args:
        segments: the memory of the sequence, in the order of its tokens.
        begin: first token.
        end: token after the last.

    Example:
        >>> runs_of([Segment(8, 12), Segment(12, 14), Segment(0, 4)], 1, 8)
        [(9, 14), (0, 2)]
    """
    runs: list[tuple[int, int]] = []
    offset = 0
    for segment in segments:
        first, last = max(begin - offset, 0), min(end - offset, len(segment))
        if first < last:
            start, stop = segment.start + first, segment.start + last
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        offset += len(segment)
    return runs
