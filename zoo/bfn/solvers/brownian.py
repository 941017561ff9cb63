"""Noise that is the same whatever the number of steps: one Brownian motion per sample."""

import math

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.bfn.flow import Flow

__all__ = ["BrownianNoise"]


class BrownianNoise:
    """Increments of a Brownian motion W(beta(t)), one for each sample, normalised to variance 1.

    Two steps' noise adds up to the noise of the step that covers both, so samples for different numbers of steps differ
    by the solver's error alone. The path is known at t = 0 and 1; in between it is refined by halving intervals of time,
    each middle drawn from the bridge between its neighbours. So its values depend on seed, sample and time, never on
    what was asked before, and asking for one costs a draw for each binary digit of the time. Source: the virtual
    Brownian tree of Gaines and Lyons, SIAM J. Appl. Math. 57 (1997).

    Args:
        flow: whose accuracy beta is the motion's clock.
        random: the random numbers of B samples.
        shape: of one sample's state.
        dtype: float type.
        depth: binary digits to which times are rounded.
    """

    def __init__(
        self, flow: Flow, random: SampleRandom, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, depth: int = 20
    ) -> None:
        self.flow = flow
        self.random = random
        self.shape = shape
        self.dtype = dtype
        self.depth = depth
        #: Values on the way to the last one asked for, by position in units of 2^-depth. Later times need no others.
        self._path: dict[int, Tensor] = {}

    def __call__(self, number: int, start: float, end: float) -> Tensor:
        """Noise of the step from ``start`` to ``end``, (B, *shape); of an empty step 0.

        Raises:
            ValueError: the times differ by less than the resolution.
        """
        first, last = (round(t * 2**self.depth) for t in (start, end))
        if first == last and start != end:
            raise ValueError(
                f"BrownianNoise: the step from t={start} to {end} is shorter than the path's resolution 2^-{self.depth}:"
                " take fewer steps, a later start, or independent noise."
            )
        before, after = self._value(first), self._value(last)
        return (after - before).mul_(1 / math.sqrt(self._beta(last) - self._beta(first) or 1))

    def _beta(self, position: int) -> float:
        return self.flow.beta(position / 2**self.depth)

    def _draw(self, position: int) -> Tensor:
        return self.random.normal(f"path {position / 2**self.depth}", self.shape, self.dtype)

    def _value(self, position: int) -> Tensor:
        """W at a position, halving the interval that holds it until it is an end."""
        left, right = 0, 2**self.depth
        known = self._path or self._ends()
        path = {left: known[left], right: known[right]}
        while position not in (left, right):
            middle = (left + right) // 2
            path[middle] = known[middle] if middle in known else self._bridge(left, middle, right, path)
            left, right = (left, middle) if position <= middle else (middle, right)
        self._path = path
        return path[position]

    def _ends(self) -> dict[int, Tensor]:
        """W at t = 0 and 1."""
        right = 2**self.depth
        end = self._draw(right).mul_(math.sqrt(self._beta(right)))
        return {0: torch.zeros_like(end), right: end}

    def _bridge(self, left: int, middle: int, right: int, path: dict[int, Tensor]) -> Tensor:
        """W at the middle, given both ends."""
        behind, ahead = (abs(self._beta(middle) - self._beta(end)) for end in (left, right))
        part = behind / (behind + ahead)
        spread = math.sqrt(behind * (1 - part))
        return torch.lerp(path[left], path[right], part).add_(self._draw(middle), alpha=spread)
