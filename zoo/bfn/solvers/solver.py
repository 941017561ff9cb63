"""Base of all solvers: the times of the steps, the start, the loop, and the table of names."""

import difflib
import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from zoo.base.hyperparameters import Configurable
from zoo.base.random import SampleRandom
from zoo.bfn.denoiser import Denoiser
from zoo.bfn.flow import Flow
from zoo.bfn.heads import Statistic
from zoo.bfn.solvers.brownian import BrownianNoise
from zoo.bfn.statistics import DataStatistics

__all__ = ["Coefficients", "Noise", "Sample", "Solver", "find_solver", "random_noise", "solver_names"]

#: Standard normal noise of the states' shape for the step from one time to the next: (number, start, end) -> (B, ...).
#: Number 0 is the start: it covers the interval from 0 to the first time. The state gathers variance in proportion to
#: beta(end) - beta(start), so noise that is consistent across step counts is a Brownian motion's increments in beta.
Noise = Callable[[int, float, float], Tensor]

#: Is shown each network call: (number of the call, from 1; time; state; estimate). What it is shown may change afterwards:
#: copy what is to be kept.
Observer = Callable[[int, float, Tensor, Tensor], None]

_NOISE_AT_ONCE = 2**21  # numbers: small noise of several steps is drawn together

Grid = Literal["uniform", "logsnr", "quadratic"]
Start = Literal["zero", "optimal"]
NoiseKind = Literal["independent", "brownian"]


class Coefficients(NamedTuple):
    """One linear step: state <- a state + sum_j b_j e(x_j) + d noise, with the last estimates x_j, the latest first."""

    state: float
    estimates: tuple[float, ...]
    noise: float = 0.0


class Step(NamedTuple):
    """One network call, at ``start``, and the way to the next; without coefficients its estimate is the sample."""

    start: float
    end: float
    coefficients: tuple[Any, ...] | None


