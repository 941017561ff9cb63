"""Second-order multistep exponential integrator of the ODE."""

from zoo.bfn.solvers.ode1 import ODE1

__all__ = ["ODE2M"]


class ODE2M(ODE1):
    """`ODE1` with the estimate extrapolated over the step from the last two (BFN-Solver2, BFN-Solver++2).

    The first step is of first order. With a single step it is taken in full instead of being dropped, as in the
    published code. Source: Xue et al., arXiv 2404.15766, section 4.3 and 5.3.
    """

    names = ("ode2m", "ode_bfnsolver2_multi_step", "BFN-Solver2", "BFN-Solver++2")
    order = 2
    keeps_single_step = True
