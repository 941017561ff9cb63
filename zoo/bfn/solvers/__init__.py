"""Samplers: one class a file, one shared loop in `Solver`."""

from zoo.bfn.solvers.bfn_sampler import BFNSampler
from zoo.bfn.solvers.brownian import BrownianNoise
from zoo.bfn.solvers.categorical_solver import CategoricalSolver
from zoo.bfn.solvers.euler import Euler
from zoo.bfn.solvers.ode1 import ODE1
from zoo.bfn.solvers.ode2m import ODE2M
from zoo.bfn.solvers.ode2s import ODE2S
from zoo.bfn.solvers.ode3m import ODE3M
from zoo.bfn.solvers.ode_euler import ODEEuler
from zoo.bfn.solvers.sde1 import SDE1
from zoo.bfn.solvers.sde2m import SDE2M
from zoo.bfn.solvers.sde_euler import SDEEuler
from zoo.bfn.solvers.solver import Coefficients, Noise, Observer, Sample, Solver, Step, find_solver, random_noise, solver_names

__all__ = [
    "ODE1",
    "ODE2M",
    "ODE2S",
    "ODE3M",
    "SDE1",
    "SDE2M",
    "BFNSampler",
    "BrownianNoise",
    "CategoricalSolver",
    "Coefficients",
    "Euler",
    "Noise",
    "ODEEuler",
    "Observer",
    "SDEEuler",
    "Sample",
    "Solver",
    "Step",
    "find_solver",
    "random_noise",
    "solver_names",
]
