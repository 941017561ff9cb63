"""Second-order multistep exponential integrator of the SDE."""

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.sde1 import SDE1
from zoo.bfn.solvers.solver import Coefficients

__all__ = ["SDE2M"]


class SDE2M(SDE1):
    """`SDE1` with the estimate extrapolated over the step from the last two (SDE-BFN-Solver2, SDE-BFN-Solver++2).

    The first step is of first order. With a single step it is taken in full instead of being dropped, as in the
    published code. Source: Xue et al., arXiv 2404.15766, section 4.2 and 5.2.
    """

    names = ("sde2m", "sde_bfnsolver2_multi_step", "SDE-BFN-Solver2", "SDE-BFN-Solver++2")

    def coefficients(self, flow: Flow, previous: float | None, start: float, end: float) -> Coefficients:
        """See the class."""
        first = super().coefficients(flow, previous, start, end)
        if previous is None:
            return first
        now, before = flow.extrapolation((start, previous), end, stochastic=True)
        return first._replace(estimate=first.estimate * now, previous=first.estimate * before)

    def drops_last(self) -> bool:
        """Whether the last estimate is the sample."""
        return self.last_drop and self.num_steps > 1
