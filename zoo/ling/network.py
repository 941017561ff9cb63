"""The language model: embedding, blocks of grouped-query attention and experts, NormHead.

Names of parameters are those of the released weights, but for routed experts, which are stacked (`state_dict_adapter`).

Shape suffixes: B sequences, T tokens of a sequence, S tokens with those cached, N = B T, D width, H query heads, K key/value
heads, W width of a head, E experts, k experts of a token, V vocabulary.
Source: "Every FLOP Counts", arXiv 2503.05139, and the modelling file released with the weights.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.ling.config import LingConfig
from zoo.ling.experts import Backend, Experts
from zoo.ling.head import Head
from zoo.ling.norm import RMSNorm
from zoo.ling.rope import RotaryEmbedding, rotate
from zoo.ling.router import Router, Routing
from zoo.lm.cross_entropy import IGNORED, cross_entropy

__all__ = [
    "Attention",
    "Block",
    "Cache",
    "LingNetwork",
    "LingOutput",
    "MoE",
    "Model",
    "RouterNoise",
    "SwiGLU",
    "attention_mask_of",
    "expected_initial_loss",
    "positions_and_mask",
]

RouterNoise = Callable[[int], Tensor]
"""Standard normal numbers (N, E) of a layer for the router's warm-up."""


class Cache(Protocol):
    """Memory of earlier keys and values."""

    length: int

    def update(self, layer: int, key_BKTW: Tensor, value_BKTW: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of new tokens, return all (B, K, S, W)."""

    def advance(self, num_tokens: int) -> None:
        """Count tokens that every layer has stored."""


@dataclass
class LingOutput:
    """Losses, logits and routings of a batch.

    Attributes:
        loss: mean cross-entropy in nats; None without labels.
        logits: (B, T, V) float32; None with labels, unless asked for.
        loss_BT: cross-entropy of the label at each position, without gradient, 0 where it does not count.
        routings: one for each layer with experts.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_BT: Tensor | None = None
    routings: list[Routing] = field(default_factory=list)


class SwiGLU(nn.Module):
    """``down(silu(gate x) * (up x))``, without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """k of E routed experts, weighted, and one shared network that every token visits."""

    def __init__(self, config: LingConfig, experts: Backend, accurate_router: bool) -> None:
        super().__init__()
        self.gate = Router(
            config.num_experts, config.hidden_size, config.num_experts_per_tok, config.norm_topk_prob, accurate_router
        )
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size, experts)
        self.shared_experts: SwiGLU | None = None
        if config.num_shared_experts:
            self.shared_experts = SwiGLU(config.hidden_size, config.num_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BTD: Tensor, noise_NE: Tensor | None = None, share: float | Tensor = 1.0) -> tuple[Tensor, Routing]:
        """The sum of routed and shared experts, and how tokens were routed.

        Args:
            x_BTD: tokens.
            noise_NE: see `Router.forward`.
            share: see `Router.forward`.
        """
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.gate(x_ND, noise_NE, share)
        y_BTD = self.experts(x_ND, routing.ids_Nk, routing.weights_Nk).view(x_BTD.shape)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        return y_BTD, routing


class Attention(nn.Module):
    """Grouped-query attention; one projection gives all queries, then all keys, then all values."""

    def __init__(self, config: LingConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.width = config.head_width
        self.dropout = config.attention_dropout
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.width
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.num_heads * self.width, config.hidden_size, bias=config.use_bias)

    def forward(self, x_BTD: Tensor, cos_BTW: Tensor, sin_BTW: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, T, D) to (B, T, D).

        Args:
            x_BTD: tokens.
            cos_BTW: cosines of their positions.
            sin_BTW: sines of their positions.
            mask: bool (B or 1, 1, T, S), true where a query sees a key; None: causal.
            cache: memory of earlier keys and values.
        """
        B, T, _ = x_BTD.shape
        num_heads = self.num_heads + 2 * self.num_kv_heads
        x_BHTW = self.query_key_value(x_BTD).view(B, T, num_heads, self.width).transpose(1, 2)
        q_BHTW, k_BKTW, v_BKTW = x_BHTW.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q_BHTW = rotate(q_BHTW, cos_BTW.to(q_BHTW.dtype), sin_BTW.to(q_BHTW.dtype))
        k_BKTW = rotate(k_BKTW, cos_BTW.to(k_BKTW.dtype), sin_BTW.to(k_BKTW.dtype))
        if cache is not None:
            k_BKTW, v_BKTW = cache.update(self.layer, k_BKTW, v_BKTW)
        y_BHTW = F.scaled_dot_product_attention(
            q_BHTW,
            k_BKTW,
            v_BKTW,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.dense(y_BHTW.transpose(1, 2).reshape(B, T, self.num_heads * self.width))


class Block(nn.Module):
    """``x + Attention(RMSNorm(x))``, then ``x + FFN(RMSNorm(x))``."""

    def __init__(self, config: LingConfig, layer: int, experts: Backend, accurate_router: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: SwiGLU | MoE
        if layer < config.first_k_dense_replace:
            assert config.intermediate_size is not None
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config, experts, accurate_router)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTW: Tensor,
        sin_BTW: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        noise_NE: Tensor | None = None,
        share: float | Tensor = 1.0,
    ) -> tuple[Tensor, Routing | None]:
        """(B, T, D) to (B, T, D), and the routing of a layer with experts; arguments as for `Attention` and `MoE`."""
        x_BTD = x_BTD + self.attention(self.input_layernorm(x_BTD), cos_BTW, sin_BTW, mask, cache)
        h_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(h_BTD, noise_NE, share)
            return x_BTD + y_BTD, routing
        return x_BTD + self.mlp(h_BTD), None


class Model(nn.Module):
    """Embedding, blocks and the last norm: ids to the input of the head."""

    def __init__(self, config: LingConfig, experts: Backend, accurate_router: bool) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, layer, experts, accurate_router) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_width, config.rope_theta, config.max_position_embeddings, config.rope_scaling)
        self.num_dense = config.first_k_dense_replace
        self.activation_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        noise: RouterNoise | None = None,
        share: float | Tensor = 1.0,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """(B, T) ids to (B, T, D), and the routing of each layer with experts; arguments as for `LingNetwork`."""
        x_BTD = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length = x_BTD.shape[1] + (cache.length if cache is not None else 0)
        cos_BTW, sin_BTW = self.rotary(position_ids, length, x_BTD.dtype)
        routings = []
        for layer, block in enumerate(self.layers):
            noise_NE = noise(layer) if noise is not None and layer >= self.num_dense else None
            if self.activation_checkpointing and self.training and torch.is_grad_enabled() and cache is None:
                x_BTD, routing = checkpoint(block, x_BTD, cos_BTW, sin_BTW, mask, None, noise_NE, share, use_reentrant=False)
            else:
                x_BTD, routing = block(x_BTD, cos_BTW, sin_BTW, mask, cache, noise_NE, share)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.advance(x_BTD.shape[1])
        return self.norm(x_BTD), routings


