"""The network of xDeepFM: a linear term, explicit interactions (CIN), and hidden layers, over the same field vectors.

Shape suffixes: B samples, F fields of categories, N numbers, M = F + N fields, D size of a field's vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.base.random import SampleRandom
from zoo.ctr.click_network import ClickNetwork
from zoo.ctr.compressed_interaction import CompressedInteraction
from zoo.ctr.deep_layers import DeepLayers
from zoo.ctr.field_embedding import FieldEmbedding

__all__ = ["XDeepFMNetwork"]


class XDeepFMNetwork(ClickNetwork):
    """``logit = w_linear . a + w_cin . p + w_dnn . x + b``: raw features a, the CIN's pooled maps p, the DNN's outputs x.

    Source: xDeepFM (arXiv 1803.05170), equation 9 and figure 5.

    Args:
        field_dims: Number of ids of each field of categories.
        num_dense: Numbers of a row.
        embed_dim: D.
        cin: Feature maps of each layer of the CIN; empty: no CIN.
        dnn: Width of each hidden layer of the DNN; empty: no DNN.
        dropout: Dropout after each hidden layer of the DNN.

    Raises:
        ValueError: A size is less than 1, or neither part has a layer.
    """

    def __init__(
        self, field_dims: Sequence[int], num_dense: int, embed_dim: int, cin: Sequence[int], dnn: Sequence[int], dropout: float
    ) -> None:
        super().__init__(field_dims, num_dense)
        if not cin and not dnn:
            raise ValueError("cin and dnn are both empty: give at least one of them a layer.")
        num_fields = len(field_dims) + num_dense
        self.linear = FieldEmbedding(field_dims, num_dense, 1)
        self.embedding = FieldEmbedding(field_dims, num_dense, embed_dim)
        self.cin = CompressedInteraction(num_fields, cin)
        self.dnn = DeepLayers(num_fields * embed_dim, dnn, dropout)
        self.output = nn.Linear(self.cin.num_outputs + (self.dnn.num_outputs if dnn else 0), 1)
        nn.init.zeros_(self.output.bias)

    def decision_layers(self) -> tuple[str, ...]:
        """See :meth:`ClickNetwork.decision_layers`."""
        return ("cin", "dnn", "output")

    def draw(self, random: SampleRandom) -> list[Tensor]:
        """Kept hidden units, of each layer bool (B, width)."""
        return self.dnn.draw(random)

    def forward(
        self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Sequence[Tensor] = (), vectors_BVE: Tensor | None = None
    ) -> Tensor:
        """Logits (B,), see :meth:`ClickNetwork.forward`; there are no vectors."""
        vectors_BMD = self.embedding(sparse_BF, dense_BN)
        parts = [self.cin(vectors_BMD)]
        if len(self.dnn.layers):
            parts.append(self.dnn(vectors_BMD.flatten(1), drawn))
        logit_B: Tensor = self.output(torch.cat(parts, dim=1)).squeeze(1) + self.linear(sparse_BF, dense_BN).sum(dim=(1, 2))
        return logit_B
