"""Means of an evaluation: loss, bits per byte, and how unevenly the experts are used.

Shape suffixes: L layers with experts, E experts, k experts of a token.
"""

import torch
from typing_extensions import override

from zoo.ling.network import LingOutput
from zoo.ling.router import assignment_counts
from zoo.lm import evaluation
from zoo.lm.batches import Batch, counted_labels, valid_tokens
from zoo.lm.cross_entropy import IGNORED
from zoo.metrics.mean_and_error import Mean

__all__ = ["Evaluation"]


class Evaluation(evaluation.Evaluation):
    """Those of a language model, and the largest excess of an expert's load over the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.max_violation = Mean()

    def update_routing(self, output: LingOutput, batch: Batch) -> None:
        """Add the routing of a batch.

        Args:
            output: Routings of the batch.
            batch: As for `zoo.ling.Ling`.
        """
        if output.routings:
            valid_N = valid_tokens(batch)
            counts_LE = torch.stack([assignment_counts(r.ids_Nk, r.probs_NE.shape[-1], valid_N) for r in output.routings])
            violation = counts_LE.amax(1) / counts_LE.double().mean(1).clamp(min=1e-9) - 1
            self.max_violation.update(violation.mean(), (counted_labels(batch)[:, 1:] != IGNORED).sum())

    @override
    def means(self) -> dict[str, Mean]:
        return {**super().means(), "max_violation": self.max_violation}
