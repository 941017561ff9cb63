"""Vectors of whole texts from those of their tokens.

Shape suffixes: B texts, T tokens, D width.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

__all__ = ["Pooling", "PoolingKind"]

PoolingKind = Literal["mean", "last", "cls", "learned"]


class Pooling(nn.Module):
    """One vector a text; padding has no part in it.

    Args:
        kind: ``mean`` of the tokens, the ``last`` token, the first one (``cls``), or a mean with weights
            ``softmax(h q / sqrt(D))`` of a ``learned`` query q, which starts at 0, the plain mean.
        width: D.

    Raises:
        ValueError: If there is no such kind.
    """

    def __init__(self, kind: PoolingKind, width: int) -> None:
        super().__init__()
        if kind not in get_args(PoolingKind):
            raise ValueError(f"pooling={kind!r} must be one of {', '.join(get_args(PoolingKind))}.")
        self.kind = kind
        self.query = nn.Parameter(torch.zeros(width)) if kind == "learned" else None

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, D).

        Args:
            hidden_BTD: Vectors of tokens.
            mask_BT: 1 for tokens, 0 for padding on either side; None: no padding.
        """
        B, T, D = hidden_BTD.shape
        if mask_BT is None:
            mask_BT = hidden_BTD.new_ones(B, T)
        if self.kind in ("cls", "last"):
            place_T = torch.arange(T, device=hidden_BTD.device)
            seen_BT = mask_BT.bool()
            at_B = torch.where(seen_BT, place_T, T).amin(1) if self.kind == "cls" else torch.where(seen_BT, place_T, -1).amax(1)
            return hidden_BTD[torch.arange(B, device=hidden_BTD.device), at_B.clamp(0, T - 1)]
        if self.query is not None:
            scores_BT = (hidden_BTD @ self.query.to(hidden_BTD.dtype)) / D**0.5
            weights_BT = scores_BT.masked_fill(~mask_BT.bool(), -torch.inf).softmax(1)
        else:
            weights_BT = mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
        return (weights_BT.to(hidden_BTD.dtype)[..., None] * hidden_BTD).sum(1)
