"""Ling as a model of the transformers library: ``AutoModelForCausalLM`` and its kin, ``generate``, ``Trainer``, and what builds
on them.

Importing this file, or ``zoo.ling.register()``, makes released folders loadable without remote code::

    import zoo.ling
    zoo.ling.register()
    model = AutoModelForCausalLM.from_pretrained("inclusionAI/Ling-lite")

Files are read and written in the released format, the network in between is ours. Attention is always that of torch
(``attn_implementation`` other than "sdpa" and "eager" is refused by the library, and both mean the same here).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
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
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import logging

from zoo.ling.config import LingConfig
from zoo.ling.experts import Backend, Experts
from zoo.ling.head import EPS
from zoo.ling.network import Model, positions_and_mask
from zoo.ling.official_config import ARCHITECTURE, MODEL_TYPE, check_released, from_hf_config, to_hf_config
from zoo.ling.router import Router, balance_loss

__all__ = [
    "BailingMoeConfig",
    "BailingMoeForCausalLM",
    "BailingMoeForSequenceClassification",
    "BailingMoeModel",
    "register",
    "slice_logits",
]

logger = logging.get_logger(__name__)

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
    rope_theta: float
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
        defaults = to_hf_config(LingConfig()) | {"head_dim": None}  # follows from the other sizes
        for alias, name in zip(aliases, ("num_experts", "num_shared_experts"), strict=True):
            if kwargs.get(alias) is not None:
                defaults.pop(name)
        if kwargs.get("rope_parameters"):  # decides alone, unless the released entries are given too
            defaults |= {"rope_theta": None}
        config = from_hf_config({**defaults, **kwargs}, "BailingMoeConfig")
        entries = to_hf_config(config, kwargs)
        for name in ("architectures", "model_type", *aliases):
            entries.pop(name, None)
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        self.router_aux_loss_coef = router_aux_loss_coef
        rope = {name: entries.pop(name) for name in ("rope_theta", "rope_scaling")}  # kept from what the library makes of them
        own = set(to_hf_config(config)) - {"architectures", "model_type", "tie_word_embeddings", *rope, *_TOKENS}
        for name in own:
            setattr(self, name, entries.pop(name))
        super().__init__(**{"architectures": kwargs.get("architectures"), **entries})
        for name in ("tie_word_embeddings", *_TOKENS):
            setattr(self, name, entries[name])
        for name, value in rope.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build it from the entries of a file, none of which that matters may be missing (hook of the library)."""
        check_released(config_dict, str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "config.json"))
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """All entries that shape the network, and what else differs from the library's defaults (hook of the library)."""
        return {**super().to_diff_dict(), **to_hf_config(self.ling), "architectures": self.architectures or [ARCHITECTURE]}

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """``rope_theta`` and ``rope_scaling`` in one, as newer versions of the library name them; may be set."""
        scaling = dict(self.rope_scaling or {"type": "default"})
        kind = scaling.pop("type", None)
        return {"rope_theta": self.rope_theta, "rope_type": kind, **scaling}

    @rope_parameters.setter
    def rope_parameters(self, value: dict[str, Any] | None) -> None:
        entries = dict(value or {})
        self.rope_theta = entries.pop("rope_theta", self.rope_theta)
        self.rope_scaling = None if all(entry == "default" for entry in entries.values()) else entries

    @property
    def ling(self) -> LingConfig:
        """The architecture."""
        return from_hf_config({"model_type": MODEL_TYPE, **vars(self), "architectures": None}, type(self).__name__)


class BailingMoePreTrainedModel(PreTrainedModel):
    """Base of both models: initial weights, and the library's switches."""

    config_class = BailingMoeConfig
    config: BailingMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (the library's own types, here and below)
    _supports_sdpa = True
    _input_embed_layer = "word_embeddings"
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"(^|\.)v_head\."]  # noqa: RUF012

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Computation of the experts (hook of the library), by its names or ours, `zoo.ling.Experts`; None is ``auto``.

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
        if isinstance(module, Router | Experts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, Router):
            init.zeros_(module.running_mean)
            init.ones_(module.running_std)


