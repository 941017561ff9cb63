"""Second-order single-step exponential integrator of the ODE."""

import itertools

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.ode1 import ODE1, ode_coefficients
from zoo.bfn.solvers.solver import Coefficients, Step

__all__ = ["ODE2S", "two_calls"]


class ODE2S(ODE1):
    """Two network calls a step: `ODE1` to the step's middle, then the whole step with the estimate found there.

    The middle is that of time for discrete data, that of the log-SNR for continuous data, where it is
    DPM-Solver++(2S). With an odd number of calls the last step has one, so it is of first order. The last call's estimate
    is the sample, be it at a step's middle, if it is not to be dropped: as in the published code.
    Source: Xue et al., arXiv 2404.15766, section 5.3 (BFN-Solver2, its single-step form).
    """

    names = ("ode2s", "ode_bfnsolver2_single_step")
    order = 2

    @property
    def num_steps(self) -> int:
        """Number of steps with two network calls."""
        return self.nfe // 2

    def times(self, flow: Flow) -> list[float]:
        """Times between which steps are taken, with one or two calls."""
        return self.grid_times(flow, (self.nfe + 1) // 2)

    def plan(self, flow: Flow) -> list[Step]:
        """See `Solver.plan`."""
        *pairs, last = itertools.pairwise(self.times(flow))
        steps = [step for start, end in pairs for step in two_calls(flow, start, end)]
        steps += [Step(*last, ode_coefficients(flow, last[:1], last[1]))] if self.nfe % 2 else two_calls(flow, *last)
        return self.without_last(steps)


def two_calls(flow: Flow, start: float, end: float) -> list[Step]:
    """The step of `ODE2S`: to the middle, and from there to the end."""
    middle = flow.midpoint(start, end)
    half, whole = (ode_coefficients(flow, (start,), t) for t in (middle, end))
    # The whole step begins at the start. Written as one from the middle, it takes back what the half step added.
    ratio = whole.state / half.state
    second = Coefficients(ratio, (*whole.estimates, -ratio * half.estimates[0]))
    return [Step(start, middle, half), Step(middle, end, second)]
