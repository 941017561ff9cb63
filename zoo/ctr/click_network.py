"""Interface of networks that score rows.

Shape suffixes: B samples, F fields of categories, N numbers, V vectors of a row, E size of such a vector, U rows of a table.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.base.random import SampleRandom
from zoo.ctr.field_embedding import FieldEmbedding

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

    def decision_layers(self) -> tuple[str, ...]:
        """Names of the parts that decide on the vectors of a row, the last one last; what meta learning adapts alone."""
        return ("output",)

    def from_official(self, weights: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights of the published code by the names of this network's.

        Raises:
            ValueError: If there are none, or these are not such.
        """
        raise ValueError(f"{type(self).__name__} has no officially released weights to load.")

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

    # The rows of its tables

    def _fields(self) -> dict[str, FieldEmbedding]:
        return {name: module for name, module in self.named_modules() if isinstance(module, FieldEmbedding)}

    def row_tables(self) -> dict[str, nn.Parameter]:
        """Tables of categories by the names of their parameters; all have one row for each id of each field."""
        return {f"{name}.table.weight": module.table.get_parameter("weight") for name, module in self._fields().items()}

    def row_numbers(self, sparse: Tensor) -> Tensor:
        """Rows of the tables, int64 (..., F), that ids (..., F) of categories stand for."""
        starts_F = torch.tensor([0, *self.field_dims], dtype=torch.int64, device=sparse.device)[:-1].cumsum(0)
        return sparse + starts_F

    def run_on_rows(
        self, tensors: Mapping[str, Tensor], places_BF: Tensor, dense_BN: Tensor, drawn: Sequence[Tensor] = ()
    ) -> Tensor:
        """Logits (B,) of the network with some rows in place of whole tables; it has no vectors.

        Args:
            tensors: In place of parameters, by their names; of each table some rows (U, D).
            places_BF: int64 (B, F), the row of each category among those.
            dense_BN: As of :meth:`forward`, likewise ``drawn``.
        """
        starts: dict[str, Any] = {f"{name}.offsets_F": torch.zeros_like(each.offsets_F) for name, each in self._fields().items()}
        logit_B: Tensor = functional_call(self, {**tensors, **starts}, (places_BF, dense_BN, drawn))
        return logit_B
