"""The language model that users hold: the network, and how it continues prompts."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from zoo.ling.cache import KVCache
from zoo.ling.decoder import LingDecoder, decoder
from zoo.ling.network import LingNetwork
from zoo.lm.generation import generate

__all__ = ["LingForCausalLM"]


class LingForCausalLM(LingNetwork):
    """Ling-Lite, Ling-Plus and relatives, for training and generation; arguments as for `LingNetwork`."""

    encodes_prompts = False

    def decoder(
        self, batch_size: int, length: int, cache: KVCache | None = None, compile: bool = False
    ) -> AbstractContextManager[LingDecoder]:
        """The passes over one batch that `generate` makes, see `zoo.ling.decoder.decoder`."""
        return decoder(self, batch_size, length, cache, compile)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue prompts, (B, T) to (B, T + n); see `zoo.lm.generation.generate` for the options.

        Args:
            input_ids: Prompts, padded on the left.
            attention_mask: 1 for tokens, 0 for padding; None: no padding.
            options: ``generation`` or its fields, ``random`` and others.
        """
        return generate(self, input_ids, attention_mask, **options)
