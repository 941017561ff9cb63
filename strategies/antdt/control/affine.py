"""The cost of a node as a straight line, ``T = a C + c n``: C micro-batches of n samples in all take T seconds (section 2.2)."""

import math
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["AffineCost", "Moments", "fit"]


class Moments(NamedTuple):
    """Sums over steps from which the line is fitted; ``weight`` is their (forgetful) number."""

    weight: float = 0.0
    cc: float = 0.0
    cn: float = 0.0
    nn: float = 0.0
    ct: float = 0.0
    nt: float = 0.0
    tt: float = 0.0

    def after(self, forget: float, micros: int, samples: int, seconds: float) -> "Moments":
        """With one more step; what was before counts ``forget`` times as much."""
        return Moments(
            forget * self.weight + 1.0,
            forget * self.cc + micros * micros,
            forget * self.cn + micros * samples,
            forget * self.nn + samples * samples,
            forget * self.ct + micros * seconds,
            forget * self.nt + samples * seconds,
            forget * self.tt + seconds * seconds,
        )

    @classmethod
    def sum(cls, parts: "Iterable[Moments]") -> "Moments":
        """Of nodes that have the same line."""
        columns = list(zip(*parts, strict=True))
        return cls(*map(math.fsum, columns)) if columns else cls()


class AffineCost(NamedTuple):
    """A fitted line.

    Attributes:
        fixed: a, seconds a micro-batch.
        cost: c, seconds a sample.
        fixed_error: Standard error of a.
    """

    fixed: float
    cost: float
    fixed_error: float


def fit(moments: Moments) -> AffineCost | None:
    """Least squares.

    Returns:
        None if a and c cannot be told apart: too few steps, or samples a micro-batch nearly always the same (their spread below
        about one percent of them).

    Example:
        >>> steps = [(1, 10, 0.7), (1, 20, 1.2), (2, 20, 1.4)]
        >>> moments = Moments()
        >>> for micros, samples, seconds in steps:
        ...     moments = moments.after(0.97, micros, samples, seconds)
        >>> line = fit(moments)
        >>> round(line.fixed, 6), round(line.cost, 6)
        (0.2, 0.05)
    """
    weight, cc, cn, nn, ct, nt, tt = moments
    determinant = cc * nn - cn * cn
    if weight < 2.5 or determinant <= 1e-4 * cc * nn:
        return None
    fixed = (ct * nn - nt * cn) / determinant
    cost = (nt * cc - ct * cn) / determinant
    if cost <= 0:
        return None
    rest = max(tt - fixed * ct - cost * nt, 0.0)
    return AffineCost(fixed, cost, math.sqrt(rest / (weight - 2) * nn / determinant))
