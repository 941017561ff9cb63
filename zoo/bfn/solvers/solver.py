"""What all solvers share: the times of the steps, the start, the loop, and how they are found by name."""

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.bfn.denoiser import Denoiser
from zoo.bfn.flow import Flow
from zoo.bfn.statistics import DataStatistics
from zoo.hyperparameters import Configurable
from zoo.random import SampleRandom

__all__ = ["Coefficients", "Noise", "Sample", "Solver", "find_solver", "random_noise", "solver_names"]

#: Standard normal noise of the states' shape for the step from one time to the next: (number, start, end) -> (B, ...).
#: Number 0 is the start: it covers the interval from 0 to the first time. The state gathers variance in proportion to
#: beta(end) - beta(start), so noise that is consistent across step counts is a Brownian motion's increments in beta.
Noise = Callable[[int, float, float], Tensor]


class Coefficients(NamedTuple):
    """One linear step: state <- a state + b e(x_i) + c e(x_(i-1)) + d noise."""

    state: float
    estimate: float
    previous: float = 0.0
    noise: float = 0.0


class Step(NamedTuple):
    """One step of the loop; without coefficients the estimate at its start is the sample."""

    start: float
    end: float
    coefficients: tuple[float, ...] | None


@dataclass
class Sample:
    """What a solver returns.

    Args:
        x: data (B, ...).
        nfe: network calls that it took.
        trajectory: the data as estimated at each of them (B, T, ...), if that was recorded.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None = None


class Solver(Configurable, ABC):
    """Draws samples with a given number of network calls.

    A solver is a class of a few lines: `coefficients` gives the numbers of one step, from the times alone, and `update`
    applies them (the default: a linear step). All numbers are computed in float64 before the loop starts.

    Args:
        nfe: number of network calls (function evaluations).
        eta: time at which sampling starts, in [0, 1). Published: 0.01 for images, 0.001 for text.
        grid: steps of equal length in time, or in the log signal-to-noise ratio.
        start: draw the first state as if the data were 0, or from the best isotropic Gaussian given the data's moments.
        statistics: file with the data's moments, for the optimal start; see `DataStatistics`.
        last_drop: the last estimate is the sample, so that nothing is computed beyond it. Otherwise the last state is.

    Raises:
        ValueError: an argument out of range, or a start without its statistics.
    """

    #: Names of the method in papers and published code; the first is the short one used here.
    names: ClassVar[tuple[str, ...]] = ()
    #: Whether steps take noise.
    stochastic: ClassVar[bool]
    #: Whether the method can start at t = 0, or divides by zero there.
    starts_at_zero: ClassVar[bool] = True
    #: Network calls beyond one a step.
    extra_calls: ClassVar[int] = 0
    #: What steps take of the predicted distribution.
    statistic: ClassVar[Literal["mean", "mode", "sample"]] = "mean"

    def __init__(
        self,
        nfe: int = 10,
        eta: float = 0.01,
        grid: Literal["uniform", "logsnr"] = "uniform",
        start: Literal["zero", "optimal"] = "zero",
        statistics: Path | None = None,
        last_drop: bool = True,
    ) -> None:
        name = type(self).__name__
        if nfe < 1 + self.extra_calls:
            raise ValueError(f"{name}: nfe={nfe} must be at least {1 + self.extra_calls}; it counts the network's calls.")
        if not 0 <= eta < 1:
            raise ValueError(f"{name}: eta={eta} must lie in [0, 1); it is the time at which sampling starts.")
        if eta == 0 and (grid == "logsnr" or not self.starts_at_zero):
            reason = "the log-SNR grid" if self.starts_at_zero else f"{name}"
            raise ValueError(f"{name}: eta must be greater than 0, for {reason} divides by zero at t = 0; try 0.01.")
        if grid not in ("uniform", "logsnr"):
            raise ValueError(f"{name}: grid={grid!r} must be 'uniform' or 'logsnr'.")
        if start not in ("zero", "optimal"):
            raise ValueError(f"{name}: start={start!r} must be 'zero' or 'optimal'.")
        if (start == "optimal") != (statistics is not None):
            raise ValueError(f"{name}: start='optimal' and a file of statistics belong together; give both or neither.")
        self.nfe = nfe
        self.eta = eta
        self.grid = grid
        self.start = start
        self.statistics = statistics
        self.last_drop = last_drop

    @abstractmethod
    def coefficients(self, flow: Flow, previous: float | None, start: float, end: float) -> tuple[float, ...]:
        """Numbers of the step from ``start`` to ``end``, for `update`.

        Args:
            flow: of the data.
            previous: time of the estimate before, None at the first step.
            start: time of the present estimate.
            end: time of the new state.
        """

    def update(
        self,
        flow: Flow,
        state: Tensor,
        estimate: Tensor,
        previous: Tensor | None,
        coefficients: tuple[float, ...],
        noise: Tensor | None,
    ) -> Tensor:
        """New state at the step's end, by default the linear step that `Coefficients` describes, in the same memory.

        Args:
            flow: of the data.
            state: at the step's start (B, ...).
            estimate: of the data, from ``state``.
            previous: the estimate before, None at the first step.
            coefficients: the step's numbers.
            noise: standard normal, of the state's shape; None unless the solver is stochastic.
        """
        a, b, c, d = coefficients
        state.mul_(a).add_(flow.embed(estimate), alpha=b)
        if previous is not None and c:
            state.add_(flow.embed(previous), alpha=c)
        return state if noise is None else state.add_(noise, alpha=d)

    def advance(
        self,
        denoiser: Denoiser,
        state: Tensor,
        previous: Tensor | None,
        step: Step,
        noise: Tensor | None,
        random: SampleRandom,
    ) -> tuple[Tensor, Tensor]:
        """Take one step; methods with several network calls a step override this.

        Returns:
            The new state and the estimate on the way.
        """
        if step.coefficients is None:
            return state, denoiser(state, step.start, "mode", random)
        estimate = denoiser(state, step.start, self.statistic, random)
        return self.update(denoiser.flow, state, estimate, previous, step.coefficients, noise), estimate

    @property
    def num_steps(self) -> int:
        """Number of steps that ``nfe`` network calls allow."""
        return self.nfe - self.extra_calls

    def drops_last(self) -> bool:
        """Whether the last estimate is the sample."""
        return self.last_drop

    def times(self, flow: Flow) -> list[float]:
        """Times t_0 = eta, ..., t_n = 1."""
        n = self.num_steps
        if self.grid == "uniform":
            return [self.eta + (1 - self.eta) * i / n for i in range(n)] + [1.0]
        first, last = (math.log(flow.beta(t)) for t in (self.eta, 1.0))
        return [self.eta, *(flow.time(math.exp(first + (last - first) * i / n)) for i in range(1, n)), 1.0]

    def plan(self, flow: Flow) -> list[Step]:
        """All steps, with their coefficients."""
        times = self.times(flow)
        steps = [
            Step(start, end, self.coefficients(flow, previous, start, end))
            for previous, start, end in zip([None, *times], times, times[1:], strict=False)
        ]
        if self.drops_last():
            steps[-1] = steps[-1]._replace(coefficients=None)
        return steps

    def first_state(self, flow: Flow, shape: tuple[int, ...], noise: Noise) -> Tensor:
        """State at ``eta``, (B, *state shape).

        Args:
            flow: of the data.
            shape: of one sample's data.
            noise: standard normal draws.

        Raises:
            ValueError: the statistics are of other data.
        """
        z = noise(0, 0.0, self.eta)
        beta, scale = flow.beta(self.eta), flow.scale(self.eta)
        if self.statistics is None:
            return z * (scale * math.sqrt(flow.noise_variance * beta))
        moments = DataStatistics.load(self.statistics)
        if moments.mean.shape != z.shape[1:]:
            raise ValueError(
                f"{self.statistics} holds statistics of shape {tuple(moments.mean.shape)}, but the model's data has"
                f" {tuple(z.shape[1:])}: compute them from the model's own data."
            )
        spread = moments.std.double().square().sum().item() / math.prod(shape)
        std = scale * math.sqrt(flow.noise_variance * (beta + beta**2 * spread))
        return z * std + scale * beta * flow.embed(moments.mean.to(z))

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        random: SampleRandom,
        *,
        noise: Noise | None = None,
        record: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Sample:
        """Draw one sample for each stream of ``random``.

        Args:
            denoiser: the model.
            shape: of one sample's data.
            random: the random numbers of B samples; the result for a sample depends on its own stream only.
            noise: replaces the standard normal draws by the caller's own.
            record: keep the estimate of each network call.
            dtype: float type of the states.
        """
        flow, calls = denoiser.flow, denoiser.nfe
        noise = noise or random_noise(random, flow.state_shape(shape), dtype)
        state = self.first_state(flow, shape, noise)
        estimate: Tensor | None = None
        estimates: list[Tensor] = []
        for number, step in enumerate(self.plan(flow), start=1):
            takes_noise = self.stochastic and step.coefficients is not None
            z = noise(number, step.start, step.end) if takes_noise else None
            state, estimate = self.advance(denoiser, state, estimate, step, z, random)
            if record:
                estimates.append(estimate)
        if not self.drops_last():
            estimate = self.finish(denoiser, state, random)
            if record:
                estimates.append(estimate)
        assert estimate is not None
        trajectory = torch.stack([flow.decode(e) for e in estimates], dim=1) if record else None
        return Sample(flow.decode(estimate), denoiser.nfe - calls, trajectory)

    def finish(self, denoiser: Denoiser, state: Tensor, random: SampleRandom) -> Tensor:
        """Final estimate from the state at t = 1, where the last estimate of the loop is not the sample."""
        return denoiser.correct(denoiser.flow.belief(state), state, 1.0)

    def rebuilt(self, name: str | None = None, nfe: int | None = None) -> "Solver":
        """A solver with this one's options, of another method or number of network calls.

        Args:
            name: of the method, as for `find_solver`.
            nfe: number of network calls.

        Raises:
            ValueError: unknown name, or options that the method refuses.
        """
        cls = type(self) if name is None else find_solver(name)
        accepted = inspect.signature(cls).parameters
        options = {option: value for option, value in self.init_config["init_args"].items() if option in accepted}
        return cls(**{**options, "nfe": self.nfe if nfe is None else nfe})


def random_noise(random: SampleRandom, shape: tuple[int, ...], dtype: torch.dtype) -> Noise:
    """Noise that is drawn per sample, anew for each step."""
    return lambda number, start, end: random.normal(f"noise {number}", shape, dtype)


def _solvers(cls: type[Solver] = Solver) -> list[type[Solver]]:
    found = []
    for child in cls.__subclasses__():
        found += [*([] if inspect.isabstract(child) else [child]), *_solvers(child)]
    return found


def _all_names(cls: type[Solver]) -> list[str]:
    return [*cls.__dict__.get("names", ()), cls.__name__]


def solver_names() -> tuple[str, ...]:
    """Short names of all solvers, users' own included."""
    return tuple(_all_names(cls)[0] for cls in _solvers())


def find_solver(name: str) -> type[Solver]:
    """Solver class by short name, class name, or a name in papers and published code; case and -/_ do not matter.

    Raises:
        ValueError: unknown name; the nearest ones are given.
    """
    known = {_plain(alias): cls for cls in _solvers() for alias in _all_names(cls)}
    if _plain(name) not in known:
        near = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"There is no sampler {name!r}.{hint} There are {', '.join(solver_names())}.")
    return known[_plain(name)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
