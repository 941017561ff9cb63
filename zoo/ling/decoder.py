"""The decoder of Ling's network: prompts in one pass, then a step for each token, as suits network and device.

Shape suffixes: B sequences, T tokens of the prompts, S slots of the cache, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from zoo.ling.cache import KVCache
from zoo.ling.decode_step import CPUStep, StaticStep, lockstep, static_step
from zoo.ling.network import LingNetwork
from zoo.nn.evaluation_mode import evaluation_mode

__all__ = ["LingDecoder", "cache_dtype", "decoder"]

Step = Callable[[Tensor], Tensor]
"""From the newest tokens (B,) to the scores (B, V) of the next."""


def cache_dtype(network: LingNetwork) -> torch.dtype:
    """The type that attention computes with, in which keys and values are kept."""
    weight = network.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


@contextmanager
def decoder(
    network: LingNetwork, batch_size: int, length: int, cache: KVCache | None = None, compile: bool = False
) -> Iterator["LingDecoder"]:
    """The passes of the network over one batch, in evaluation mode.

    Args:
        network: The network.
        batch_size: Sequences B.
        length: Most tokens of a sequence that are read.
        cache: Memory for keys and values, emptied first; None: as much as is needed.
        compile: Compile the step; its cache is its own.

    Raises:
        ValueError: If the cache does not fit, or the step cannot be compiled.
    """
    dtype = cache_dtype(network)
    if cache is not None:
        if compile:
            raise ValueError("generate: a compiled step has a cache of its own; give either cache or compile=True.")
        _check_cache(network, cache, batch_size, length)
        cache.reset()
    with evaluation_mode(network):
        if compile:
            with static_step(network, batch_size, length, dtype) as static:
                yield LingDecoder(network, static.cache, length, static)
        else:
            if cache is None:
                cache = KVCache(network.config, batch_size, length, dtype, network.lm_head.weight.device)
            yield LingDecoder(network, cache, length)


class LingDecoder:
    """A `Decoder`: `begin` chooses the step, from a compiled one, `CPUStep` where it suits, and the network itself.

    Args:
        network: In evaluation mode, with weights that stay.
        cache: An empty one.
        length: Most tokens of a sequence that are read.
        static: The compiled step that the cache belongs to.
    """

    def __init__(self, network: LingNetwork, cache: KVCache, length: int, static: StaticStep | None = None) -> None:
        self.network, self.cache, self.length, self.static = network, cache, length, static
        self._head: list[Tensor] = []  # the head's weight, computed once for all passes
        self._step: Step | None = None

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Scores (B, V) of the tokens after prompts (B, T); the mask is 0 at padding, and absent if there is none."""
        network = self.network
        padding_B = None if attention_mask is None else (~attention_mask.bool()).sum(1)
        with network.lm_head.keep(self._head):
            logits = network(input_ids, attention_mask, cache=self.cache, last_only=True).logits
            assert logits is not None
            if self.static is not None:
                self.static.begin(network, padding_B)
                self._step = self.static
            elif CPUStep.supports(network, self.length):
                self._step = self._cpu_step(padding_B)
        if self._step is None:
            self._step = self._module_step(attention_mask)
        return logits[:, -1]

    def step(self, token_B: Tensor) -> Tensor:
        """Scores (B, V) of the tokens after the newest ones (B,)."""
        assert self._step is not None
        return self._step(token_B)

    def run_along(self) -> None:
        """A pass over a single token, for other processes that communicate in theirs."""
        with self.network.lm_head.keep(self._head):
            self.network(torch.zeros(1, 1, dtype=torch.int64, device=self.network.lm_head.weight.device), last_only=True)

    def _cpu_step(self, padding_B: Tensor | None) -> Step:
        step, cache = CPUStep(self.network, self.length), self.cache
        mask_B11S = None
        if padding_B is not None:
            hidden_BS = torch.arange(cache.max_length) < padding_B[:, None]
            mask_B11S = torch.zeros(hidden_BS.shape, dtype=cache.keys.dtype).masked_fill_(hidden_BS, -math.inf)[:, None, None]

        def run(token_B: Tensor) -> Tensor:
            position = cache.length if padding_B is None else cache.length - padding_B
            logits_BV = step(token_B, step.rotation(position), lockstep(step, cache, mask_B11S))
            cache.advance(1)
            return logits_BV

        return run

    def _module_step(self, attention_mask: Tensor | None) -> Step:
        network, cache, head = self.network, self.cache, self._head
        mask_BS = None
        if attention_mask is not None:
            mask_BS = attention_mask.new_ones(len(attention_mask), cache.max_length)
            mask_BS[:, : attention_mask.shape[1]] = attention_mask

        def run(token_B: Tensor) -> Tensor:
            mask = None if mask_BS is None else mask_BS[:, : cache.length + 1]
            with network.lm_head.keep(head):
                logits = network(token_B[:, None], mask, cache=cache, last_only=True).logits
            assert logits is not None
            return logits[:, -1]

        return run


def _check_cache(network: LingNetwork, cache: KVCache, batch_size: int, length: int) -> None:
    config, (layers, _, heads, _, width) = network.config, cache.keys.shape
    has = (layers, heads, width, cache.keys.dtype)
    needs = (config.num_hidden_layers, config.num_key_value_heads, config.head_width, cache_dtype(network))
    if has != needs:
        raise ValueError(
            f"generate: the cache has {has} layers, key heads, their width and type, but the network needs {needs}: make it"
            " with KVCache(network.config, batch_size, max_length, dtype, device)."
        )
    if cache.batch_size != batch_size or cache.max_length < length:
        raise ValueError(
            f"generate needs a cache for {batch_size} sequences of {length} tokens (prompt and max_new_tokens), but the given one"
            f" is for {cache.batch_size} of {cache.max_length}: make the cache longer, or the prompt or max_new_tokens shorter."
        )
