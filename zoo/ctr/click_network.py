"""Interface of networks that score rows.

Shape suffixes: B samples, F fields of categories, N numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from zoo.base.random import SampleRandom

__all__ = ["ClickNetwork"]


class ClickNetwork(nn.Module, ABC):
    """Scores rows of categories and numbers.

    Args:
        field_dims: Number of ids of each field of categories.
        num_dense: Numbers of a row.
    """

    def __init__(self, field_dims: Sequence[int], num_dense: int) -> None:
        super().__init__()
        self.field_dims = tuple(field_dims)
        self.num_dense = num_dense

    @abstractmethod
    def draw(self, random: SampleRandom) -> list[Tensor]:
        """Random draws of training for each sample of a batch, for ``forward``."""

    @abstractmethod
    def forward(self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B,).

        Args:
            sparse_BF: int64 (B, F), ids of categories, each within its field.
            dense_BN: float (B, N), numbers.
            drawn: Result of :meth:`draw`; empty in evaluation.
        """
