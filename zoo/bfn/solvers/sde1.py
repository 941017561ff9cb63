"""First-order exponential integrator of the SDE."""

import math

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.solver import Coefficients, Solver

__all__ = ["SDE1"]


class SDE1(Solver):
    """Solves the reverse SDE exactly for an estimate that is constant over the step (SDE-BFN-Solver1).

    With y = state / scale: y <- y + (beta_b - beta_a) e(x_i) + sqrt(c (beta_b - beta_a)) z. Started at t = 0 it is the
    ancestral sampler, where the head predicts one value. Source: Xue et al., arXiv 2404.15766, section 4.2 and 5.2.
    """

    names = ("sde1", "sde_bfnsolver1", "SDE-BFN-Solver1", "SDE-BFN-Solver++1")
    stochastic = True

    def coefficients(self, flow: Flow, previous: float | None, start: float, end: float) -> Coefficients:
        """See the class."""
        scale, gain = flow.scale(end), flow.beta(end) - flow.beta(start)
        return Coefficients(scale / flow.scale(start), scale * gain, noise=scale * math.sqrt(flow.noise_variance * gain))
