"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """``weight * cast(x / sqrt(mean(x^2) + eps))``: computed in float32, cast to the input's type *before* the weight.

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the type of ``x`` (or the wider one of ``x`` and the weight)."""
        accurate = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * nn.functional.rms_norm(accurate, (accurate.shape[-1],), eps=self.eps).to(x.dtype)
