"""Causal and encoder-decoder models of transformers as decoders, on the library's own caches.

Shape suffixes: B sequences, T tokens of the prompts, S tokens with those to come, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from zoo.nn.evaluation_mode import evaluation_mode

__all__ = ["HFDecoder", "HFModel"]

CacheKind = Literal["auto", "static", "dynamic"]
_BY_MASK = ("bloom", "mpt", "opt", "falcon")  # these count positions from the mask
_OWN_POSITIONS = {"wpe", "embed_positions", "position_embeddings"}  # tables of learned positions, by name


class HFModel:
    """A model of transformers that `zoo.lm.generation.generate` can continue prompts with.

    Args:
        model: With a head for tokens, such as ``AutoModelForCausalLM`` and ``AutoModelForSeq2SeqLM`` give it; also one that peft
            or a strategy has wrapped.
        cache: Class of the library's cache; ``auto``: static on a GPU for models that have it, else dynamic.

    Raises:
        ValueError: If the model cannot generate, or has no static cache and shall use it.
    """

    def __init__(self, model: nn.Module, cache: CacheKind = "auto") -> None:
        self.model = model
        self.base = base_model(model)
        name = type(self.base).__name__
        if not getattr(self.base, "can_generate", lambda: False)():
            raise ValueError(
                f"{name} cannot generate: it is an encoder or has no head for tokens; load the weights of a causal or"
                " encoder-decoder model with AutoModelForCausalLM or AutoModelForSeq2SeqLM."
            )
        arguments = inspect.signature(self.base.forward).parameters
        self.arguments = frozenset(arguments)
        self.whole_config: PretrainedConfig = self.base.config
        self.encodes_prompts = bool(self.whole_config.is_encoder_decoder)
        self.cache_argument = "cache" if "cache" in arguments else "past_key_values"
        if self.cache_argument not in arguments:
            raise ValueError(f"{name} has no cache of keys and values that generation could use: take a transformer model.")
        has_static = bool(self.base._can_compile_fullgraph)
        if cache == "static" and not has_static:
            raise ValueError(f"{name} does not support a static cache: use cache='dynamic'.")
        device = next(self.base.parameters()).device
        self.static = cache == "static" or (cache == "auto" and has_static and device.type == "cuda")

    @property
    def config(self) -> Any:
        """The vocabulary: configuration of the part that writes tokens."""
        return self.whole_config.get_text_config(decoder=True)

    @contextmanager
    def decoder(self, batch_size: int, length: int, cache: Any = None, compile: bool = False) -> Iterator["HFDecoder"]:
        """The passes over one batch, in evaluation mode.

        Args:
            batch_size: Sequences B.
            length: Most tokens of a sequence that are read.
            cache: Must be None: each batch has its own.
            compile: Must be false.

        Raises:
            ValueError: If a cache or a compiled step is asked for, or the model's positions end before the sequences do.
        """
        if cache is not None or compile:
            raise ValueError("generate: models of transformers have their own cache and no compiled step: leave both out.")
        limit = getattr(self.config, "max_position_embeddings", None)
        if not self.encodes_prompts and self.counts_positions and limit is not None and length > limit:
            raise ValueError(
                f"Prompt and max_new_tokens need {length} positions, but the model has {limit}: make one of them shorter."
            )
        with evaluation_mode(self.model):
            yield HFDecoder(self, length)

    @property
    def counts_positions(self) -> bool:
        """Whether positions are learned, so that there are only so many."""
        return any(name.rpartition(".")[2] in _OWN_POSITIONS for name, _ in self.base.named_modules())

    def new_cache(self, length: int) -> Cache:
        """An empty cache for so many tokens."""
        config = self.config
        own = StaticCache(config=config, max_cache_len=length) if self.static else DynamicCache(config=config)
        return EncoderDecoderCache(own, DynamicCache(config=config)) if self.encodes_prompts else own


def base_model(model: nn.Module) -> Any:
    """The library's model inside wrappers of peft, DDP and others."""
    found: Any = model
    while True:
        if hasattr(found, "get_base_model"):
            found = found.get_base_model()
        elif isinstance(getattr(found, "module", None), nn.Module) and not hasattr(found, "can_generate"):
            found = found.module
        else:
            return found