class BailingMoeModel(BailingMoePreTrainedModel):
    """Ids to the inputs of the head: `zoo.ling.network.Model`, with the same parameters, behind the library's interface.

    Args:
        config: its configuration.
    """

    word_embeddings: nn.Embedding
    layers: nn.ModuleList
    num_dense: int

    def __init__(self, config: BailingMoeConfig) -> None:
        super().__init__(config)
        chosen = getattr(config, "_experts_implementation", None)
        backend = cast(Backend, chosen if chosen in get_args(Backend) else "auto")
        network = Model(config.ling, backend, accurate_router=True)
        for name, child in network.named_children():
            self.add_module(name, child)
        self.num_dense = network.num_dense
        self.gradient_checkpointing = False  # the library sets it
        self._norm_of_head: Callable[[], Tensor | None] | None = None
        for router in self.modules():  # statistics of the warm-up, which the released format does not have
            if isinstance(router, Router):
                router.register_buffer("running_mean", router.running_mean, persistent=False)
                router.register_buffer("running_std", router.running_std, persistent=False)
        self.post_init()

    @property
    def activation_checkpointing(self) -> bool:
        """Whether activations of blocks are computed again in the backward pass; always without re-entrance."""
        return self.gradient_checkpointing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """Inputs of the head, which is a linear layer of its weight as stored.

        Without a mask and a cache, positions that start at 0 again separate documents of a packed sequence.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), 1 for tokens and 0 for padding, with those cached; or one as the library makes for caches of
                a fixed size, (B or 1, 1, T, S).
            position_ids: (B, T); None: counted from the first token that is no padding.
            cache: earlier keys and values, which this call reads and extends; None with ``use_cache``: a new one.
            inputs_embeds: (B, T, D) instead of ``input_ids``.
            use_cache: whether a cache is made where none is given; None: as configured, but not in training.
            output_router_logits: whether the routers' logits are returned.
            output_hidden_states: whether inputs of the blocks and of the head are returned.
            past_key_values: the same as ``cache`` under its older name.
            return_dict: False: a tuple.
            kwargs: of other models; ``output_attentions`` is refused.

        Raises:
            ValueError: neither or both of ``input_ids`` and ``inputs_embeds``, attention weights are asked for, or a cache is
                given while activations are computed again.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("BailingMoeModel needs either input_ids or inputs_embeds.")
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("BailingMoeModel computes no attention weights: leave out output_attentions.")
        cache = cache if cache is not None else past_key_values
        recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputed and cache is not None:
            raise ValueError("Activations that are computed again would be cached twice: leave out the cache, or checkpointing.")
        if recomputed and use_cache:
            logger.warning_once("use_cache=True has no effect while activations are computed again in the backward pass.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache and not recomputed:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        made = attention_mask is not None and attention_mask.dim() == 4
        if made and attention_mask is not None and not attention_mask.is_floating_point():
            attention_mask = attention_mask.bool()
        document_ids = None
        if attention_mask is None and position_ids is not None and not past and _starts_again(position_ids):
            document_ids = (position_ids == 0).cumsum(1)
        position_ids, mask = positions_and_mask(given, past, None if made else attention_mask, position_ids, document_ids)
        view = None if cache is None else _CacheView(cache, past, whole=made)
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
            for block in (self.layers if want_states else ())
        ]
        try:
            hidden_BTD, routings = Model.forward(
                cast(Model, self), input_ids, position_ids, attention_mask if made else mask, view, inputs_embeds=inputs_embeds
            )
        finally:
            for hook in hooks:
                hook.remove()
        norm_D = None if self._norm_of_head is None else self._norm_of_head()
        if norm_D is not None:
            hidden_BTD = (hidden_BTD / norm_D.to(hidden_BTD.device)).to(hidden_BTD.dtype)
        want_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        extras: dict[str, Any] = {_CACHE: cache}
        if want_states:
            extras["hidden_states"] = (*states, hidden_BTD)
        if want_router:
            extras["router_logits"] = tuple(routing.logits_NE for routing in routings)
        output = MoeModelOutputWithPast(last_hidden_state=hidden_BTD, **extras)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict is not False else output.to_tuple()


class BailingMoeForCausalLM(BailingMoePreTrainedModel, GenerationMixin):
    """The language model, `zoo.ling.LingForCausalLM` behind the library's interface.

    The head is a plain linear layer of the weight as stored. What NormHead divides its columns by, which takes no gradient,
    divides the columns' inputs instead, at the end of ``model``: logits and gradients are the same, and code that multiplies
    ``model``'s output with the head's weight by itself, as fused losses do, is right as well.

    Args:
        config: its configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: BailingMoeConfig) -> None:
        super().__init__(config)
        self.model = BailingMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model._norm_of_head = self._norm_of_head  # a bound method: a copy of this model gets its own
        self._kept: list[Tensor] | None = None  # norms of the head, while `generate` runs
        self.post_init()

    def _norm_of_head(self) -> Tensor | None:
        """Norms (D,) of the columns of the head's weight, float32 or wider; None without NormHead."""
        if not self.config.norm_head:
            return None
        head = self.get_output_embeddings()
        if hasattr(head, "base_layer"):
            raise ValueError(
                "An adapter on lm_head would change what NormHead divides by: leave lm_head out of target_modules; to train it"
                " whole, name it in modules_to_save."
            )
        if self._kept:
            return self._kept[0]
        with _present(head):
            weight = cast(Tensor, head.weight).detach()
            norm_D = torch.linalg.vector_norm(weight, dim=0, dtype=torch.promote_types(weight.dtype, torch.float32)) + EPS
        norm_D = norm_D.full_tensor() if hasattr(norm_D, "full_tensor") else norm_D
        if self._kept is not None:
            self._kept.append(norm_D)
        return norm_D

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts, as the library does; weights do not change meanwhile, so that the head's norms are computed once."""
        self._kept = []
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._kept = None

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
        """Logits of the next token, float32, and the loss of the labels.

        Args:
            input_ids: (B, T) int64.
            attention_mask: see `BailingMoeModel.forward`, as all that is not said here.
            position_ids: (B, T).
            cache: earlier keys and values.
            inputs_embeds: (B, T, D) instead of ``input_ids``.
            labels: (B, T) int64, shifted here; -100 does not count.
            use_cache: whether a cache is made where none is given.
            output_router_logits: whether the routers' logits are returned, with the balance loss summed over the layers.
            output_hidden_states: whether inputs of the blocks and of the head are returned.
            logits_to_keep: number of last positions that get logits, 0: all; or positions, see `slice_logits`.
            past_key_values: the same as ``cache`` under its older name.
            return_dict: False: a tuple.
            kwargs: ``num_items_in_batch`` and ``shift_labels`` go to the loss.
        """
        want_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        inner: MoeModelOutputWithPast = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=want_router,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            output_attentions=kwargs.pop("output_attentions", None),
            return_dict=True,
        )
        logits = self.lm_head(slice_logits(cast(Tensor, inner.last_hidden_state), logits_to_keep))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if want_router and inner.router_logits:
            shape = cast(Tensor, inner.last_hidden_state).shape[:2]
            aux_loss = self._balance_loss(inner.router_logits, attention_mask, shape)
            if loss is not None and self.config.router_aux_loss_coef:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=inner.hidden_states,
            router_logits=inner.router_logits,
            **{_CACHE: getattr(inner, _CACHE)},
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict is not False else output.to_tuple()

    def _balance_loss(self, logits: Sequence[Tensor], attention_mask: Tensor | None, shape_BT: torch.Size) -> Tensor:
        valid_N = None
        if attention_mask is not None and attention_mask.dim() == 2:
            valid_N = attention_mask[:, attention_mask.shape[1] - shape_BT[1] :].expand(shape_BT).reshape(-1).bool()
        probs = [layer_NE.softmax(-1) for layer_NE in logits]
        k = self.config.num_experts_per_tok
        return torch.stack([balance_loss(probs_NE, probs_NE.topk(k).indices, valid_N) for probs_NE in probs]).sum()


def _starts_again(position_ids: Tensor) -> bool:
    """Whether there may be several documents, for which attention needs a mask; in a compiled graph that cannot be asked."""
    return torch.compiler.is_compiling() or bool((position_ids.diff(dim=1) != 1).any())


def _present(module: nn.Module) -> AbstractContextManager[None]:
    """Bring the weights of a module that keeps them elsewhere between forward passes (the library's ``device_map``)."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device  # whose hook it is

    return align_module_device(module)


class BailingMoeForSequenceClassification(GenericForSequenceClassification, BailingMoePreTrainedModel):
    """A linear layer on the last token's output of `BailingMoeModel`, as reward models have it: the library's own.

    Args:
        config: its configuration; ``num_labels`` is the width of the layer, whose weights are new where a folder has none.
    """


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
        keep: number of the last, 0: all; or positions (T',), or positions of each sequence (B, T'), or bool (B, T), which
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
    AutoModel.register(BailingMoeConfig, BailingMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(BailingMoeConfig, BailingMoeForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(BailingMoeConfig, BailingMoeForSequenceClassification, exist_ok=True)
    AutoTokenizer.register(BailingMoeConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    converters: list[Any] = [
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
