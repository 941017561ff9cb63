"""What `predict` is given when there is nothing to start from: the numbers of the samples to draw."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SampleIndices"]


class SampleIndices(Dataset[dict[str, Tensor]]):
    """The numbers of the samples to draw: batches ``{"index"}``.

    Args:
        length: How many samples.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index)}
