"""Euler's method for the SDE."""

import math

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.solver import Coefficients, Solver

__all__ = ["SDEEuler"]


class SDEEuler(Solver):
    """Euler and Maruyama's method: d state = (scale'/scale state + scale beta' e(x)) dt + scale sqrt(c beta') dw.

    A baseline; it ignores that most of the SDE can be solved exactly. Source: Xue et al., arXiv 2404.15766, appendix.
    """

    names = ("sde_euler",)
    stochastic = True

    def coefficients(self, flow: Flow, previous: float | None, start: float, end: float) -> Coefficients:
        """See the class."""
        dt, scale, gain = end - start, flow.scale(start), flow.beta_rate(start)
        return Coefficients(
            1 + flow.log_scale_rate(start) * dt,
            scale * gain * dt,
            noise=scale * math.sqrt(flow.noise_variance * gain * dt),
        )
