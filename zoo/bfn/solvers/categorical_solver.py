"""Base of solvers whose steps may take a drawn class instead of the mean estimate."""

from pathlib import Path

from zoo.bfn.solvers.solver import Grid, NoiseKind, Solver, Start

__all__ = ["CategoricalSolver"]


class CategoricalSolver(Solver):
    """Solver whose steps may take a class drawn from the prediction instead of its mean.

    Args:
        nfe: see `Solver`, as for all up to ``noise``.
        eta: start.
        grid: of the times.
        start: of the states.
        statistics: of the data.
        last_drop: whether the last estimate is the sample.
        noise: of the steps.
        categorical: take data drawn from the predicted distribution, as published under the name ``cate_samp``. Heads
            that predict one value, as for continuous data, have no other to draw.
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
    ) -> None:
        super().__init__(nfe, eta, grid, start, statistics, last_drop, noise)
        self.categorical = categorical
        self.statistic = "sample" if categorical else "mean"