@dataclass
class Sample:
    """Result of a solver.

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
        grid: steps of equal length in time (published), in the log signal-to-noise ratio, or in the square root of
            the time since the start.
        start: draw the first state as if the data were 0, or from the best isotropic Gaussian given the data's moments.
        statistics: file with the data's moments, for the optimal start; see `DataStatistics`.
        last_drop: the last estimate is the sample, so that nothing is computed beyond it. Otherwise the last state is.
        noise: drawn anew for each step, or the increments of one Brownian motion per sample, so that the same noise acts
            whatever the number of steps; see `BrownianNoise`. The start is drawn from it, too.

    Raises:
        ValueError: an argument out of range, or a start without its statistics.
    """

    #: Names of the method in papers and published code; the first is the short one used here.
    names: ClassVar[tuple[str, ...]] = ()
    #: Number of last estimates that a step takes.
    order: ClassVar[int] = 1
    #: Whether steps take noise.
    stochastic: ClassVar[bool]
    #: Whether the method can start at t = 0, or divides by zero there.
    starts_at_zero: ClassVar[bool] = True
    #: Whether the step after a single network call is taken instead of being dropped.
    keeps_single_step: ClassVar[bool] = False
    #: Network calls after the last step, at t = 1; the mode of the last one is the sample.
    extra_calls: int = 0
    #: What steps take of the predicted distribution.
    statistic: Statistic = "mean"

    def __init__(
        self,
        nfe: int = 10,
        eta: float = 0.01,
        grid: Grid = "uniform",
        start: Start = "zero",
        statistics: Path | None = None,
        last_drop: bool = True,
        noise: NoiseKind = "independent",
    ) -> None:
        name = type(self).__name__
        if nfe < 1 + self.extra_calls:
            raise ValueError(f"{name}: nfe={nfe} must be at least {1 + self.extra_calls}; it counts the network's calls.")
        if not 0 <= eta < 1:
            raise ValueError(f"{name}: eta={eta} must lie in [0, 1); it is the time at which sampling starts.")
        if eta == 0 and (grid == "logsnr" or not self.starts_at_zero):
            reason = "the log-SNR grid" if self.starts_at_zero else f"{name}"
            raise ValueError(f"{name}: eta must be greater than 0, for {reason} divides by zero at t = 0; try 0.01.")
        for option, value, kinds in (("grid", grid, Grid), ("start", start, Start), ("noise", noise, NoiseKind)):
            if value not in get_args(kinds):
                raise ValueError(f"{name}: {option}={value!r} must be one of {', '.join(map(repr, get_args(kinds)))}.")
        if (start == "optimal") != (statistics is not None):
            raise ValueError(f"{name}: start='optimal' and a file of statistics belong together; give both or neither.")
        self.nfe = nfe
        self.eta = eta
        self.grid = grid
        self.start = start
        self.statistics = statistics
        self.last_drop = last_drop
        self.noise = noise

    @abstractmethod
    def coefficients(self, flow: Flow, times: Sequence[float], end: float) -> tuple[Any, ...]:
        """Numbers of the step to ``end``, for `update`.

        Args:
            flow: of the data.
            times: of the last estimates, latest first; the step starts at the first. At most `order`, fewer at first.
            end: time of the new state.
        """

    def update(
        self,
        flow: Flow,
        state: Tensor,
        estimates: Sequence[Tensor],
        coefficients: tuple[Any, ...],
        noise: Tensor | None,
    ) -> Tensor:
        """New state at the step's end, by default the linear step that `Coefficients` describes, in the same memory.

        Args:
            flow: of the data.
            state: at the step's start (B, ...).
            estimates: of the data, latest first; at most `order`.
            coefficients: the step's numbers.
            noise: standard normal, of the state's shape; None unless the solver is stochastic.
        """
        decay, weights, spread = coefficients
        if decay != 1:
            state.mul_(decay)
        for estimate, weight in zip(estimates, weights, strict=False):  # a step may take fewer than there are
            if weight:
                state.add_(estimate, alpha=weight * flow.embed_gain)
        if flow.embed_offset:
            state.add_(flow.embed_offset * sum(weights))
        return state if noise is None else state.add_(noise, alpha=spread)

    @property
    def num_steps(self) -> int:
        """Number of steps that ``nfe`` network calls allow, by default one for each."""
        return self.nfe - self.extra_calls

    def drops_last(self) -> bool:
        """Whether the last estimate of the loop is the sample."""
        single = self.keeps_single_step and self.nfe - self.extra_calls == 1
        return self.last_drop and not self.extra_calls and not single

    def times(self, flow: Flow) -> list[float]:
        """Times t_0 = eta, ..., t_n = 1 between which steps are taken."""
        return self.grid_times(flow, self.num_steps)

    def grid_times(self, flow: Flow, n: int) -> list[float]:
        """The grid with n intervals."""
        if self.grid == "logsnr":
            first, last = (math.log(flow.beta(t)) for t in (self.eta, 1.0))
            return [self.eta, *(flow.time(math.exp(first + (last - first) * i / n)) for i in range(1, n)), 1.0]
        quadratic = self.grid == "quadratic"
        return [self.eta + (1 - self.eta) * i / n * (i / n if quadratic else 1) for i in range(n)] + [1.0]

    def plan(self, flow: Flow) -> list[Step]:
        """All network calls of the loop, with the steps' coefficients."""
        times = self.times(flow)
        steps = [
            Step(start, end, self.coefficients(flow, times[max(0, i + 1 - self.order) : i + 1][::-1], end))
            for i, (start, end) in enumerate(itertools.pairwise(times))
        ]
        return self.without_last(steps)

    def without_last(self, steps: list[Step]) -> list[Step]:
        """The steps, the last one reduced to its estimate if that is the sample."""
        return [*steps[:-1], steps[-1]._replace(coefficients=None)] if self.drops_last() else steps

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
        moments = self.load_statistics(tuple(z.shape[1:]))
        spread = moments.std.double().square().sum().item() / math.prod(shape)
        std = scale * math.sqrt(flow.noise_variance * (beta + beta**2 * spread))
        return z * std + scale * beta * flow.embed(moments.mean.to(z))

    def load_statistics(self, shape: tuple[int, ...]) -> DataStatistics:
        """Read the file of the optimal start.

        Args:
            shape: of one sample's state.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the statistics are of other data.
        """
        assert self.statistics is not None
        moments = DataStatistics.load(self.statistics)
        if tuple(moments.mean.shape) != shape:
            raise ValueError(
                f"{self.statistics} holds statistics of shape {tuple(moments.mean.shape)}, but the model's data has"
                f" {shape}: compute them from the model's own data."
            )
        return moments

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        random: SampleRandom,
        *,
        noise: Noise | None = None,
        observer: Observer | None = None,
        record: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Sample:
        """Draw one sample for each stream of ``random``.

        Args:
            denoiser: the model.
            shape: of one sample's data.
            random: the random numbers of B samples; the result for a sample depends on its own stream only.
            noise: replaces the standard normal draws by the caller's own.
            observer: is shown each network call.
            record: keep the estimate of each network call.
            dtype: float type of the states.
        """
        flow, calls = denoiser.flow, denoiser.nfe
        noise = noise or self.draws(flow, flow.state_shape(shape), random, dtype)
        state = self.first_state(flow, shape, noise)
        estimates: list[Tensor] = []
        trajectory: list[Tensor] = []
        for number, step in enumerate(self.plan(flow), start=1):
            estimate = denoiser(state, step.start, "mode" if step.coefficients is None else self.statistic, random)
            if observer is not None:
                observer(denoiser.nfe - calls, step.start, state, estimate)
            if record:
                trajectory.append(flow.decode(estimate))
            if step.coefficients is not None:
                estimates = [estimate, *estimates[: self.order - 1]]
                z = noise(number, step.start, step.end) if self.stochastic else None
                state = self.update(flow, state, estimates, step.coefficients, z)
        if not self.drops_last():
            estimate = self.finish(denoiser, state, random)
            if observer is not None and self.extra_calls:
                observer(denoiser.nfe - calls, 1.0, state, estimate)
            if record:
                trajectory.append(flow.decode(estimate))
        return Sample(flow.decode(estimate), denoiser.nfe - calls, torch.stack(trajectory, dim=1) if record else None)

    def draws(self, flow: Flow, shape: tuple[int, ...], random: SampleRandom, dtype: torch.dtype) -> Noise:
        """The noise that ``noise`` names, in states of the given shape per sample."""
        if self.noise == "brownian":
            return BrownianNoise(flow, random, shape, dtype)
        return random_noise(random, shape, dtype, self.num_steps - self.drops_last() if self.stochastic else 0)

    def finish(self, denoiser: Denoiser, state: Tensor, random: SampleRandom) -> Tensor:
        """Final estimate from the state at t = 1, where the last estimate of the loop is not the sample."""
        if self.extra_calls:
            return denoiser(state, 1.0, "mode", random)
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


def random_noise(random: SampleRandom, shape: tuple[int, ...], dtype: torch.dtype, num_steps: int = 0) -> Noise:
    """Noise that is drawn per sample, anew for each step.

    Args:
        random: the random numbers of the samples.
        shape: of one sample's state.
        dtype: float type of the noise.
        num_steps: noise of steps up to this number is drawn several steps at once, as far as that is little.
    """
    at_once = max(1, _NOISE_AT_ONCE // max(1, len(random) * math.prod(shape)))
    drawn: dict[int, Tensor] = {}

    def noise(number: int, start: float, end: float) -> Tensor:
        if number not in drawn:
            last = max(number, min(num_steps, number + at_once - 1))
            numbers = range(number, last + 1)
            drawn.clear()
            drawn.update(zip(numbers, random.normals([f"noise {n}" for n in numbers], shape, dtype), strict=True))
        return drawn[number]

    return noise


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
