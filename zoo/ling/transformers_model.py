"""Ling as a model of the transformers library: ``AutoModelForCausalLM``, ``generate``, ``Trainer``, and what builds on them.

Importing this file, or ``zoo.ling.register()``, makes released folders loadable without remote code::

    import zoo.ling
    zoo.ling.register()
    model = AutoModelForCausalLM.from_pretrained("inclusionAI/Ling-lite")

Files are read and written in the released format, the network in between is ours. Attention is always that of torch
(``attn_implementation`` other than "sdpa" and "eager" is refused by the library, and both mean the same here).
"""

from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from zoo.ling.config import LingConfig
from zoo.ling.experts import Backend, Experts
from zoo.ling.head import Head
from zoo.ling.network import Model, positions_and_mask
from zoo.ling.official_config import ARCHITECTURE, MODEL_TYPE, check_released, from_hf_config, to_hf_config
from zoo.ling.router import Router, balance_loss

__all__ = ["BailingMoeConfig", "BailingMoeForCausalLM", "register"]

#: The library renamed its argument for keys and values; outputs say which name this version has.
_CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id")
#: The library's names for ways to compute experts.
_BACKENDS: dict[str | None, Backend] = {None: "auto", "eager": "loop", "batched_mm": "batched", "grouped_mm": "grouped"}


class BailingMoeConfig(PreTrainedConfig):
    """A released ``config.json``, with its quirks.

    Defaults are Ling-Lite's; a file must say all that shapes the network, see `zoo.ling.official_config`.

    Args:
        router_aux_loss_coef: weight of the balance loss, summed over the layers, in the loss of a model that is called with
            ``output_router_logits``; 0, as released: none.
        kwargs: entries of a released file.

    Raises:
        ValueError: the entries describe another architecture, or do not fit one another.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    rope_scaling: dict[str, Any] | None = None  # a plain entry here, where newer versions of the library have a property
    has_no_defaults_at_init = False

    def __init__(
        self,
        use_cache: bool = True,
        output_router_logits: bool = False,
        router_aux_loss_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        aliases = ("n_routed_experts", "n_shared_experts")
        defaults = to_hf_config(LingConfig())
        for alias, name in zip(aliases, ("num_experts", "num_shared_experts"), strict=True):
            if kwargs.get(alias) is not None:
                defaults.pop(name)
        config = from_hf_config({**defaults, **kwargs}, "BailingMoeConfig")
        entries = to_hf_config(config, kwargs)
        for name in ("architectures", "model_type", *aliases):
            entries.pop(name, None)
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        self.router_aux_loss_coef = router_aux_loss_coef
        own = set(to_hf_config(config)) - {"architectures", "model_type", "tie_word_embeddings", *_TOKENS}
        for name in own:
            setattr(self, name, entries.pop(name))
        super().__init__(**{"architectures": kwargs.get("architectures"), **entries})
        for name in ("tie_word_embeddings", *_TOKENS):
            setattr(self, name, entries[name])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build it from the entries of a file, none of which that matters may be missing (hook of the library)."""
        check_released(config_dict, str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "config.json"))
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """All entries that shape the network, and what else differs from the library's defaults (hook of the library)."""
        return {**super().to_diff_dict(), **to_hf_config(self.ling), "architectures": self.architectures or [ARCHITECTURE]}

    @property
    def ling(self) -> LingConfig:
        """The architecture."""
        return from_hf_config({"model_type": MODEL_TYPE, **vars(self), "architectures": None}, type(self).__name__)


class BailingMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """The network of `zoo.ling.LingForCausalLM`, with the same parameters, behind the library's interface.

    Args:
        config: its configuration.
    """

    config_class = BailingMoeConfig
    config: BailingMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    _input_embed_layer = "word_embeddings"
    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012 (the library's own type)
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq$", r"(^|\.)v_head\.")

    def __init__(self, config: BailingMoeConfig) -> None:
        super().__init__(config)
        ling = config.ling
        chosen = getattr(config, "_experts_implementation", None)
        self.model = Model(ling, chosen if chosen in get_args(Backend) else "auto", accurate_router=True)
        self.lm_head = Head(ling.vocab_size, ling.hidden_size, ling.norm_head)
        for router in self._routers():  # statistics of the warm-up, which the released format does not have
            router.register_buffer("running_mean", router.running_mean, persistent=False)
            router.register_buffer("running_std", router.running_std, persistent=False)
        self.post_init()

    def _routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """How experts are computed (hook of the library): its names or ours, `zoo.ling.Experts`; None is ``auto``.

        Raises:
            ValueError: there is no such way.
        """
        backend = _BACKENDS.get(requested_experts, requested_experts)
        if backend not in get_args(Backend):
            known = [*get_args(Backend), *(name for name in _BACKENDS if name)]
            raise ValueError(f"experts_implementation={requested_experts!r} must be one of {', '.join(known)}.")
        return str(backend)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module's own weights (hook of the library); as `LingForCausalLM.initialize`."""
        super()._init_weights(module)
        if isinstance(module, Router | Experts | Head):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, Router):
            init.zeros_(module.running_mean)
            init.ones_(module.running_std)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.word_embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head; it stays a NormHead if it is one."""
        if not isinstance(new_embeddings, Head):
            weight = cast(nn.Parameter, new_embeddings.weight)
            new_embeddings = Head(*weight.shape, normalize=self.lm_head.normalize)
            new_embeddings.weight = weight
        self.lm_head = new_embeddings

    def _get_resized_lm_head(self, old_lm_head: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the head (hook of the library, which knows linear ones only)."""
        linear = nn.Linear(*old_lm_head.weight.shape[::-1], bias=False, device="meta")
        linear.weight = cast(nn.Parameter, old_lm_head.weight)
        resized = super()._get_resized_lm_head(linear, *args, **kwargs)
        head = Head(*resized.weight.shape, normalize=self.lm_head.normalize)
        head.weight = resized.weight
        return head

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Recompute activations of blocks in the backward pass (hook of the library); always without re-entrance."""
        self.model.activation_checkpointing = enable
        self.model.gradient_checkpointing = enable

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token, and the loss of the labels.

        Without a mask and a cache, positions that begin anew separate documents of a packed sequence.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), 1 for tokens and 0 for padding, with those cached; or one as the library makes for caches of
                a fixed size, (B or 1, 1, T, S).
            position_ids: (B, T); None: counted from the first token that is no padding.
            cache: earlier keys and values, which this call extends; None with ``use_cache``: a new one.
            inputs_embeds: (B, T, D) instead of ``input_ids``.
            labels: (B, T) int64, shifted here; -100 does not count.
            use_cache: whether keys and values are returned; None: as configured, but not in training.
            output_router_logits: whether the routers' logits are returned, with the balance loss summed over the layers.
            output_hidden_states: whether inputs of the blocks and of the head are returned.
            logits_to_keep: how many of the last positions get logits, 0: all; or positions (T',); or as `slice_logits` says.
            past_key_values: the same as ``cache`` under its older name.
            return_dict: False: a tuple.
            kwargs: ``num_items_in_batch`` and ``shift_labels`` go to the loss.

        Raises:
            ValueError: neither or both of ``input_ids`` and ``inputs_embeds``, or attention weights are asked for.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("BailingMoeForCausalLM needs either input_ids or inputs_embeds.")
        if kwargs.pop("output_attentions", None):
            raise ValueError("BailingMoeForCausalLM computes no attention weights: leave out output_attentions.")
        cache = cache if cache is not None else past_key_values
        checkpointing = self.model.activation_checkpointing and self.training and torch.is_grad_enabled()
        if use_cache is None:
            use_cache = (self.config.use_cache or cache is not None) and not self.training
        if not use_cache or checkpointing:
            cache = None
        elif cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        made = attention_mask is not None and attention_mask.dim() == 4
        document_ids = None
        if attention_mask is None and position_ids is not None and not past and (position_ids.diff(dim=1) != 1).any():
            document_ids = (position_ids == 0).cumsum(1)
        position_ids, mask = positions_and_mask(given, past, None if made else attention_mask, position_ids, document_ids)
        view = None if cache is None else _CacheView(cache, past, whole=made)
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
            for block in (self.model.layers if want_states else ())
        ]
        try:
            hidden_BTD, routings = self.model(
                input_ids, position_ids, attention_mask if made else mask, view, inputs_embeds=inputs_embeds
            )
        finally:
            for hook in hooks:
                hook.remove()
        logits = self.lm_head(slice_logits(hidden_BTD, logits_to_keep))
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        want_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        if want_router and routings:
            valid_N = attention_mask[:, past:].reshape(-1).bool() if attention_mask is not None and not made else None
            aux_loss = torch.stack([balance_loss(r.probs_NE, r.ids_Nk, valid_N) for r in routings]).sum()
            if loss is not None and self.config.router_aux_loss_coef:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=(*states, hidden_BTD) if want_states else None,
            router_logits=tuple(r.logits_NE for r in routings) if want_router else None,
            **{_CACHE: cache},
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict is not False else output.to_tuple()


class _CacheView:
    """A cache of the library as `zoo.ling.network.Cache`.

    Args:
        cache: the library's.
        length: tokens that it holds.
        whole: return the whole of caches of a fixed size; else what is filled.
    """

    def __init__(self, cache: Cache, length: int, whole: bool) -> None:
        self.cache = cache
        self.length = length
        self.whole = whole

    def update(self, layer: int, key_BKTW: Tensor, value_BKTW: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of new tokens, return all."""
        end = self.length + key_BKTW.shape[2]
        key, value = self.cache.update(key_BKTW, value_BKTW, layer)
        return (key, value) if self.whole else (key[:, :, :end], value[:, :, :end])

    def advance(self, num_tokens: int) -> None:
        """Count tokens; the library's cache counts by itself."""
        self.length += num_tokens


def slice_logits(hidden_BTD: Tensor, keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted.

    Args:
        hidden_BTD: inputs of the head.
        keep: how many of the last, 0: all; or positions (T',), or positions of each sequence (B, T'), or bool (B, T), which
            gives (positions, D).
    """
    if isinstance(keep, int):
        return hidden_BTD[:, -keep:] if keep else hidden_BTD
    if keep.dim() == 1:
        return hidden_BTD[:, keep]
    return hidden_BTD[keep] if keep.dtype == torch.bool else torch.take_along_dim(hidden_BTD, keep[..., None], dim=1)


def register() -> None:
    """Make the library's ``Auto`` classes know released folders, and how their experts are stacked."""
    AutoConfig.register(MODEL_TYPE, BailingMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(BailingMoeConfig, BailingMoeForCausalLM, exist_ok=True)
    AutoTokenizer.register(BailingMoeConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    converters = [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping(MODEL_TYPE, converters, overwrite=True)


register()
