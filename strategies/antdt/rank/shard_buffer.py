"""The positions that a rank has been given and has not used: ranges in the order in which they came."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Piece", "ShardBuffer"]


class Piece(NamedTuple):
    """Positions ``[lo, hi)`` of the range ``sid``."""

    sid: int
    lo: int
    hi: int


class ShardBuffer:
    """First in, first out; what is given back is taken from the end, so that a range is always used from its beginning.

    Example:
        >>> buffer = ShardBuffer()
        >>> buffer.add([(7, 0, 4), (8, 10, 12)])
        >>> buffer.take(5), len(buffer)
        ([Piece(sid=7, lo=0, hi=4), Piece(sid=8, lo=10, hi=11)], 1)
        >>> buffer.shrink(0)
        [(8, 11)]
    """

    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Append ranges ``(sid, lo, hi)``."""
        for sid, lo, hi in ranges:
            self._pieces.append(Piece(sid, lo, hi))
            self._size += hi - lo

    def take(self, count: int) -> list[Piece]:
        """Remove up to ``count`` positions from the front."""
        taken = []
        while count > 0 and self._pieces:
            sid, lo, hi = self._pieces.popleft()
            cut = min(hi, lo + count)
            if cut < hi:
                self._pieces.appendleft(Piece(sid, cut, hi))
            taken.append(Piece(sid, lo, cut))
            count -= cut - lo
            self._size -= cut - lo
        return taken

    def shrink(self, size: int) -> list[tuple[int, int]]:
        """Remove positions from the end until ``size`` are left.

        Returns:
            ``(sid, start)`` for each range of which the positions from ``start`` on are gone.
        """
        freed = []
        while self._size > max(size, 0):
            sid, lo, hi = self._pieces.pop()
            cut = max(lo, hi - (self._size - max(size, 0)))
            if lo < cut:
                self._pieces.append(Piece(sid, lo, cut))
            self._size -= hi - cut
            freed.append((sid, cut))
        return freed

    def clear(self) -> None:
        """Forget everything."""
        self._pieces.clear()
        self._size = 0
