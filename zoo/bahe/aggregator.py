"""Sequences of vectors of behaviours to one vector each, through the upper blocks of a language model.

Shape suffixes: X sequences, M behaviours, D width.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zoo.lm.pooling import Pooling, PoolingKind
from zoo.lm.split import HighBlocks

__all__ = ["Aggregator", "PositionKind", "Rescale"]

PositionKind = Literal["auto", "none", "learned"]
Rescale = Literal["none", "rms", "learned"]


class Aggregator(nn.Module):
    """``S = F_p(high(x + P))`` for each sequence by itself; S = 0 for an empty one. Source: arXiv 2403.19347, section 2.

    Args:
        high: Upper blocks.
        width: D.
        pooling: F_p. ``cls`` is the oldest behaviour's vector, which must see the others.
        positions: P, a table for slots, the oldest first, that starts at 0. ``auto``: where blocks have no rotary positions,
            which count slots by themselves.
        max_behaviors: Rows of P, the longest sequence.
        causal: Whether behaviours see older ones only. None: as the blocks were trained.
        rescale: Vectors are divided by their root mean square, or multiplied by a trained number that starts at 1.

    Raises:
        ValueError: If an option is unknown or does not fit.
    """

    def __init__(
        self,
        high: HighBlocks,
        width: int,
        pooling: PoolingKind = "mean",
        positions: PositionKind = "auto",
        max_behaviors: int = 64,
        causal: bool | None = None,
        rescale: Rescale = "none",
    ) -> None:
        super().__init__()
        if positions not in get_args(PositionKind) or rescale not in get_args(Rescale) or max_behaviors < 1:
            raise ValueError(
                f"BAHE: positions={positions!r} must be one of {', '.join(get_args(PositionKind))}, rescale={rescale!r} of"
                f" {', '.join(get_args(Rescale))}, max_behaviors={max_behaviors} at least 1."
            )
        self.causal = high.is_causal if causal is None else causal
        if pooling == "cls" and self.causal:
            raise ValueError("BAHE: pooling='cls' is the oldest behaviour, which sees no other: set causal=false, or take last.")
        self.high = high
        self.pooling = Pooling(pooling, width)
        self.max_behaviors = max_behaviors
        has_table = positions == "learned" or (positions == "auto" and not high.is_rotary)
        self.positions_MD = nn.Parameter(torch.zeros(max_behaviors, width)) if has_table else None
        self.rescale = rescale
        self.scale = nn.Parameter(torch.ones(())) if rescale == "learned" else None

    def forward(self, vectors_XMD: Tensor, there_XM: Tensor) -> Tensor:
        """(X, M, D) to (X, D).

        Args:
            vectors_XMD: Vectors of behaviours, the oldest first.
            there_XM: Whether a slot holds a behaviour; padding is on the right.

        Raises:
            ValueError: If there are more slots than positions.
        """
        M = vectors_XMD.shape[1]
        if self.max_behaviors < M:
            raise ValueError(f"BAHE has {self.max_behaviors} positions, given are {M} behaviours: raise max_behaviors.")
        if self.rescale == "rms":
            vectors_XMD = vectors_XMD * (vectors_XMD.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        elif self.scale is not None:
            vectors_XMD = vectors_XMD * self.scale
        if self.positions_MD is not None:
            vectors_XMD = vectors_XMD + self.positions_MD[:M]
        some_X1 = there_XM.any(1, keepdim=True)
        # Softmax over nothing would be NaN: an empty sequence attends to its first slot.
        seen_XM = there_XM | (~some_X1 & (torch.arange(M, device=there_XM.device) == 0))
        mask = seen_XM.long()
        if self.causal != self.high.is_causal:
            mask = seen_XM[:, None, None].expand(-1, 1, M, M)
            if self.causal:
                mask = mask & torch.ones(M, M, dtype=torch.bool, device=mask.device).tril()
        pooled_XD = self.pooling(self.high(vectors_XMD, mask), seen_XM)
        return torch.where(some_X1, pooled_XD, 0.0)
