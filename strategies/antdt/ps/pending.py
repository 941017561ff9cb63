"""Gradients that wait for the step in which they count (synchronous mode)."""

from collections.abc import Mapping, Sequence
from typing import Any

from strategies.antdt.ps.clock import Decision
from strategies.antdt.ps.slices import Gradient, merge

__all__ = ["PendingGradients"]

_REMEMBERED = 16  # norms of steps: workers that are late ask again

Hyperparameters = Sequence[Mapping[str, Any]]


class PendingGradients:
    """One server's part of the gradients of each step, by worker, and their mean.

    Example:
        >>> import torch
        >>> pending = PendingGradients()
        >>> for worker, samples in enumerate([1.0, 3.0]):
        ...     pending.put(0, worker, Gradient({"float32": torch.full((2,), float(worker))}, samples=samples), [{"lr": 0.1}])
        >>> pending.mean(Decision(0, (0, 1))).dense["float32"], pending.missing(Decision(0, (1, 2)))
        (tensor([0.7500, 0.7500]), [2])
    """

    def __init__(self) -> None:
        self._found: dict[int, dict[int, tuple[Gradient, Hyperparameters]]] = {}
        self._means: dict[int, Gradient] = {}
        self._norms: dict[int, float] = {}

    def put(self, version: int, worker: int, gradient: Gradient, hyperparameters: Hyperparameters) -> None:
        """A gradient has come, with the numbers that its worker's optimizer has."""
        self._found.setdefault(version, {})[worker] = gradient, hyperparameters

    def drop(self, version: int, worker: int) -> None:
        """A worker's gradient of a step does not count."""
        self._found.get(version, {}).pop(worker, None)

    def missing(self, decision: Decision) -> list[int]:
        """Workers whose gradients of a step this server, started again, does not have."""
        found = self._found.get(decision.version, {})
        return [worker for worker in decision.accepted if worker not in found]

    def mean(self, decision: Decision) -> Gradient | None:
        """The mean gradient of a step; None if this server has none of them."""
        if decision.version not in self._means:
            found = self._found.get(decision.version, {})
            gradients = [found[worker][0] for worker in decision.accepted if worker in found]
            if not gradients:
                return None
            self._means = {decision.version: merge(gradients)}
        return self._means[decision.version]

    def hyperparameters(self, decision: Decision) -> Hyperparameters:
        """Those of the first worker whose gradient counts; there must be one."""
        found = self._found[decision.version]
        return next(found[worker][1] for worker in decision.accepted if worker in found)

    def square_norm(self, decision: Decision) -> float:
        """Sum of squares of the mean; 0 if there is none."""
        if decision.version not in self._norms:
            gradient = self.mean(decision)
            self._norms[decision.version] = 0.0 if gradient is None else gradient.square_norm()
            for old in [old for old in self._norms if old < decision.version - _REMEMBERED]:
                del self._norms[old]
        return self._norms[decision.version]

    def done(self, version: int) -> None:
        """A step is applied: what came for it and for those before is let go."""
        self._means.clear()
        self._found = {later: found for later, found in self._found.items() if later > version}
