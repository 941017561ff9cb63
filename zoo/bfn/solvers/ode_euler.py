"""Euler's method for the ODE."""

from collections.abc import Sequence

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.euler import Euler
from zoo.bfn.solvers.solver import Coefficients

__all__ = ["ODEEuler"]


class ODEEuler(Euler):
    """Euler's method: d state / dt = (scale'/scale + beta' / (2 beta)) state + ½ scale beta' e(x).

    Source: Xue et al., arXiv 2404.15766, appendix.
    """

    names = ("ode_euler",)
    stochastic = False
    starts_at_zero = False

    def coefficients(self, flow: Flow, times: Sequence[float], end: float) -> Coefficients:
        """See the class."""
        start = times[0]
        dt, rate = end - start, flow.beta_rate(start)
        growth = flow.log_scale_rate(start) + rate / (2 * flow.beta(start))
        return Coefficients(1 + growth * dt, (flow.scale(start) * rate / 2 * dt,))
