"""The sampler that Bayesian flow networks came with."""

from collections.abc import Sequence

from zoo.bfn.flow import Flow
from zoo.bfn.solvers.sde1 import sde_coefficients
from zoo.bfn.solvers.solver import Coefficients, NoiseKind, Solver

__all__ = ["BFNSampler"]


class BFNSampler(Solver):
    """Ancestral sampling: draw data from the prediction, send it as a noisy message, update the belief.

    This is repeated nfe - 1 times. The last call predicts at t = 1; the mode of that prediction is the sample. Sender and
    update together are one step of the reverse SDE with the drawn data as the estimate.
    Source: Graves et al., arXiv 2308.07037, algorithms 3 and 6.

    Args:
        nfe: number of network calls, at least 2.
        noise: see `Solver`.
    """

    names = ("ancestral", "bfn")
    stochastic = True
    extra_calls = 1
    statistic = "sample"

    def __init__(self, nfe: int = 10, noise: NoiseKind = "independent") -> None:
        super().__init__(nfe=nfe, eta=0.0, last_drop=False, noise=noise)

    def coefficients(self, flow: Flow, times: Sequence[float], end: float) -> Coefficients:
        """Of the message's data, and of its noise."""
        return sde_coefficients(flow, times[:1], end)
