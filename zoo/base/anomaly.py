"""Detection of outliers in a stream of numbers: losses, gradient norms, pseudo-gradient norms."""

import math
from collections import deque
from typing import Any, Literal, get_args

__all__ = ["EWMADetector", "Init"]

Init = Literal["zero", "first"]
"""Where a detector's mean starts."""


class EWMADetector:
    """Tells whether a number is far above an exponentially weighted moving average of those before it.

    After ``n`` values the running mean ``mu`` and second moment ``M2`` follow

        mu <- mu + alpha d,   M2 <- (1 - alpha) (M2 + alpha d (v - mu)),   d = v - mu (old mean; ``v - mu`` with the new one),

    and ``z(v) = (v - mu) / sqrt(M2)``, which is 0 while ``n < max(2, warmup)`` or ``M2 = 0``. A value is an outlier if
    ``n >= warmup`` and ``z(v) > threshold * max(1, s)``, with ``s`` the unbiased standard deviation of the last ``warmup``
    values of ``z``. Only high values are outliers. Source: the detector of EDiT, arXiv 2412.07210, as its authors' library
    computes it.

    Args:
        alpha: weight of a new value, in (0, 1].
        warmup: how many values must be seen before anything is an outlier.
        threshold: standard deviations above the mean.
        init: ``zero`` starts with mean 0, as published, so that the first value inflates ``M2``; ``first`` starts with the
            first value and ``M2 = 0``.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> detector = EWMADetector(alpha=0.1, warmup=4, threshold=3.0, init="first")
        >>> for value in (1.0, 1.1, 0.9, 1.0, 1.1):
        ...     detector.update(value)
        >>> detector.is_outlier(1.1), detector.is_outlier(3.0)
        (False, True)
    """

    def __init__(self, alpha: float = 0.02, warmup: int = 120, threshold: float = 4.0, init: Init = "zero") -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"EWMADetector: alpha={alpha} must lie in (0, 1].")
        if warmup < 1 or threshold <= 0:
            raise ValueError(f"EWMADetector: warmup={warmup} must be at least 1 and threshold={threshold} positive.")
        if init not in get_args(Init):
            raise ValueError(f"EWMADetector: init={init!r} must be one of {', '.join(get_args(Init))}.")
        self.alpha = alpha
        self.warmup = warmup
        self.threshold = threshold
        self.init = init
        self.mean = 0.0
        self.second_moment = 0.0
        self.count = 0
        self._scores: deque[float] = deque(maxlen=warmup)

    def update(self, value: float) -> None:
        """Take a value into the averages.

        Args:
            value: a finite number.

        Raises:
            ValueError: it is not finite; the averages would never recover.
        """
        if not math.isfinite(value):
            raise ValueError(f"EWMADetector.update: {value} is not finite; leave it out.")
        if self.count == 0 and self.init == "first":
            self.mean = value
        self.count += 1
        difference = value - self.mean
        self.mean += self.alpha * difference
        self.second_moment = (1 - self.alpha) * (self.second_moment + self.alpha * difference * (value - self.mean))
        self._scores.append(self.score(value))

    def score(self, value: float) -> float:
        """``z(v)``: standard deviations above the moving mean; 0 during the warm-up."""
        if self.second_moment <= 0 or self.count < max(2, self.warmup):
            return 0.0
        return (value - self.mean) / math.sqrt(self.second_moment)

    @property
    def score_limit(self) -> float:
        """The score above which a value is an outlier."""
        return self.threshold * max(1.0, _standard_deviation(self._scores))

    @property
    def value_limit(self) -> float:
        """The value above which a value is an outlier; infinite during the warm-up."""
        if self.count < max(2, self.warmup):
            return math.inf
        return self.mean + self.score_limit * math.sqrt(max(self.second_moment, 0.0))

    def is_outlier(self, value: float) -> bool:
        """Whether a value lies too far above the moving mean; infinity does, after the warm-up."""
        score = self.score(value)
        # The limit is never below the threshold, and takes longer to find out.
        return self.count >= self.warmup and score > self.threshold and score > self.score_limit

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain numbers."""
        return {
            "mean": self.mean,
            "second_moment": self.second_moment,
            "count": self.count,
            "scores": list(self._scores),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.mean = float(state_dict["mean"])
        self.second_moment = float(state_dict["second_moment"])
        self.count = int(state_dict["count"])
        self._scores = deque(state_dict["scores"], maxlen=self.warmup)


def _standard_deviation(values: deque[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
