"""One more token of each sequence, made fast: a step for CPUs without modules, and one of fixed shapes for graphs.

A step of one token is short: on a CPU most of it is the overhead of operations, and products of a few rows with each expert,
which here read an expert's weight where it lies. On a GPU the launches of kernels dominate, which a compiled graph avoids.

Shape suffixes: B sequences, D width, H query heads, K key/value heads, W width of a head, I width of an expert, k experts of a
token, E experts, M assignments of tokens to experts, V vocabulary, S slots of the cache.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ling.cache import KVCache, StaticCache
from zoo.ling.experts import FEW_COMPILED, Experts, _grouped_mm, choose_backend
from zoo.ling.head import Head
from zoo.ling.network import LingNetwork, SwiGLU
from zoo.ling.norm import RMSNorm
from zoo.ling.rope import RotaryEmbedding
from zoo.ling.router import Router

__all__ = ["Attend", "CPUStep", "FewTokens", "StaticStep", "lockstep", "rotation_table", "static_step"]

Attend = Callable[[int, Tensor], Tensor]
"""Given a layer's number and its heads (B, H + 2 K, W), rotated queries and keys, then values: what the queries see, (B, H W)."""

_LEAVES = (nn.Linear, nn.Embedding, RMSNorm, Router, Experts, Head, RotaryEmbedding)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SLOTS = 128  # lengths of graphs are whole multiples of it, so that a few serve all
_KEPT_STEPS = 4


