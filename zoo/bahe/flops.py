"""Floating-point operations of a forward pass, a multiplication and an addition counted as two."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["BlockSize"]


@dataclass(frozen=True)
class BlockSize:
    """Sizes of a block of a language model.

    Attributes:
        width: Of its vectors, h.
        inner: Of its perceptron, f.
        matrices: Of its perceptron: 2, or 3 where it is gated.
        kv_width: Of all its keys together; None: the width.
    """

    width: int
    inner: int
    matrices: int = 2
    kv_width: int | None = None

    @classmethod
    def of(cls, config: Any) -> "BlockSize":
        """Sizes that a configuration of transformers says."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        gated = 3 if hasattr(config, "rms_norm_eps") else 2
        return cls(config.hidden_size, inner, gated, config.hidden_size * kv_heads // heads)

    def flops(self, lengths: Iterable[int], blocks: int) -> int:
        """Operations of some blocks on sequences of these lengths T: ``blocks * sum(T c + 4 T^2 h)``."""
        h = self.width
        per_token = 2 * (2 * h * h + 2 * h * (self.kv_width or h) + self.matrices * h * self.inner)
        return blocks * sum(length * per_token + 4 * length**2 * h for length in lengths)
