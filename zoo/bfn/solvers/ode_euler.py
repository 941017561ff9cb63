"""Euler's method for the ODE."""

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.solver import Coefficients, Solver

__all__ = ["ODEEuler"]


class ODEEuler(Solver):
    """Euler's method: d state / dt = (scale'/scale + beta' / (2 beta)) state + ½ scale beta' e(x).

    A baseline; it ignores that most of the ODE can be solved exactly. Source: Xue et al., arXiv 2404.15766, appendix.
    """

    names = ("ode_euler",)
    stochastic = False
    starts_at_zero = False

    def coefficients(self, flow: Flow, previous: float | None, start: float, end: float) -> Coefficients:
        """See the class."""
        dt, rate = end - start, flow.beta_rate(start)
        growth = flow.log_scale_rate(start) + rate / (2 * flow.beta(start))
        return Coefficients(1 + growth * dt, flow.scale(start) * rate / 2 * dt)
