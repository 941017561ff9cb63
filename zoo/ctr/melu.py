"""The network of MeLU: vectors of categories and means of those of sets, then hidden layers.

Shape suffixes: B samples, F fields of categories, N numbers, M fields and sets, D size of a vector.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.base.random import SampleRandom
from zoo.ctr.click_network import ClickNetwork
from zoo.ctr.deep_layers import DeepLayers
from zoo.ctr.field_embedding import FieldEmbedding

__all__ = ["MeLUNetwork"]

#: Names of the published code: categories, in our order, and sets; the order in which its first layer reads them.
_FIELDS = ("item_emb.embedding_rate", *(f"user_emb.embedding_{name}" for name in ("gender", "age", "occupation", "area")))
_SETS = tuple(f"item_emb.embedding_{name}" for name in ("genre", "director", "actor"))
_READ = (_FIELDS[0], *_SETS, *_FIELDS[1:])


class MeLUNetwork(ClickNetwork):
    """``logit = w . dnn([vectors of categories, mean vectors of sets]) + b``; its hidden layers decide.

    Numbers are sets as 0s and 1s, such as the genres of a film, side by side. Source: MeLU (KDD 2019), section 3.2.

    Args:
        field_dims: Number of ids of each field of categories.
        num_dense: Numbers of a row: all sets together.
        embed_dim: D.
        sets: Size of each set; None: the numbers are one set.
        dnn: Width of each hidden layer.

    Raises:
        ValueError: The sizes of the sets do not sum to ``num_dense``.
    """

    def __init__(
        self,
        field_dims: Sequence[int],
        num_dense: int,
        embed_dim: int = 32,
        sets: Sequence[int] | None = None,
        dnn: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(field_dims, num_dense)
        self.sets = [num_dense] * (num_dense > 0) if sets is None else list(sets)
        if sum(self.sets) != num_dense:
            raise ValueError(f"MeLU: the sets {self.sets} must have num_dense={num_dense} members in all.")
        self.embedding = FieldEmbedding(field_dims, 0, embed_dim)
        self.members = nn.ParameterList(0.01 * torch.randn(size, embed_dim) for size in self.sets)
        self.dnn = DeepLayers((len(field_dims) + len(self.sets)) * embed_dim, dnn)
        self.output = nn.Linear(self.dnn.num_outputs, 1)

    def decision_layers(self) -> tuple[str, ...]:
        """See :meth:`ClickNetwork.decision_layers`."""
        return ("dnn", "output")

    def draw(self, random: SampleRandom) -> list[Tensor]:
        """Nothing."""
        return []

    def forward(
        self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Sequence[Tensor] = (), vectors_BVE: Tensor | None = None
    ) -> Tensor:
        """Logits (B,), see :meth:`ClickNetwork.forward`; of MeLU's published weights, ratings."""
        means = [
            (set_BN @ members) / set_BN.sum(1, keepdim=True).clamp(min=1e-12)
            for set_BN, members in zip(dense_BN.split(self.sets, dim=1) if self.sets else (), self.members, strict=True)
        ]
        vectors_BMD = torch.cat([self.embedding(sparse_BF, dense_BN), *(mean_BD[:, None] for mean_BD in means)], dim=1)
        logit_B: Tensor = self.output(self.dnn(vectors_BMD.flatten(1))).squeeze(1)
        return logit_B

    def from_official(self, weights: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights of MeLU's published code, whose categories are rate, gender, age, occupation, area, and sets genre, director,
        actor.

        Raises:
            ValueError: If these are not such.
        """  # fmt: skip
        theirs = {re.sub(r"^model\.", "", name): value for name, value in weights.items()}
        parts = [
            *(f"{name}.weight" for name in _READ),
            *(f"{n}.{k}" for n in ("fc1", "fc2", "linear_out") for k in ("weight", "bias")),
        ]
        if set(theirs) != set(parts):
            raise ValueError(f"These are no weights of MeLU: they differ in {', '.join(sorted(set(theirs) ^ set(parts))[:3])}.")
        blocks = dict(zip(_READ, theirs["fc1.weight"].chunk(len(_READ), dim=1), strict=True))
        return {
            "embedding.table.weight": torch.cat([theirs[f"{name}.weight"] for name in _FIELDS]),
            **{f"members.{number}": theirs[f"{name}.weight"].T for number, name in enumerate(_SETS)},
            "dnn.layers.0.weight": torch.cat([blocks[name] for name in (*_FIELDS, *_SETS)], dim=1),
            **{"dnn.layers.0.bias": theirs["fc1.bias"], "dnn.layers.1.weight": theirs["fc2.weight"]},
            **{"dnn.layers.1.bias": theirs["fc2.bias"], "output.weight": theirs["linear_out.weight"]},
            "output.bias": theirs["linear_out.bias"],
        }
