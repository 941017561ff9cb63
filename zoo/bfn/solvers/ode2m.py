"""Second-order multistep exponential integrator of the ODE."""

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.ode1 import ODE1
from zoo.bfn.solvers.solver import Coefficients

__all__ = ["ODE2M"]


class ODE2M(ODE1):
    """`ODE1` with the estimate extrapolated over the step from the last two (BFN-Solver2, BFN-Solver++2).

    The first step is of first order. With a single step it is taken in full instead of being dropped, as in the
    published code. Source: Xue et al., arXiv 2404.15766, section 4.3 and 5.3.
    """

    names = ("ode2m", "ode_bfnsolver2_multi_step", "BFN-Solver2", "BFN-Solver++2")

    def coefficients(self, flow: Flow, previous: float | None, start: float, end: float) -> Coefficients:
        """See the class."""
        first = super().coefficients(flow, previous, start, end)
        if previous is None:
            return first
        now, before = flow.extrapolation((start, previous), end, stochastic=False)
        return first._replace(estimate=first.estimate * now, previous=first.estimate * before)

    def drops_last(self) -> bool:
        """Whether the last estimate is the sample."""
        return self.last_drop and self.num_steps > 1
