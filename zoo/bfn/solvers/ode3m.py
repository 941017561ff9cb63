"""Third-order multistep exponential integrator of the ODE."""

import itertools

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.ode1 import ODE1, ode_coefficients
from zoo.bfn.solvers.ode2s import two_calls
from zoo.bfn.solvers.solver import Step

__all__ = ["ODE3M"]


class ODE3M(ODE1):
    """`ODE1` with the estimate extrapolated over the step as a quadratic through the last three.

    The first step is that of `ODE2S`, with two network calls: a first step of first order would leave an error of second
    order in the number of steps, and all that follows would gain nothing over `ODE2M`. Its two estimates and the one at
    its end are the three of the second step. An extension of ours that neither paper has.
    """

    names = ("ode3m",)
    order = 3
    keeps_single_step = True

    @property
    def num_steps(self) -> int:
        """Number of steps: the first takes two network calls, where there are so many."""
        return max(1, self.nfe - 1)

    def plan(self, flow: Flow) -> list[Step]:
        """See `Solver.plan`."""
        if self.nfe == 1:
            return super().plan(flow)
        times = self.times(flow)
        steps = two_calls(flow, times[0], times[1])
        for start, end in itertools.pairwise(times[1:]):
            known = (start, steps[-1].start, steps[-2].start)
            steps.append(Step(start, end, ode_coefficients(flow, known, end)))
        return self.without_last(steps)
