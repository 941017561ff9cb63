"""The names nearest to one that is wrong."""

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``"; did you mean X or Y?"``, or nothing if no candidate is near; capitals do not count."""
    spellings: dict[str, list[str]] = {}
    for candidate in sorted(set(candidates)):
        spellings.setdefault(candidate.lower(), []).append(candidate)
    near = difflib.get_close_matches(name.lstrip("-").lower(), spellings, n=3, cutoff=0.55)
    return f"; did you mean {' or '.join(name for key in near for name in spellings[key])}?" if near else ""