def attention_mask_of(num_tokens: int, attention_mask_BS: Tensor | None = None, document_BS: Tensor | None = None) -> Tensor:
    """Mask of the last ``num_tokens`` of S tokens: they see earlier ones of the same document that are no padding.

    A query that sees nothing, such as padding on the left, sees itself, so that no softmax is over nothing.

    Args:
        num_tokens: T queries, the last of the sequence.
        attention_mask_BS: 1 for tokens, 0 for padding.
        document_BS: number of the document of each token.

    Returns:
        bool (B, 1, T, S).
    """
    given = attention_mask_BS if attention_mask_BS is not None else document_BS
    assert given is not None
    S, T = given.shape[1], num_tokens
    key_S = torch.arange(S, device=given.device)
    query_T1 = key_S[S - T :, None]
    seen = (key_S <= query_T1)[None, None]
    if attention_mask_BS is not None:
        seen = seen & attention_mask_BS.bool()[:, None, None, :]
    if document_BS is not None:
        seen = seen & (document_BS[:, None, S - T :, None] == document_BS[:, None, None, :])
    return seen | (key_S == query_T1)


def positions_and_mask(
    given: Tensor,
    past: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Positions of new tokens, and what they see.

    Args:
        given: (B, T, ...) ids or embeddings.
        past: cached tokens.
        attention_mask: (B, past + T), 1 for tokens and 0 for padding.
        position_ids: (B or 1, T), as they shall be; None: counted from the first token that is no padding.
        document_ids: (B or 1, T), tokens of different documents do not see one another.

    Returns:
        Positions (B or 1, T), and the mask (B or 1, 1, T, past + T); None: causal.

    Raises:
        ValueError: something has another shape, or documents are given with cached tokens.
    """
    B, T = given.shape[:2]
    for name, numbers in (("position_ids", position_ids), ("document_ids", document_ids)):
        if numbers is not None and numbers.shape not in ((B, T), (1, T)):
            raise ValueError(f"{name} of shape {tuple(numbers.shape)} does not fit {B} sequences of {T} new tokens.")
    if attention_mask is not None and attention_mask.shape not in ((B, past + T), (1, past + T)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but there are {B} sequences of {past} cached and {T} new"
            " tokens."
        )
    if document_ids is not None and past:
        raise ValueError("document_ids cannot be given with a cache that holds tokens.")
    if position_ids is None:
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 1)[:, past:]
        else:
            position_ids = torch.arange(past, past + T, device=given.device)[None]
    mask = None
    if attention_mask is not None or document_ids is not None:
        mask = attention_mask_of(T, attention_mask, document_ids)
    elif past and T > 1:
        mask = attention_mask_of(T, given.new_ones(1, past + T, dtype=torch.long))
    return position_ids, mask


class LingNetwork(nn.Module):
    """Embedding, blocks and head: ids to the scores of the next token, or to the loss of labels.

    Args:
        config: the architecture.
        experts: computation of routed experts, see `Experts`.
        accurate_router: scores of the router in float32 whatever the weights' type.
    """

    def __init__(self, config: LingConfig, experts: Backend = "auto", accurate_router: bool = True) -> None:
        super().__init__()
        self.config = config
        #: All entries of the ``config.json`` that the weights were released with, to be written again.
        self.hf_config: dict[str, Any] = {}
        #: The folder that they were read from, whose tokenizer is written with them.
        self.hf_folder: Path | None = None
        self.model = Model(config, experts, accurate_router)
        self.lm_head = Head(config.vocab_size, config.hidden_size, config.norm_head)
        if config.tie_word_embeddings:
            tied = self.model.word_embeddings.weight
            assert isinstance(tied, nn.Parameter)
            self.lm_head.weight = tied
        self.initialize()

    @property
    def moe_layers(self) -> list[MoE]:
        """The layers with experts."""
        return [block.mlp for block in self.model.layers if isinstance(block.mlp, MoE)]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters of the routed experts, which expert parallelism shards."""
        return [parameter for moe in self.moe_layers for parameter in moe.experts.parameters()]

    def freeze(self, patterns: Iterable[str]) -> None:
        """Exclude parameters from training.

        Args:
            patterns: Patterns of their names, such as ``model.word_embeddings.*``.

        Raises:
            ValueError: If no parameter has such a name.
        """
        names = dict(self.named_parameters())
        for pattern in patterns:
            matching = fnmatch.filter(names, pattern)
            if not matching:
                raise ValueError(f"Ling: freeze={pattern!r} fits no parameter; they are called such as {next(iter(names))}.")
            for name in matching:
                names[name].requires_grad_(False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights from N(0, ``initializer_range``); gains are 1, biases and the embedding of padding 0.

        Args:
            generator: source of random numbers; None: torch's own.
        """
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
                continue
            if isinstance(module, Router):
                module.running_mean.zero_()
                module.running_std.fill_(1.0)
            parameter: Tensor
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif not parameter.is_meta:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        embedding = self.model.word_embeddings
        if embedding.padding_idx is not None:  # last, because a tied head draws its row again
            embedding.weight[embedding.padding_idx].zero_()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        noise: RouterNoise | None = None,
        share: float | Tensor = 1.0,
        loss_chunk: int = 0,
        with_logits: bool | None = None,
        last_only: bool = False,
    ) -> LingOutput:
        """Logits of the next token, or the loss of the labels.

        Args:
            input_ids: (B, T), integers.
            attention_mask: (B, S), 1 for tokens and 0 for padding, with those cached; None: no padding. Padding on the right
                needs none, because attention is causal.
            position_ids: (B, T); None: 0, 1, ... after what is cached, counted from the first token that is no padding.
            cache: earlier keys and values, which this call extends.
            labels: (B, T) integers, shifted here: the label at t is what token t - 1 predicts; -100 does not count.
            document_ids: (B, T), tokens of different documents do not see one another; without cache only.
            inputs_embeds: (B, T, D) instead of ``input_ids``.
            noise: standard normal numbers of the router's warm-up.
            share: share of the learned scores in the warm-up.
            loss_chunk: tokens whose logits are in memory at a time; 0: all.
            with_logits: whether logits are wanted; None: only without labels.
            last_only: logits of the last token only, (B, 1, V).

        Raises:
            ValueError: neither or both of ``input_ids`` and ``inputs_embeds``, a mask, positions or labels of another shape,
                documents with a cache, or a sequence that is longer than the cache.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("LingForCausalLM needs either input_ids or inputs_embeds.")
        if labels is not None and labels.shape != given.shape[:2]:
            raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit tokens of shape {tuple(given.shape[:2])}.")
        past = cache.length if cache is not None else 0
        position_ids, mask = positions_and_mask(given, past, attention_mask, position_ids, document_ids)
        hidden_BTD, routings = self.model(
            input_ids, position_ids, mask, cache, noise=noise, share=share, inputs_embeds=inputs_embeds
        )
        output = LingOutput(routings=routings)
        if labels is not None:
            # Shifted to the left, with nothing to predict at the end: the inputs of the head stay whole and contiguous.
            shifted = labels.long().roll(-1, dims=1)
            shifted[:, -1:] = IGNORED
            output.loss, each = cross_entropy(
                hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
                self.lm_head.effective_weight(),
                shifted.reshape(-1),
                loss_chunk,
            )
            output.loss_BT = each.view(labels.shape).roll(1, dims=1)  # that of the last place is 0
        if with_logits or (with_logits is None and labels is None):
            output.logits = self.lm_head(hidden_BTD[:, -1:] if last_only else hidden_BTD)
        return output


def expected_initial_loss(config: LingConfig) -> float:
    """Loss of an untrained NormHead: ``ln V + D / (2 V)``, 11.756 for Ling-Lite, whatever the scale of the weights."""
    return math.log(config.vocab_size) + config.hidden_size / (2 * config.vocab_size)
