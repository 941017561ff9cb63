"""Keys and values of earlier tokens, in memory that is allocated once.

Shape suffixes: B sequences, K key/value heads, S slots of the cache, T new tokens, W width of a head.
"""

import torch
from torch import Tensor

from zoo.ling.config import LingConfig

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of all layers, (L, B, K, S, W) each; sequences advance together.

    Args:
        config: the architecture.
        batch_size: sequences B.
        max_length: slots S: prompt and generated tokens.
        dtype: of keys and values.
        device: where they lie.

    Raises:
        ValueError: fewer than one sequence or slot.
    """

    def __init__(
        self,
        config: LingConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"KVCache: batch_size={batch_size} and max_length={max_length} must be at least 1.")
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    @property
    def max_length(self) -> int:
        """Slots S."""
        return self.keys.shape[3]

    @staticmethod
    def bytes_per_token(config: LingConfig, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one token takes: 57,344 for Ling-Lite, 270,336 for Ling-Plus."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_width * dtype.itemsize

    def update(self, layer: int, key_BKTW: Tensor, value_BKTW: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a layer; return all keys and values up to them.

        Raises:
            ValueError: they do not fit.
        """
        end = self.length + key_BKTW.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"The sequence of {end} tokens is longer than the cache of {self.max_length}: make the cache longer, or the"
                " prompt or max_new_tokens shorter."
            )
        self.keys[layer, :, :, self.length : end] = key_BKTW
        self.values[layer, :, :, self.length : end] = value_BKTW
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count tokens that every layer has stored."""
        self.length += num_tokens

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0
