"""Base of Euler's methods for ODE and SDE."""

from pathlib import Path

from zoo.bfn.solvers.categorical_solver import CategoricalSolver
from zoo.bfn.solvers.solver import Grid, NoiseKind, Start

__all__ = ["Euler"]


class Euler(CategoricalSolver):
    """A baseline; it ignores that most of the ODE and SDE can be solved exactly.

    Args:
        nfe: see `Solver`, as for all up to ``noise``.
        eta: start.
        grid: of the times.
        start: of the states.
        statistics: of the data.
        last_drop: whether the last estimate is the sample.
        noise: of the steps.
        categorical: see `CategoricalSolver`.
        extra_step: take the last step, and predict once more at t = 1, whatever ``last_drop``; that call is one of
            ``nfe``. Published under the name ``addi_step``.
    """

    def __init__(
        self,
        nfe: int = 10,
        eta: float = 0.01,
        grid: Grid = "uniform",
        start: Start = "zero",
        statistics: Path | None = None,
        last_drop: bool = True,
        noise: NoiseKind = "independent",
        categorical: bool = False,
        extra_step: bool = False,
    ) -> None:
        self.extra_calls = int(extra_step)
        super().__init__(nfe, eta, grid, start, statistics, last_drop, noise, categorical)
        self.extra_step = extra_step
