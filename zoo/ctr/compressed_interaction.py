"""The compressed interaction network (CIN): explicit products of field vectors, of bounded degree.

Shape suffixes: B samples, M fields, D size of a field's vector, H and G feature maps of a layer and of the one before.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["CompressedInteraction"]


class CompressedInteraction(nn.Module):
    """Feature maps that are sums of products of field vectors, element by element.

        X_k[h] = sum over i, j of W_k[h, i, j] (X_{k-1}[i] * X_0[j]),      p_k[h] = sum over the D elements of X_k[h].

    A map of layer k is homogeneous of degree k + 1 in the field vectors. No bias and no activation: the identity was seen to
    be best. Source: xDeepFM (arXiv 1803.05170), equations 6 and 7, section 4.4. A layer costs B D H G M multiplications and
    has the products of pairs, B D G M numbers, in memory.

    Args:
        num_fields: M.
        widths: H of each layer.

    Raises:
        ValueError: There is no field, or a layer without maps.
    """

    def __init__(self, num_fields: int, widths: Sequence[int]) -> None:
        super().__init__()
        if num_fields < 1 or min(widths, default=1) < 1:
            raise ValueError(f"CIN: num_fields={num_fields} and widths={list(widths)} must be at least 1.")
        self.num_outputs = sum(widths)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(width, before * num_fields)) for before, width in pairwise([num_fields, *widths])
        )
        for weight_HP in self.weights:
            nn.init.xavier_uniform_(weight_HP)

    def forward(self, vectors_BMD: Tensor) -> Tensor:
        """The maps of all layers, each summed over its elements: (B, sum of the widths)."""
        fields_BDM = vectors_BMD.transpose(1, 2)
        maps_BDG, pooled = fields_BDM, []
        for weight_HP in self.weights:
            pairs_BDP = (maps_BDG[:, :, :, None] * fields_BDM[:, :, None, :]).flatten(2)
            maps_BDG = linear(pairs_BDP, weight_HP)
            pooled.append(maps_BDG.sum(dim=1))
        return torch.cat(pooled, dim=1) if pooled else vectors_BMD.new_zeros(len(vectors_BMD), 0)
