"""Keys and values of earlier tokens, in memory that is allocated once.

Shape suffixes: L layers, B sequences, K key/value heads, S slots of the cache, T new tokens, W width of a head.
"""

import torch
from torch import Tensor

from zoo.ling.config import LingConfig

__all__ = ["KVCache", "StaticCache"]


class KVCache:
    """Keys and values of all layers, (L, B, K, S, W) each; sequences advance together.

    Args:
        config: the architecture.
        batch_size: sequences B.
        max_length: slots S: prompt and generated tokens.
        dtype: of keys and values.
        device: Device of both.

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
        shape = (config.num_hidden_layers, 2, batch_size, config.num_key_value_heads, max_length, config.head_width)
        self._both = torch.zeros(shape, dtype=dtype, device=device)  # keys, then values: a step writes them at once
        self.length = 0

    @property
    def keys(self) -> Tensor:
        """(L, B, K, S, W)."""
        return self._both[:, 0]

    @property
    def values(self) -> Tensor:
        """(L, B, K, S, W)."""
        return self._both[:, 1]

    @property
    def batch_size(self) -> int:
        """Sequences B."""
        return self._both.shape[2]

    @property
    def max_length(self) -> int:
        """Slots S."""
        return self._both.shape[4]

    @staticmethod
    def bytes_per_token(config: LingConfig, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one token takes: 57,344 for Ling-Lite, 270,336 for Ling-Plus."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_width * dtype.itemsize

    def update(self, layer: int, key_BKTW: Tensor, value_BKTW: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a layer; return all keys and values up to them.

        Raises:
            ValueError: they do not fit, or have gradients.
        """
        if key_BKTW.requires_grad:
            raise ValueError("KVCache keeps no gradients: call the network under torch.no_grad() or torch.inference_mode().")
        end = self.length + key_BKTW.shape[2]
        self.check_room(key_BKTW.shape[2])
        keys, values = self._both[layer].unbind(0)
        keys[:, :, self.length : end] = key_BKTW
        values[:, :, self.length : end] = value_BKTW
        return keys[:, :, :end], values[:, :, :end]

    def check_room(self, num_tokens: int) -> None:
        """Make sure that so many more tokens fit.

        Raises:
            ValueError: they do not.
        """
        if self.length + num_tokens > self.max_length:
            raise ValueError(
                f"The sequence of {self.length + num_tokens} tokens is longer than the cache of {self.max_length}: make the cache"
                " longer, or the prompt or max_new_tokens shorter."
            )

    def open_slot(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views for one more token of each sequence, without copies.

        Returns:
            For each layer the slot of the new key and value (2, B, K, W); and keys and values with that slot (B, K, length + 1,
            W), those of layer i at 2 i and 2 i + 1.
        """
        self.check_room(1)
        slots = self._both.select(4, self.length).unbind(0)
        return slots, self._both.narrow(4, 0, self.length + 1).flatten(0, 1).unbind(0)

    def advance(self, num_tokens: int) -> None:
        """Count tokens that every layer has stored."""
        self.length += num_tokens

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0


class StaticCache:
    """View of a `KVCache` for a step whose shapes never change: all slots are returned, a tensor holds the one that is written.

    Such a step can be compiled, or captured as a graph. Slots beyond the position have to be masked.

    Args:
        cache: Memory of keys and values.
        position_1: int64 (1,), the slot that is written.
    """

    length = 0  # the shapes of a step do not depend on it; positions are given

    def __init__(self, cache: KVCache, position_1: Tensor) -> None:
        self.keys, self.values, self.position_1 = cache.keys, cache.values, position_1

    def update(self, layer: int, key_BKTW: Tensor, value_BKTW: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token, return all slots (B, K, S, W)."""
        key, value = self.keys[layer], self.values[layer]
        key.index_copy_(2, self.position_1, key_BKTW.to(key.dtype))
        value.index_copy_(2, self.position_1, value_BKTW.to(value.dtype))
        return key, value

    def advance(self, num_tokens: int) -> None:
        """Do nothing: the owner of the position moves it."""
