"""Means of an evaluation: loss and bits per byte."""

import math
from typing import NamedTuple

from torch import Tensor, nn

from zoo.lm.batches import Batch, counted_labels
from zoo.lm.cross_entropy import IGNORED
from zoo.metrics.mean_and_error import Mean

__all__ = ["Evaluation", "TokenLosses"]

_LN2 = math.log(2.0)


class TokenLosses(NamedTuple):
    """Cross-entropies of a batch, in nats.

    Attributes:
        loss: Mean over the labels.
        loss_BT: That of each label, without gradient; 0 where none counts.
    """

    loss: Tensor
    loss_BT: Tensor


class Evaluation(nn.Module):
    """Means over all batches and processes, each weighted by its labels or bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = Mean()
        self.bits_per_byte = Mean()

    def update(self, loss: Tensor, loss_BT: Tensor, batch: Batch) -> None:
        """Add a batch.

        Args:
            loss: Mean over the labels, in nats.
            loss_BT: Loss of each label.
            batch: The batch.
        """
        self.loss.update(loss, (counted_labels(batch)[:, 1:] != IGNORED).sum())
        if "num_bytes" in batch:
            num_bytes = batch["num_bytes"].sum()
            self.bits_per_byte.update(loss_BT.sum() / _LN2 / num_bytes.clamp(min=1), num_bytes)

    def means(self) -> dict[str, Mean]:
        """The means, by name."""
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte}

    def compute(self) -> dict[str, Tensor]:
        """Means since the last call, by name; those without a batch are left out."""
        values = {}
        for name, metric in self.means().items():
            if metric.update_called:
                values[name] = metric.compute()
            metric.reset()
        return values
