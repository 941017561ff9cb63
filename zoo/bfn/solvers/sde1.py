"""First-order exponential integrator of the SDE."""

import math
from collections.abc import Sequence

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.categorical_solver import CategoricalSolver
from zoo.bfn.solvers.solver import Coefficients

__all__ = ["SDE1", "sde_coefficients"]


class SDE1(CategoricalSolver):
    """Solves the reverse SDE exactly for an estimate that is constant over the step (SDE-BFN-Solver1).

    With y = state / scale: y <- y + (beta_b - beta_a) e(x_i) + sqrt(c (beta_b - beta_a)) z. Started at t = 0 it is the
    ancestral sampler, where the head predicts one value; with ``categorical`` it is so for discrete data.
    Source: Xue et al., arXiv 2404.15766, section 4.2 and 5.2.
    """

    names = ("sde1", "sde_bfnsolver1", "SDE-BFN-Solver1", "SDE-BFN-Solver++1")
    stochastic = True

    def coefficients(self, flow: Flow, times: Sequence[float], end: float) -> Coefficients:
        """See the class."""
        return sde_coefficients(flow, times[:1], end)


def sde_coefficients(flow: Flow, times: Sequence[float], end: float) -> Coefficients:
    """One step of the reverse SDE, with the estimate extrapolated from those at ``times``, latest first."""
    scale, gain = flow.scale(end), flow.beta(end) - flow.beta(times[0])
    weights = flow.extrapolation(times, end, stochastic=True)
    noise = scale * math.sqrt(flow.noise_variance * gain)
    return Coefficients(scale / flow.scale(times[0]), tuple(scale * gain * w for w in weights), noise)
