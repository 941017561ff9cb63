"""Euler's method for the SDE."""

import math
from collections.abc import Sequence

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.euler import Euler
from zoo.bfn.solvers.solver import Coefficients

__all__ = ["SDEEuler"]


class SDEEuler(Euler):
    """Euler and Maruyama's method: d state = (scale'/scale state + scale beta' e(x)) dt + scale sqrt(c beta') dw.

    Source: Xue et al., arXiv 2404.15766, appendix.
    """

    names = ("sde_euler",)
    stochastic = True

    def coefficients(self, flow: Flow, times: Sequence[float], end: float) -> Coefficients:
        """See the class."""
        start = times[0]
        dt, scale, gain = end - start, flow.scale(start), flow.beta_rate(start)
        noise = scale * math.sqrt(flow.noise_variance * gain * dt)
        return Coefficients(1 + flow.log_scale_rate(start) * dt, (scale * gain * dt,), noise)
