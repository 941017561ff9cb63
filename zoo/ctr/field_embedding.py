"""Vectors of the fields of a row: one per category, and one per number that the number scales.

Shape suffixes: B samples, F fields of categories, N numbers, M = F + N fields, D size of a vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FieldEmbedding"]


class FieldEmbedding(nn.Module):
    """Looks up a vector for each field of categories, and scales a vector of its own for each number.

    All categories share one table, in which field f has the rows from ``offsets[f]`` on: one lookup, and one tensor whose
    rows a strategy can divide. A number x contributes ``x v``, as in factorization machines.
    Source: xDeepFM (arXiv 1803.05170), section 2.1; initial values as in its published code (deviation 0.01).

    Args:
        field_dims: Number of ids of each field of categories.
        num_dense: Number of numbers.
        embed_dim: D.

    Raises:
        ValueError: There are no fields, or a size is less than 1.

    Example:
        >>> FieldEmbedding([3, 5], num_dense=1, embed_dim=4)(torch.tensor([[2, 0]]), torch.tensor([[1.5]])).shape
        torch.Size([1, 3, 4])
    """

    offsets_F: Tensor

    def __init__(self, field_dims: Sequence[int], num_dense: int, embed_dim: int) -> None:
        super().__init__()
        if num_dense < 0 or len(field_dims) + num_dense < 1 or min(field_dims, default=1) < 1 or embed_dim < 1:
            raise ValueError(
                f"field_dims={list(field_dims)}, num_dense={num_dense}, embed_dim={embed_dim}: there must be a field, and"
                " every size at least 1."
            )
        starts = torch.tensor([0, *field_dims[:-1]] if field_dims else [], dtype=torch.int64)
        self.register_buffer("offsets_F", starts.cumsum(0), persistent=False)
        self.table = nn.Embedding(sum(field_dims), embed_dim)
        self.numbers_ND = nn.Parameter(torch.empty(num_dense, embed_dim)) if num_dense else None
        nn.init.trunc_normal_(self.table.weight, std=0.01, a=-0.02, b=0.02)
        if self.numbers_ND is not None:
            nn.init.trunc_normal_(self.numbers_ND, std=0.01, a=-0.02, b=0.02)

    def forward(self, sparse_BF: Tensor, dense_BN: Tensor) -> Tensor:
        """Vectors (B, M, D) of the categories, then of the numbers.

        Args:
            sparse_BF: int64 (B, F), each within its field.
            dense_BN: float (B, N).
        """
        vectors_BFD: Tensor = self.table(sparse_BF + self.offsets_F)
        if self.numbers_ND is None:
            return vectors_BFD
        return torch.cat([vectors_BFD, dense_BN[:, :, None].to(self.numbers_ND.dtype) * self.numbers_ND], dim=1)
