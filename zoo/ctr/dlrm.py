"""The network of DLRM: products of all pairs of vectors, of categories and of the numbers together.

Shape suffixes: B samples, F fields of categories, N numbers, D size of the vector of a field, V given vectors, E their size,
K vectors in all, P pairs of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.base.random import SampleRandom
from zoo.ctr.click_network import ClickNetwork
from zoo.ctr.deep_layers import DeepLayers
from zoo.ctr.dlrm_weights import from_dlrm
from zoo.ctr.field_embedding import FieldEmbedding

__all__ = ["DLRMNetwork"]


class DLRMNetwork(ClickNetwork):
    """``logit = w . top(z, products of all pairs of [z, vectors]) + b``; z is the vector that the bottom layers make of numbers.

    Given vectors of another size than the fields' are mapped to it. Source: DLRM (arXiv 1906.00091), section 2; initial values as
    in its published code: a field of V ids uniform in ``[-1/sqrt(V), 1/sqrt(V)]``, weights (m, n) of a layer normal with variance
    ``2 / (m + n)``, and its m biases with ``1 / m``.

    Args:
        field_dims: Number of ids of each field of categories.
        num_dense: Numbers of a row.
        embed_dim: D.
        bottom: Width of each hidden layer below z.
        top: Width of each hidden layer behind the products.
        dropout: Dropout after each hidden layer of ``top``; published without.
        num_vectors: V.
        vector_dim: E.

    Raises:
        ValueError: There are fewer than two vectors, or a size is out of range.
    """

    def __init__(
        self,
        field_dims: Sequence[int],
        num_dense: int,
        embed_dim: int,
        bottom: Sequence[int],
        top: Sequence[int],
        dropout: float,
        num_vectors: int = 0,
        vector_dim: int = 0,
    ) -> None:
        super().__init__(field_dims, num_dense, num_vectors, vector_dim)
        count = len(field_dims) + (num_dense > 0) + num_vectors
        if count < 2:
            raise ValueError(f"DLRM multiplies pairs of vectors: {count} of fields, numbers and vectors are too few.")
        self.embedding = FieldEmbedding(field_dims, 0, embed_dim) if field_dims else None
        self.bottom = DeepLayers(num_dense, [*bottom, embed_dim]) if num_dense else None
        self.projection = nn.Linear(vector_dim, embed_dim) if num_vectors and vector_dim != embed_dim else nn.Identity()
        self.top = DeepLayers(count * (count - 1) // 2 + (embed_dim if num_dense else 0), top, dropout)
        self.output = nn.Linear(self.top.num_outputs, 1)
        for layer in (*(() if self.bottom is None else self.bottom.layers), *self.top.layers, self.output):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=layer.out_features**-0.5)
        if self.embedding is not None:
            for rows in self.embedding.table.weight.detach().split(list(field_dims)):
                nn.init.uniform_(rows, -(len(rows) ** -0.5), len(rows) ** -0.5)

    def decision_layers(self) -> tuple[str, ...]:
        """See :meth:`ClickNetwork.decision_layers`."""
        return ("top", "output")

    def from_official(self, weights: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :meth:`ClickNetwork.from_official`; of ``dlrm_s_pytorch.py`` and of TorchRec."""
        return from_dlrm(weights)

    def draw(self, random: SampleRandom) -> list[Tensor]:
        """Kept hidden units, of each layer bool (B, width)."""
        return self.top.draw(random)

    def forward(
        self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Sequence[Tensor] = (), vectors_BVE: Tensor | None = None
    ) -> Tensor:
        """Logits (B,), see :meth:`ClickNetwork.forward`."""
        numbers = [] if self.bottom is None else [self.bottom(dense_BN)]
        parts = [z_BD[:, None] for z_BD in numbers]
        if self.embedding is not None:
            parts.append(self.embedding(sparse_BF, dense_BN))
        if vectors_BVE is not None:
            parts.append(self.projection(vectors_BVE))
        all_BKD = torch.cat(parts, dim=1)
        first_P, second_P = torch.tril_indices(all_BKD.shape[1], all_BKD.shape[1], -1, device=all_BKD.device)
        products_BP = (all_BKD @ all_BKD.transpose(1, 2))[:, first_P, second_P]
        logit_B: Tensor = self.output(self.top(torch.cat([*numbers, products_BP], dim=1), drawn)).squeeze(1)
        return logit_B
