"""The pseudo-gradient penalty of EDiT (arXiv 2412.07210): whom to leave out, how to weigh, how far to go.

Between two synchronisations every replica i moves from the anchor to theta_i. Its pseudo-gradient is Delta_i = anchor - theta_i,
of norm G_i. A *unit* is what has one norm and one detector a replica: a block, a tensor, or everything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from strategies.edit.consensus import Consensus
from zoo.base.anomaly import EWMADetector

__all__ = ["Detectors", "Outer", "Penalty", "clip_factor", "replica_weights"]

Granularity = Literal["block", "parameter", "global"]
DetectorUpdate = Literal["exclude", "include"]
ClipScope = Literal["module", "global"]


@dataclass(frozen=True)
class Penalty:
    """Treatment of pseudo-gradients before the outer step.

    Attributes:
        weighted: weigh replicas by ``softmax(-G / temperature)``; else all by 1/n.
        temperature: of that softmax, in units of the norm.
        skip_anomaly: leave out replicas whose norm is an outlier among their own earlier ones. Norms that are not finite are
            left out in any case.
        ewma_alpha: weight of a new norm in the detectors' averages.
        ewma_warmup: synchronisations before a detector judges.
        ewma_threshold: standard deviations above the mean.
        clip: largest norm of the averaged pseudo-gradient; None for no limit.
        granularity: what a unit is.
        detector_update: whether norms that were found anomalous enter the detector's averages.
        clip_scope: clip block by block, or by the norm over all blocks.
        step_weight: share r of the weight that goes by the number of local steps (A-EDiT): ``(1-r) w_i + r steps_i / steps``.
        consensus: thin pseudo-gradients out and bring them to one sign; None for the plain weighted sum.

    Raises:
        ValueError: a number or word out of range.
    """

    weighted: bool = True
    temperature: float = 1.0
    skip_anomaly: bool = True
    ewma_alpha: float = 0.02
    ewma_warmup: int = 120
    ewma_threshold: float = 3.0
    clip: float | None = 10.0
    granularity: Granularity = "block"
    detector_update: DetectorUpdate = "exclude"
    clip_scope: ClipScope = "module"
    step_weight: float = 0.0
    consensus: Consensus | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"EDiT: temperature={self.temperature} must be positive; set weighted=False for equal weights.")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"EDiT: clip={self.clip} must be positive, or null for no limit.")
        if not 0 <= self.step_weight <= 1:
            raise ValueError(f"EDiT: step_weight={self.step_weight} must lie in [0, 1].")
        for name, words in (("granularity", Granularity), ("detector_update", DetectorUpdate), ("clip_scope", ClipScope)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"EDiT: {name}={getattr(self, name)!r} must be one of {', '.join(get_args(words))}.")
        self.detector()

    def detector(self) -> EWMADetector:
        """A new detector, for one unit of one replica."""
        return EWMADetector(self.ewma_alpha, self.ewma_warmup, self.ewma_threshold)


class Detectors:
    """Detectors of all units of all replicas; the same on every rank, since all see all norms.

    Args:
        penalty: the settings.
        num_replicas: n.
        num_units: U.
    """

    def __init__(self, penalty: Penalty, num_replicas: int, num_units: int) -> None:
        self.penalty = penalty
        self._detectors = [[penalty.detector() for _ in range(num_units)] for _ in range(num_replicas)]

    def judge(self, norms: Sequence[Sequence[float]]) -> list[list[bool]]:
        """Tell which norms are anomalous, and take the others (or all, see `Penalty`) into the averages.

        Args:
            norms: G, replica by replica (n x U).

        Returns:
            n x U; norms that are not finite are anomalous from the first synchronisation on.
        """
        return [
            [self._judge_one(detector, norm) for detector, norm in zip(row, of_replica, strict=True)]
            for row, of_replica in zip(self._detectors, norms, strict=True)
        ]

    def _judge_one(self, detector: EWMADetector, norm: float) -> bool:
        if not math.isfinite(norm):
            return True
        anomalous = self.penalty.skip_anomaly and detector.is_outlier(norm)
        if not anomalous or self.penalty.detector_update == "include":
            detector.update(norm)
        return anomalous

    def state_dict(self) -> list[list[dict[str, Any]]]:
        """The averages, as plain numbers."""
        return [[detector.state_dict() for detector in row] for row in self._detectors]

    def load_state_dict(self, state: list[list[dict[str, Any]]]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: other numbers of replicas or units.
        """
        shapes = [(len(rows), len(rows[0]) if rows else 0) for rows in (state, self._detectors)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"EDiT: the state is of {shapes[0]} detectors (replicas, units), this run has {shapes[1]}.")
        for row, stored in zip(self._detectors, state, strict=True):
            for detector, values in zip(row, stored, strict=True):
                detector.load_state_dict(values)