class HFDecoder:
    """A `zoo.lm.decoder.Decoder` for one batch.

    Args:
        model: In evaluation mode, with weights that stay.
        length: Most tokens of a sequence that are read.
    """

    def __init__(self, model: HFModel, length: int) -> None:
        self.model, self.length = model, length
        self._cache: Cache | None = None
        self._mask_BS: Tensor | None = None
        self._position_B1: Tensor | None = None
        self._encoded: Any = None
        self._read = 0

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Scores (B, V) of the tokens after prompts (B, T); the mask is 0 at padding, and absent if there is none."""
        model = self.model
        B, T = input_ids.shape
        if model.encodes_prompts:
            encoder = model.base.get_encoder()
            self._mask_BS = attention_mask
            self._encoded = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
            self._cache = model.new_cache(self.length - T + 1)
            return self.step(input_ids.new_full((B,), self._start()))
        self._cache = model.new_cache(self.length)
        if attention_mask is None:
            return self._pass(input_ids, torch.arange(T, device=input_ids.device)[None], None)
        if "position_ids" not in model.arguments and model.whole_config.model_type not in _BY_MASK:
            raise ValueError(
                f"{type(model.base).__name__} numbers positions from the left edge and takes no position_ids, so that padding on"
                " the left would shift them: continue prompts of one length together."
            )
        self._mask_BS = attention_mask.new_ones(B, self.length)
        self._mask_BS[:, :T] = attention_mask
        position_BT = attention_mask.long().cumsum(1) - 1
        self._position_B1 = position_BT[:, -1:] + 1
        return self._pass(input_ids, position_BT.clamp(min=0), self._mask_BS[:, :T])

    def step(self, token_B: Tensor) -> Tensor:
        """Scores (B, V) of the tokens after the newest ones (B,)."""
        token_B1 = token_B[:, None]
        if self.model.encodes_prompts:
            return self._scores(decoder_input_ids=token_B1, encoder_outputs=self._encoded, attention_mask=self._mask_BS)
        if self._mask_BS is None or self._position_B1 is None:
            return self._pass(token_B1, torch.full((1, 1), self._read, device=token_B.device), None)
        scores_BV = self._pass(token_B1, self._position_B1, self._mask_BS[:, : self._read + 1])
        self._position_B1 = self._position_B1 + 1
        return scores_BV

    def run_along(self) -> None:
        """A pass over a single token, for other processes that communicate in theirs."""
        token_11 = torch.zeros(1, 1, dtype=torch.int64, device=next(self.model.base.parameters()).device)
        inputs = {"decoder_input_ids": token_11} if self.model.encodes_prompts else {}
        self.model.model(input_ids=token_11, use_cache=False, **inputs)

    def _pass(self, ids_BT: Tensor, position_BT: Tensor, mask_BS: Tensor | None) -> Tensor:
        known = self.model.arguments
        options: dict[str, Any] = {"position_ids": position_BT} if "position_ids" in known else {}
        if "logits_to_keep" in known:
            options["logits_to_keep"] = 1
        self._read += ids_BT.shape[1]
        return self._scores(input_ids=ids_BT, attention_mask=mask_BS, **options)

    def _scores(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.model.model(
            **inputs, **{self.model.cache_argument: self._cache}, use_cache=True, return_dict=True
        ).logits
        return logits[:, -1]

    def _start(self) -> int:
        """Id that answers of an encoder-decoder model begin with."""
        for config in (self.model.base.generation_config, self.model.whole_config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                token = getattr(config, name, None)
                if token is not None:
                    return int(token)
        raise ValueError("The configuration names no decoder_start_token_id, with which answers begin: set it there.")
