"""Means of an evaluation: loss, bits per byte, and how unevenly the experts are used.

Shape suffixes: B sequences, T tokens of a sequence, L layers with experts, E experts, k experts of a token.
"""

import math

import torch
from torch import Tensor, nn

from zoo.ling.batches import Batch, counted_labels, valid_tokens
from zoo.ling.head import IGNORED
from zoo.ling.network import LingOutput
from zoo.ling.router import assignment_counts
from zoo.metrics.mean_and_error import Mean

__all__ = ["Evaluation"]

_LN2 = math.log(2.0)


class Evaluation(nn.Module):
    """Means over all batches and processes, each weighted by its labels or bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = Mean()
        self.bits_per_byte = Mean()
        self.max_violation = Mean()

    def update(self, output: LingOutput, batch: Batch) -> None:
        """Add a batch.

        Args:
            output: Losses and routings of the batch.
            batch: As for `zoo.ling.Ling`.
        """
        assert output.loss is not None and output.loss_BT is not None
        count = (counted_labels(batch)[:, 1:] != IGNORED).sum()
        self.loss.update(output.loss, count)
        if "num_bytes" in batch:
            num_bytes = batch["num_bytes"].sum()
            self.bits_per_byte.update(output.loss_BT.sum() / _LN2 / num_bytes.clamp(min=1), num_bytes)
        if output.routings:
            valid_N = valid_tokens(batch)
            counts_LE = torch.stack([assignment_counts(r.ids_Nk, r.probs_NE.shape[-1], valid_N) for r in output.routings])
            violation = counts_LE.amax(1) / counts_LE.double().mean(1).clamp(min=1e-9) - 1
            self.max_violation.update(violation.mean(), count)

    def compute(self) -> dict[str, Tensor]:
        """Means since the last call, by name; those without a batch are left out."""
        values = {}
        for name, metric in (("loss", self.loss), ("bits_per_byte", self.bits_per_byte), ("max_violation", self.max_violation)):
            if metric.update_called:
                values[name] = metric.compute()
            metric.reset()
        return values