def replica_weights(
    norms: Sequence[float], anomalous: Sequence[bool], steps: Sequence[int], penalty: Penalty
) -> list[float] | None:
    """Weights w_i of the pseudo-gradients of one unit.

    Args:
        norms: G_i of the n replicas.
        anomalous: whose pseudo-gradient counts as zero.
        steps: local steps of each replica since the last synchronisation.
        penalty: the settings.

    Returns:
        n weights, 0 for anomalous replicas; the others' sum to 1 if weights go by norms alone, and to what is left of 1
        otherwise (an anomalous replica then pulls towards the anchor). None if all are anomalous: no outer step.

    Example:
        >>> replica_weights([1.0, 1.0], [False, False], [8, 8], Penalty())
        [0.5, 0.5]
        >>> replica_weights([1.0, 9.0], [True, True], [8, 8], Penalty()) is None
        True
    """
    count = len(norms)
    if all(anomalous):
        return None
    if penalty.weighted:
        least = min(norm for norm, left_out in zip(norms, anomalous, strict=True) if not left_out)
        powers = [
            0.0 if left_out else math.exp((least - norm) / penalty.temperature)
            for norm, left_out in zip(norms, anomalous, strict=True)
        ]
        weights = [power / sum(powers) for power in powers]
    else:
        weights = [1 / count] * count
    if penalty.step_weight and sum(steps):
        r, total = penalty.step_weight, sum(steps)
        weights = [(1 - r) * weight + r * taken / total for weight, taken in zip(weights, steps, strict=True)]
    return [0.0 if left_out else weight for weight, left_out in zip(weights, anomalous, strict=True)]


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """``min(clip / (norm + 1e-6), 1)``, the factor that keeps a pseudo-gradient of a norm within the limit."""
    return (clip / (norm + 1e-6)).clamp(max=1.0)


@dataclass(frozen=True)
class Outer:
    """The outer optimizer: SGD with (Nesterov) momentum on the anchor, as `torch.optim.SGD` computes it.

    Attributes:
        lr: outer learning rate; with 1 and no momentum, the anchor moves to the weighted mean of the replicas.
        momentum: of the outer SGD, in [0, 1).
        nesterov: look ahead by the momentum.

    Raises:
        ValueError: numbers out of range.
    """

    lr: float = 0.8
    momentum: float = 0.85
    nesterov: bool = True

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"EDiT: outer_lr={self.lr} must be positive.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"EDiT: outer_momentum={self.momentum} must lie in [0, 1).")

    @torch.no_grad()
    def step(self, anchor: Tensor, momentum: Tensor | None, gradient: Tensor) -> None:
        """Move an anchor in place.

        Args:
            anchor: of any shape.
            momentum: its buffer, changed in place: ``m <- mu m + g``, zero at first; None without momentum.
            gradient: the pseudo-gradient, of the same shape.
        """
        if momentum is None:
            anchor.sub_(gradient, alpha=self.lr)
            return
        momentum.mul_(self.momentum).add_(gradient)
        step = gradient.add(momentum, alpha=self.momentum) if self.nesterov else momentum
        anchor.sub_(step, alpha=self.lr)
