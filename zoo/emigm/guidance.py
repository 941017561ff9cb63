"""Classifier-free guidance in a window of the sampling time.

Source: You et al., arXiv 2503.07197, section 4 and the published code.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from zoo.emigm.mask_schedule import step_times

__all__ = ["Guidance", "nfe_of", "num_iter_of"]

Ramp = Literal["constant", "linear", "power", "cubic", "exp", "cosine"]


@dataclass
class Guidance:
    """Interval and strength of guidance towards a class.

    Args:
        scale: 1 is no guidance; published: 4 for all models, in a late window.
        t_min: a step is guided if its END time s lies in (t_min, t_max].
        t_max: see ``t_min``.
        ramp: how the scale grows from 1 with the share of tokens revealed after the step; ``constant`` does not.

    Raises:
        ValueError: a window that is none, or an unknown ramp.
    """

    scale: float = 4.0
    t_min: float = 0.1
    t_max: float = 0.3
    ramp: Ramp = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.t_min <= self.t_max <= 1:
            raise ValueError(f"Guidance: the window ({self.t_min}, {self.t_max}] must satisfy 0 <= t_min <= t_max <= 1.")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"Guidance: scale={self.scale} must be a finite number of at least 0; 1 is no guidance.")
        if self.ramp not in get_args(Ramp):
            raise ValueError(f"Guidance: ramp={self.ramp!r} must be one of {', '.join(get_args(Ramp))}.")

    def guides(self, end: float) -> bool:
        """Whether a step that ends at this time is guided; the half-open window tests the step's end, as published."""
        return self.scale != 1 and self.t_min < end <= self.t_max

    def scale_at(self, revealed: float) -> float:
        """Scale of a guided step after which this share of the tokens is revealed."""
        match self.ramp:
            case "constant":
                growth = 1.0
            case "linear":
                growth = revealed
            case "power":
                growth = revealed**2
            case "cubic":
                growth = revealed**3
            case "exp":
                growth = -math.expm1(-5 * revealed)
            case _:
                growth = math.cos(math.pi / 2 * (1 - revealed))
        return 1 + (self.scale - 1) * growth


def nfe_of(num_iter: int, guidance: Guidance, eps: float = 1e-5) -> int:
    """Transformer evaluations per image of K steps: K + number of guided steps; the head is not counted (section 6.2).

    Sampling that reveals its last token early, as with more steps than tokens, spends fewer.
    """
    ends = step_times(num_iter, eps)[1:].tolist()
    return num_iter + sum(guidance.guides(end) for end in ends)


def num_iter_of(nfe: int, guidance: Guidance, eps: float = 1e-5) -> int:
    """The largest number of steps that spends at most ``nfe`` transformer evaluations.

    Raises:
        ValueError: not even one step does.
    """
    for num_iter in range(nfe, 0, -1):
        if nfe_of(num_iter, guidance, eps) <= nfe:
            return num_iter
    raise ValueError(f"nfe={nfe} is too small for one mask-prediction step under this guidance; it takes {nfe_of(1, guidance)}.")
