"""Interface of networks that score rows.

Shape suffixes: B samples, F fields of categories, N numbers, V vectors of a row, E size of such a vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from zoo.base.random import SampleRandom

__all__ = ["ClickNetwork"]


class ClickNetwork(nn.Module, ABC):
    """Scores rows of categories, numbers and vectors that another network computed, such as those of texts.

    Args:
        field_dims: Number of ids of each field of categories.
        num_dense: Numbers of a row.
        num_vectors: Vectors of a row, V.
        vector_dim: Their size, E.
    """

    def __init__(self, field_dims: Sequence[int], num_dense: int, num_vectors: int = 0, vector_dim: int = 0) -> None:
        super().__init__()
        self.field_dims = tuple(field_dims)
        self.num_dense = num_dense
        self.num_vectors = num_vectors
        self.vector_dim = vector_dim

    @abstractmethod
    def draw(self, random: SampleRandom) -> list[Tensor]:
        """Random draws of training for each sample of a batch, for ``forward``."""

    @abstractmethod
    def forward(
        self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Sequence[Tensor] = (), vectors_BVE: Tensor | None = None
    ) -> Tensor:
        """Logits (B,), a pure function of parameters and arguments.

        Args:
            sparse_BF: int64 (B, F), ids of categories, each within its field.
            dense_BN: float (B, N), numbers.
            drawn: Result of :meth:`draw`; empty in evaluation.
            vectors_BVE: float (B, V, E); None for a network without vectors.
        """
