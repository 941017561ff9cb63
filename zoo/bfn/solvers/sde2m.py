"""Second-order multistep exponential integrator of the SDE."""

from collections.abc import Sequence

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.sde1 import sde_coefficients
from zoo.bfn.solvers.solver import Coefficients, Solver

__all__ = ["SDE2M"]


class SDE2M(Solver):
    """`SDE1` with the estimate extrapolated over the step from the last two (SDE-BFN-Solver2, SDE-BFN-Solver++2).

    The first step is of first order. With a single step it is taken in full instead of being dropped, as in the
    published code. Source: Xue et al., arXiv 2404.15766, section 4.2 and 5.2.
    """

    names = ("sde2m", "sde_bfnsolver2_multi_step", "SDE-BFN-Solver2", "SDE-BFN-Solver++2")
    stochastic = True
    order = 2
    keeps_single_step = True

    def coefficients(self, flow: Flow, times: Sequence[float], end: float) -> Coefficients:
        """See the class."""
        return sde_coefficients(flow, times[:2], end)
