"""Data of `predict` without input: the numbers of the samples to draw."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SampleIndices"]


class SampleIndices(Dataset[dict[str, Tensor]]):
    """The numbers of the samples to draw: batches ``{"index"}``, and ``"label"`` where classes are chosen.

    Args:
        length: Number of samples.
        labels: Classes of the samples, cycled over their numbers: sample ``i`` has class ``labels[i % len(labels)]``.
            ``None``: none are chosen.
    """

    def __init__(self, length: int, labels: Sequence[int] | None = None) -> None:
        self.length = length
        self.labels = labels

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {"index": torch.tensor(index)}
        if self.labels is not None:
            sample["label"] = torch.tensor(self.labels[index % len(self.labels)])
        return sample
