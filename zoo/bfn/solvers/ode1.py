"""First-order exponential integrator of the ODE."""

import math

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.solver import Coefficients, Solver

__all__ = ["ODE1"]


class ODE1(Solver):
    """Solves the ODE exactly for an estimate that is constant over the step (BFN-Solver1, BFN-Solver++1).

    With y = state / scale and s = sqrt(beta): y <- (s_b / s_a) y + s_b (s_b - s_a) e(x_i).
    Source: Xue et al., arXiv 2404.15766, section 4.3 and 5.3.
    """

    names = ("ode1", "ode_bfnsolver1", "BFN-Solver1", "BFN-Solver++1")
    stochastic = False
    starts_at_zero = False

    def coefficients(self, flow: Flow, previous: float | None, start: float, end: float) -> Coefficients:
        """See the class."""
        a, b, scale = math.sqrt(flow.beta(start)), math.sqrt(flow.beta(end)), flow.scale(end)
        return Coefficients(scale / flow.scale(start) * b / a, scale * b * (b - a))