def rotation_table(rotary: RotaryEmbedding, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and signed sines (length, 2, 1, W) such that ``x cos + swap(x) sin`` rotates, where ``swap`` exchanges halves."""
    cos_TW, sin_TW = (t[0] for t in rotary(torch.arange(length, device=device)[None], length, dtype))
    half = rotary.width // 2
    signed_TW = torch.cat([-sin_TW[:, :half], sin_TW[:, half:]], dim=1)
    return torch.stack([cos_TW, signed_TW], dim=1).unsqueeze(2)


class FewTokens:
    """Routed experts for a few tokens on a CPU, with each weight read where it lies.

    Gathered weights (as `Experts` has them under ``batched``) would be written and read once more, which takes several times as
    long as the products.

    Args:
        experts: whose parameters it views.
    """

    def __init__(self, experts: Experts) -> None:
        self.gate_up_EDJ, self.down_EID = experts.gate_up_proj.transpose(1, 2), experts.down_proj.transpose(1, 2)
        self.gate_up, self.down = self.gate_up_EDJ.unbind(0), self.down_EID.unbind(0)
        E, width, D = self.down_EID.shape
        self.grouped = choose_backend(1 << 20, D, width, experts.down_proj.dtype) == "grouped"
        self.expert_E = torch.arange(E)

    def add_to(self, out_BD: Tensor, x_BD: Tensor, ids_Bk: Tensor, weights_Bk: Tensor) -> None:
        """Add what the experts say of the tokens to ``out``.

        Args:
            out_BD: what is added to.
            x_BD: tokens.
            ids_Bk: their experts.
            weights_Bk: weights of the sum.
        """
        B, k = ids_Bk.shape
        if B == 1:
            ids = ids_Bk[0].tolist()
            gate, up = torch.cat([torch.mm(x_BD, self.gate_up[expert]) for expert in ids]).chunk(2, dim=1)
            inner_kI = F.silu(gate).mul_(up).mul_(weights_Bk.view(k, 1))
            for expert, inner_1I in zip(ids, inner_kI.split(1), strict=True):
                out_BD.addmm_(inner_1I, self.down[expert])
            return
        sorted_M, order_M = ids_Bk.reshape(-1).sort()
        x_MD = x_BD.index_select(0, order_M // k)
        weight_M1 = weights_Bk.reshape(-1, 1).index_select(0, order_M)
        if self.grouped:
            end_E = torch.searchsorted(sorted_M, self.expert_E, right=True, out_int32=True)
            gate, up = _grouped_mm(x_MD, self.gate_up_EDJ, offs=end_E).chunk(2, dim=1)
            y_MD = _grouped_mm(F.silu(gate).mul_(up).mul_(weight_M1), self.down_EID, offs=end_E)
        else:
            visited, count = sorted_M.unique_consecutive(return_counts=True)
            ids, sizes = visited.tolist(), count.tolist()
            parts = [torch.mm(x, self.gate_up[e]) for e, x in zip(ids, x_MD.split(sizes), strict=True)]
            gate, up = torch.cat(parts).chunk(2, dim=1)
            inner_MI = F.silu(gate).mul_(up).mul_(weight_M1)
            y_MD = torch.cat([torch.mm(inner, self.down[e]) for e, inner in zip(ids, inner_MI.split(sizes), strict=True)])
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(B * k)
        out_BD.add_(y_MD.index_select(0, inverse_M).view(B, k, -1).sum(1))


@dataclass(frozen=True, slots=True)
class _MLP:
    gate_DI: Tensor
    up_DI: Tensor
    down_ID: Tensor

    @classmethod
    def of(cls, mlp: SwiGLU) -> "_MLP":
        return cls(mlp.gate_proj.weight.t(), mlp.up_proj.weight.t(), mlp.down_proj.weight.t())


@dataclass(frozen=True, slots=True)
class _Layer:
    """Views of a block's weights, transposed for products from the left."""

    gain_D: Tensor
    qkv_DR: Tensor
    qkv_bias_R: Tensor | None
    dense_RD: Tensor
    dense_bias_D: Tensor | None
    mlp_gain_D: Tensor
    mlp: _MLP | None
    router_DE: Tensor | None
    experts: FewTokens | None


class CPUStep:
    """The network's step in float32 or float64 on a CPU, from views of its weights; equal to it up to rounding.

    It is made for one generation: weights that are replaced later are not seen.

    Args:
        network: for which `supports` holds.
        max_length: most tokens of a sequence.
    """

    def __init__(self, network: LingNetwork, max_length: int) -> None:
        config, model = network.config, network.model
        D, self.half = config.hidden_size, config.head_width // 2
        weight = model.word_embeddings.weight
        self.embedding_VD, self.head_VD = weight, network.lm_head.effective_weight()
        self.num_heads, self.num_kv_heads, self.width = (
            config.num_attention_heads, config.num_key_value_heads, config.head_width)  # fmt: skip
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob and self.top_k > 1
        self.shift = weight.new_tensor(math.sqrt(D * config.rms_norm_eps))
        self.table = rotation_table(model.rotary, max_length, weight.dtype, weight.device)
        self.layers = [_layer(block, math.sqrt(D)) for block in model.layers]
        self.gain_D = model.norm.weight * math.sqrt(D)

    @staticmethod
    def supports(network: LingNetwork, max_length: int) -> bool:
        """Whether the step knows all that the network does.

        That is so for modules as they are here, with plain parameters of one type on a CPU, without hooks and autocast; not
        where layers were wrapped or replaced, as for adapters, experts on several ranks or sharded parameters.

        Args:
            network: whose step.
            max_length: most tokens of a sequence.
        """
        weight = network.model.word_embeddings.weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
            return False
        if _turns_by_length(network, max_length):
            return False
        return all(map(_is_plain, network.modules())) and all(
            type(parameter) is nn.Parameter and parameter.device == weight.device and parameter.dtype == weight.dtype
            for parameter in network.parameters()
        )

    def rotation(self, position: int | Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (1 or B, 1, W) of one position, or of those of each sequence (B,)."""
        if isinstance(position, int):
            cos, sin = self.table[position].unbind(0)
            return cos, sin
        cos, sin = self.table.index_select(0, position).unbind(1)
        return cos, sin

    def __call__(self, ids_B: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Scores (B, V) of the token after ``ids``.

        Args:
            ids_B: int64.
            rotation: see `rotation`.
            attend: stores keys and values, and attends.
        """
        cos, sin = rotation
        B, rotated = len(ids_B), self.num_heads + self.num_kv_heads
        x_BD = self.embedding_VD.index_select(0, ids_B)
        for number, layer in enumerate(self.layers):
            h_BD = self._norm(x_BD, layer.gain_D)
            qkv_BR = torch.mm(h_BD, layer.qkv_DR)
            if layer.qkv_bias_R is not None:
                qkv_BR.add_(layer.qkv_bias_R)
            heads_BHW = qkv_BR.view(B, -1, self.width)
            qk_BHW = heads_BHW.narrow(1, 0, rotated)
            swapped_BHW = qk_BHW.roll(self.half, -1)
            qk_BHW.mul_(cos).addcmul_(swapped_BHW, sin)
            x_BD.addmm_(attend(number, heads_BHW), layer.dense_RD)
            if layer.dense_bias_D is not None:
                x_BD.add_(layer.dense_bias_D)
            h_BD = self._norm(x_BD, layer.mlp_gain_D)
            if layer.router_DE is not None and layer.experts is not None:
                layer.experts.add_to(x_BD, h_BD, *self._route(h_BD, layer.router_DE))
            if layer.mlp is not None:
                inner_BI = F.silu(torch.mm(h_BD, layer.mlp.gate_DI)).mul_(torch.mm(h_BD, layer.mlp.up_DI))
                x_BD.addmm_(inner_BI, layer.mlp.down_ID)
        h_BD = self._norm(x_BD, self.gain_D)
        # With several rows the weight comes first: it is the tall matrix, and products from the right are slow on a CPU.
        return F.linear(h_BD, self.head_VD) if B < 4 else torch.mm(self.head_VD, h_BD.t()).t()

    def _norm(self, x_BD: Tensor, gain_D: Tensor) -> Tensor:
        """`RMSNorm` in a third of its operations: ``x / hypot(|x|, sqrt(D eps)) * (sqrt(D) w)``."""
        return (x_BD / torch.hypot(torch.linalg.vector_norm(x_BD, 2, -1, True), self.shift)).mul_(gain_D)

    def _route(self, h_BD: Tensor, router_DE: Tensor) -> tuple[Tensor, Tensor]:
        """`Router`: the softmax over the k largest scores is that over all, divided by their sum."""
        logits_BE = torch.mm(h_BD, router_DE)
        if self.normalize:
            chosen_Bk, ids_Bk = logits_BE.topk(self.top_k, -1)
            return ids_Bk, chosen_Bk.softmax(-1)
        weights_Bk, ids_Bk = logits_BE.softmax(-1).topk(self.top_k, -1)
        return ids_Bk, weights_Bk


def lockstep(step: CPUStep, cache: KVCache, mask_B11S: Tensor | None) -> Attend:
    """Attention of the next token over a `KVCache`, whose length has to be advanced afterwards.

    Args:
        step: whose heads.
        cache: memory of keys and values.
        mask_B11S: added to the scores, -inf at padding; None: no padding.
    """
    K, W = step.num_kv_heads, step.width
    H, G = step.num_heads, step.num_heads // step.num_kv_heads
    slots, seen = cache.open_slot()
    mask = None if mask_B11S is None else mask_B11S.narrow(3, 0, cache.length + 1)

    def attend(layer: int, heads_BHW: Tensor) -> Tensor:
        B = len(heads_BHW)
        slots[layer].copy_(heads_BHW.narrow(1, H, 2 * K).view(B, 2, K, W).transpose(0, 1))
        # The queries of a group share a key head: they stand as so many positions of one head, and no key is repeated.
        q_BKGW = heads_BHW.narrow(1, 0, H).view(B, K, G, W)
        y_BKGW = F.scaled_dot_product_attention(q_BKGW, seen[2 * layer], seen[2 * layer + 1], attn_mask=mask)
        return y_BKGW.reshape(B, H * W)

    return attend


class StaticStep:
    """The network's step with shapes that never change, compiled, and on a GPU captured as one CUDA graph.

    It attends to all slots of its cache, with a mask by length. The cache belongs to it; `begin` says where it stands.

    Args:
        network: whose step.
        batch_size: sequences B.
        max_length: slots S.
        dtype: of keys and values.
        backend: of ``torch.compile``.

    Raises:
        ValueError: more sequences than the experts can be compiled for in this type.
    """

    def __init__(
        self, network: LingNetwork, batch_size: int, max_length: int, dtype: torch.dtype, backend: str = "inductor"
    ) -> None:
        config, device = network.config, network.lm_head.weight.device
        if dtype != torch.bfloat16 and batch_size * config.num_experts_per_tok > FEW_COMPILED:
            raise ValueError(
                f"compile=True takes at most {FEW_COMPILED // config.num_experts_per_tok} sequences in {dtype}, got {batch_size}:"
                " make the batch smaller, or the network bfloat16."
            )
        self.cache = KVCache(config, batch_size, max_length, dtype, device)
        self.head_VD = network.lm_head.effective_weight().clone()
        self.ids_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.padding_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.slot_S = torch.arange(max_length, device=device)
        view, model, head_VD = StaticCache(self.cache, self.position_1), network.model, self.head_VD
        accurate = torch.promote_types(head_VD.dtype, torch.float32)

        def run(ids_B1: Tensor, position_1: Tensor, padding_B1: Tensor, slot_S: Tensor) -> Tensor:
            mask_B11S = ((slot_S <= position_1) & (slot_S >= padding_B1))[:, None, None]
            hidden_B1D, _ = model(ids_B1, position_1 - padding_B1, mask_B11S, view)
            return F.linear(hidden_B1D[:, -1], head_VD).to(accurate)

        self._run = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)
        self._graph: Any = None
        self._logits_BV: Tensor | None = None

    def begin(self, network: LingNetwork, padding_B: Tensor | None) -> None:
        """Go on from what the cache holds.

        Args:
            network: the same as ever; its weights may have changed since.
            padding_B: tokens of padding on the left of each sequence; None: none.
        """
        self.head_VD.copy_(network.lm_head.effective_weight())
        self.position_1.fill_(self.cache.length)
        if padding_B is None:
            self.padding_B1.zero_()
        else:
            self.padding_B1.copy_(padding_B[:, None])

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Scores (B, V) of the token after ``ids``; overwritten by the next call on a GPU."""
        self.cache.check_room(1)
        self.ids_B1.copy_(ids_B[:, None])
        arguments = (self.ids_B1, self.position_1, self.padding_B1, self.slot_S)
        if self.ids_B1.device.type != "cuda":
            logits_BV = self._run(*arguments)
        else:
            if self._graph is None:
                self._capture(arguments)
            self._graph.replay()
            assert self._logits_BV is not None
            logits_BV = self._logits_BV
        self.cache.advance(1)
        self.position_1.add_(1)
        return logits_BV

    def _capture(self, arguments: tuple[Tensor, ...]) -> None:
        """Record the kernels of a step; running it before on another stream compiles it and fills the allocator."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # each writes the same slot
                self._run(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._run(*arguments)


_STEPS: "weakref.WeakKeyDictionary[LingNetwork, dict[tuple[Any, ...], StaticStep]]" = weakref.WeakKeyDictionary()


@contextmanager
def static_step(network: LingNetwork, batch_size: int, length: int, dtype: torch.dtype) -> Iterator[StaticStep]:
    """A compiled step for at least ``length`` tokens, with an empty cache, for the caller alone while it is inside.

    The last few of each network are kept for later calls.

    Args:
        network: whose step.
        batch_size: sequences.
        length: tokens of prompt and continuation.
        dtype: of keys and values.

    Raises:
        ValueError: rotations would depend on the length, or too many sequences for `StaticStep`.
    """
    if _turns_by_length(network, length):
        raise ValueError(
            f"compile=True cannot follow rope_scaling of type dynamic to {length} tokens, beyond max_position_embeddings="
            f"{network.config.max_position_embeddings}: leave compile out, or make the prompt or max_new_tokens shorter."
        )
    slots = -(-length // _SLOTS) * _SLOTS
    autocast = torch.is_autocast_enabled(network.lm_head.weight.device.type)
    key = (batch_size, slots, dtype, autocast, *(parameter.data_ptr() for parameter in network.parameters()))
    step = _STEPS.setdefault(network, {}).pop(key, None) or StaticStep(network, batch_size, slots, dtype)
    step.cache.reset()
    try:
        yield step
    finally:
        kept = _STEPS.setdefault(network, {})
        kept.pop(key, None)
        kept[key] = step  # the last one used stands last
        while len(kept) > _KEPT_STEPS:
            del kept[next(iter(kept))]


def _turns_by_length(network: LingNetwork, max_length: int) -> bool:
    """Whether rotations change while a sequence grows to ``max_length``: with dynamic scaling, beyond the trained length."""
    scaling = network.config.rope_scaling
    return scaling is not None and scaling.type == "dynamic" and max_length > network.config.max_position_embeddings


def _layer(block: Any, scale: float) -> _Layer:
    attention, mlp = block.attention, block.mlp
    routed = hasattr(mlp, "experts")
    dense = mlp.shared_experts if routed else mlp
    return _Layer(
        gain_D=block.input_layernorm.weight * scale,
        qkv_DR=attention.query_key_value.weight.t(),
        qkv_bias_R=attention.query_key_value.bias,
        dense_RD=attention.dense.weight.t(),
        dense_bias_D=attention.dense.bias,
        mlp_gain_D=block.post_attention_layernorm.weight * scale,
        mlp=None if dense is None else _MLP.of(dense),
        router_DE=mlp.gate.weight.t() if routed else None,
        experts=FewTokens(mlp.experts) if routed else None,
    )


def _is_plain(module: nn.Module) -> bool:
    if any(getattr(module, name) for name in _HOOKS) or "forward" in vars(module):
        return False
    ours = type(module).__module__.startswith("zoo.ling.") or type(module) is nn.ModuleList
    return type(module) in _LEAVES or (ours and next(module.children(), None) is not None)
