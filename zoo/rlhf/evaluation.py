"""Evaluation of reward models: loss, accuracy, calibration, and where the scores lie."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.metrics.mean_and_error import Float64Sums, Mean, MeanAndError
from zoo.rlhf.reward_loss import RewardLoss, calibration_sums, pairwise_accuracy

__all__ = ["RewardEvaluation"]

_NUM_BINS = 10


class RewardEvaluation(nn.Module):
    """Means over all prompts of all batches and processes."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = Mean()
        self.accuracy = Mean()
        self.ece = _CalibrationError()
        self.scores = _MeanAndDeviation()

    def update(self, result: RewardLoss) -> None:
        """Add a batch."""
        pairs = result.difference_BP.flatten()
        self.loss.update(result.loss_B)
        self.accuracy.update(pairwise_accuracy(pairs), len(pairs))
        self.ece.update(pairs)
        self.scores.update(result.score_BK)

    def compute(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Loss, accuracy and calibration error since the last call, by name; mean and standard deviation of the scores."""
        values = {"loss": self.loss, "accuracy": self.accuracy, "ece": self.ece}
        computed = {name: metric.compute() for name, metric in values.items()}
        mean, deviation = self.scores.compute()
        for metric in (*values.values(), self.scores):
            metric.reset()
        return computed, mean, deviation


class _CalibrationError(Float64Sums):
    """Expected calibration error, see `zoo.rlhf.reward_loss.calibration_sums`, over batches and processes."""

    excess: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("excess", "count", shape=(_NUM_BINS,), **kwargs)

    def update(self, difference_N: Tensor) -> None:
        self.excess += calibration_sums(difference_N, _NUM_BINS)
        self.count += len(difference_N)

    def compute(self) -> Tensor:
        return (self.excess.abs().sum() / self.count[0]).float()


class _MeanAndDeviation(MeanAndError):
    """Mean and sample standard deviation, float64."""

    def compute(self) -> tuple[Tensor, Tensor]:
        mean, error = super().compute()
        return mean, error * torch.sqrt(self.count)
