"""NormHead.

Shape suffixes: D width, V vocabulary.
Source: arXiv 2503.05139, equation 4, and the code released with the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Head", "normalized_weight"]

EPS = 1e-7


def normalized_weight(weight_VD: Tensor) -> Tensor:
    """``W[:, j] / (||W[:, j]|| + 1e-7)``: each hidden feature's column over the vocabulary has norm 1.

    The norm takes no gradient: that of W is ``dL/dW_n / ||W[:, j]||``, its radial part included.
    """
    accurate = torch.promote_types(weight_VD.dtype, torch.float32)
    norm_D = weight_VD.detach().to(accurate).norm(dim=0) + EPS
    return (weight_VD / norm_D).to(weight_VD.dtype)


class Head(nn.Module):
    """Logits over the vocabulary, with the weight normalised over it (NormHead) or as it is.

    The weight itself is never overwritten. The normalised one is computed again in each forward pass, because nothing tells of
    every change of a weight; it is kept only inside a generation, see `keep`.

    Args:
        vocab_size: V.
        hidden_size: D.
        normalize: whether the head is a NormHead.
    """

    def __init__(self, vocab_size: int, hidden_size: int, normalize: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.normalize = normalize
        self._kept: list[Tensor] | None = None

    def effective_weight(self) -> Tensor:
        """Factor of the logits, (V, D)."""
        if not self.normalize:
            return self.weight
        if self._kept is None:
            return normalized_weight(self.weight)
        if not self._kept:
            self._kept.append(normalized_weight(self.weight))
        return self._kept[0]

    @contextmanager
    def keep(self, kept: list[Tensor]) -> Iterator[None]:
        """Take the normalised weight from a list inside, which holds it from the first time on: for the steps of one generation.

        Args:
            kept: empty at the first step; it belongs to the generation, so that other forward passes see nothing of it.
        """
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., V), float32 (or float64)."""
        logits = F.linear(x, self.effective_weight())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
