"""A network cut between two blocks: the low half reads ids, the high half vectors.

Shape suffixes: B texts, T tokens, D width.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["HighBlocks", "LowBlocks", "split_network"]

ROTARY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")


class LowBlocks(nn.Module):
    """Embedding and first blocks: ids to vectors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """(B, T) to (B, T, D)."""
        return self.network(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state


class HighBlocks(nn.Module):
    """Last blocks and what follows them: vectors to vectors.

    Attributes:
        is_causal: Whether a vector sees those before it only.
        is_rotary: Whether blocks know positions; else those of the embedding are all there is.
    """

    def __init__(self, network: nn.Module, is_causal: bool, is_rotary: bool) -> None:
        super().__init__()
        self.network = network
        self.is_causal, self.is_rotary = is_causal, is_rotary

    def forward(self, vectors_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); rotary positions are counted from the first vector.

        Args:
            vectors_BTD: Vectors.
            mask_BT: 1 for vectors, 0 for padding; or bool (B, 1, T, T), true where a query (rows) sees a key.
        """
        return self.network(inputs_embeds=vectors_BTD, attention_mask=mask_BT, use_cache=False).last_hidden_state


class _NoPositions(nn.Module):
    """Nothing to add: positions are in the vectors already."""

    def forward(self, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """0 of the type of the positions."""
        return given.new_zeros((), dtype=torch.int64)


class _Vectors(nn.Module):
    """Vectors in the place of an embedding."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
        """The vectors as they are."""
        return inputs_embeds


def split_network(network: nn.Module, n: int) -> tuple[LowBlocks, HighBlocks]:
    """Cut a base model of transformers after its first blocks; both halves share the network's parameters.

    ``high(low(ids, mask), mask)`` is the whole network for every n, since both run the library's own forward pass.

    Args:
        network: Without a head; BERT-, LLaMA/Qwen-, GPT-2- or OPT-like.
        n: Number of blocks in the low half, 0 to all.

    Raises:
        ValueError: If the family is another one, or there are fewer blocks.
    """
    kind = cast(Any, network).config.model_type
    if kind in ROTARY:
        low, high = _halves(network, "layers", n)
        low.norm = nn.Identity()
        high.embed_tokens = None
    elif kind == "gpt2":
        low, high = _halves(network, "h", n)
        low.ln_f = nn.Identity()
        high.wte, high.wpe, high.drop = None, _NoPositions(), nn.Identity()
    elif kind == "opt":
        low, high = _inside(network, "decoder", "layers", n)
        low.decoder.final_layer_norm = low.decoder.project_out = None
        high.decoder.embed_tokens, high.decoder.embed_positions, high.decoder.project_in = None, _NoPositions(), None
    elif kind in ENCODERS:
        low, high = _inside(network, "encoder", "layer", n)
        low.pooler = high.pooler = None
        high.embeddings = _Vectors()
    else:
        raise ValueError(
            f"split: models of type {kind} are not cut: take one of {', '.join((*ENCODERS, *ROTARY, 'gpt2', 'opt'))}, or add the"
            " family to split_network in zoo/lm/split.py: its list of blocks, and what stands before and behind it."
        )
    return LowBlocks(low), HighBlocks(high, is_causal=kind not in ENCODERS, is_rotary=kind in ROTARY)


def _halves(stack: nn.Module, blocks: str, n: int) -> tuple[Any, Any]:
    """Two copies of a stack that share modules, with the first n blocks and with the others."""
    whole = getattr(stack, blocks)
    if not 0 <= n <= len(whole):
        raise ValueError(f"split: n={n} must lie in 0 ... {len(whole)}, the number of blocks of this model.")
    low, high = _shallow(stack), _shallow(stack)
    for half, part in ((low, slice(0, n)), (high, slice(n, None))):
        setattr(half, blocks, nn.ModuleList(whole[part]))
        if (types := getattr(half.config, "layer_types", None)) is not None:
            half.config = copy.copy(half.config)
            half.config.__dict__["layer_types"] = types[part]
    return low, high


def _inside(network: nn.Module, name: str, blocks: str, n: int) -> tuple[Any, Any]:
    outer = _shallow(network), _shallow(network)
    for whole, half in zip(outer, _halves(getattr(network, name), blocks, n), strict=True):
        setattr(whole, name, half)
    return outer


def _shallow(module: nn.Module) -> Any:
    """Copy of a module whose children may be replaced; they are the same objects."""
    own = copy.copy(module)
    own._modules = dict(module._modules)
    return own
