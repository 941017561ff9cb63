"""The network of DCN-v2: cross layers, then hidden layers.

Shape suffixes: B samples, F fields of categories, N numbers, D size of the vector of a field, V given vectors, E their size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.base.random import SampleRandom
from zoo.ctr.click_network import ClickNetwork
from zoo.ctr.cross_layers import CrossLayers
from zoo.ctr.deep_layers import DeepLayers
from zoo.ctr.field_embedding import FieldEmbedding

__all__ = ["DCNNetwork"]


class DCNNetwork(ClickNetwork):
    """``logit = w . dnn(cross(x0)) + b``; x0 are the vectors of fields and the given ones, joined.

    Without cross layers it is a plain network of hidden layers. Source: DCN V2 (arXiv 2008.13535), figure 1, stacked.

    Args:
        field_dims: Number of ids of each field of categories.
        num_dense: Numbers of a row.
        embed_dim: D.
        num_cross: Number of cross layers.
        dnn: Width of each hidden layer.
        dropout: Dropout after each hidden layer.
        num_vectors: V.
        vector_dim: E.

    Raises:
        ValueError: There are no inputs, or a size is out of range.
    """

    def __init__(
        self,
        field_dims: Sequence[int],
        num_dense: int,
        embed_dim: int,
        num_cross: int,
        dnn: Sequence[int],
        dropout: float,
        num_vectors: int = 0,
        vector_dim: int = 0,
    ) -> None:
        super().__init__(field_dims, num_dense, num_vectors, vector_dim)
        num_fields = len(field_dims) + num_dense
        num_inputs = num_fields * embed_dim + num_vectors * vector_dim
        self.embedding = FieldEmbedding(field_dims, num_dense, embed_dim) if num_fields else None
        self.cross = CrossLayers(num_inputs, num_cross)
        self.dnn = DeepLayers(num_inputs, dnn, dropout)
        self.output = nn.Linear(self.dnn.num_outputs, 1)
        nn.init.zeros_(self.output.bias)

    def decision_layers(self) -> tuple[str, ...]:
        """See :meth:`ClickNetwork.decision_layers`."""
        return ("cross", "dnn", "output")

    def draw(self, random: SampleRandom) -> list[Tensor]:
        """Kept hidden units, of each layer bool (B, width)."""
        return self.dnn.draw(random)

    def forward(
        self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Sequence[Tensor] = (), vectors_BVE: Tensor | None = None
    ) -> Tensor:
        """Logits (B,), see :meth:`ClickNetwork.forward`."""
        parts = [] if self.embedding is None else [self.embedding(sparse_BF, dense_BN).flatten(1)]
        if vectors_BVE is not None:
            parts.append(vectors_BVE.flatten(1))
        logit_B: Tensor = self.output(self.dnn(self.cross(torch.cat(parts, dim=1)), drawn)).squeeze(1)
        return logit_B
