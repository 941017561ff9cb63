"""First-order exponential integrator of the ODE."""

import math
from collections.abc import Sequence
from typing import ClassVar

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.solver import Coefficients, Solver

__all__ = ["ODE1", "ode_coefficients"]


class ODE1(Solver):
    """Solves the ODE exactly for an estimate that is constant over the step (BFN-Solver1, BFN-Solver++1).

    With y = state / scale and s = sqrt(beta): y <- (s_b / s_a) y + s_b (s_b - s_a) e(x_i). Methods of higher order put
    the mean of an extrapolated estimate in place of x_i. Source: Xue et al., arXiv 2404.15766, section 4.3 and 5.3.
    """

    names: ClassVar[tuple[str, ...]] = ("ode1", "ode_bfnsolver1", "BFN-Solver1", "BFN-Solver++1")
    stochastic = False
    starts_at_zero = False

    def coefficients(self, flow: Flow, times: Sequence[float], end: float) -> Coefficients:
        """See the class."""
        return ode_coefficients(flow, times[: self.order], end)


def ode_coefficients(flow: Flow, times: Sequence[float], end: float) -> Coefficients:
    """One step of the ODE, with the estimate extrapolated from those at ``times``, latest first."""
    a, b, scale = math.sqrt(flow.beta(times[0])), math.sqrt(flow.beta(end)), flow.scale(end)
    weights = flow.extrapolation(times, end, stochastic=False)
    return Coefficients(scale / flow.scale(times[0]) * b / a, tuple(scale * b * (b - a) * w for w in weights))
