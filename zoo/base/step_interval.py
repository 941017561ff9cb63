"""Intervals of optimizer steps, of which a batch may take several."""

__all__ = ["crosses_multiple"]


def crosses_multiple(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after].

    Example:
        >>> [crosses_multiple(step, step + 8, 25) for step in (0, 16, 24, 25, 48)]
        [False, False, True, False, True]
    """
    return after // every > before // every
