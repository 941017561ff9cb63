"""Bidirectional transformer: the network for text.

Source: Graves et al., arXiv 2308.07037, section 7 (text8). The names inside are those of the published weights.

Shape suffixes: B samples, L positions, K numbers per position, W width, N heads, D width of a head.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from zoo.bfn.networks.adapters import TextInputAdapter
from zoo.bfn.networks.network import Network, parameter_groups

__all__ = ["BFNTransformer"]


class BFNTransformer(Network):
    """Bidirectional GPT on sequences of class probabilities; the defaults are the published text8 model, 170 M parameters.

    Blocks of attention and a perceptron, each normalized before and added. The output layer sees the last block's output
    and the embedding of the input.

    Args:
        num_inputs: numbers per position that the flow shows: the number of classes, or 1 for two classes.
        num_outputs: numbers per position that the head reads: the number of classes, or 1 for two classes.
        seq_len: the longest sequence.
        width: width of the residual stream.
        depth: number of blocks.
        num_heads: attention heads of a block.
        dropout: probability of dropping an embedding, an attention weight or a block's output.
        bias: whether linear maps and norms have biases.
        skip: whether the output layer sees the embedding of the input too.
        learned_positions: learn the positions' embeddings instead of fixing sines and cosines.

    Raises:
        ValueError: a size that is not positive, or ``width`` that the heads do not divide.
    """

    def __init__(
        self,
        num_inputs: int = 27,
        num_outputs: int = 27,
        seq_len: int = 256,
        width: int = 768,
        depth: int = 24,
        num_heads: int = 12,
        dropout: float = 0.0,
        bias: bool = True,
        skip: bool = True,
        learned_positions: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"num_inputs": num_inputs, "num_outputs": num_outputs, "seq_len": seq_len, "width": width}
        for name, size in (sizes | {"depth": depth, "num_heads": num_heads}).items():
            if size < 1:
                raise ValueError(f"BFNTransformer: {name}={size} must be at least 1.")
        if width % num_heads:
            raise ValueError(f"BFNTransformer: width={width} must be a multiple of num_heads={num_heads}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"BFNTransformer: dropout={dropout} must lie in [0, 1).")
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        self.seq_len = seq_len
        self.skip = skip
        self.input_adapter = TextInputAdapter(num_inputs, seq_len, width, learned_positions)
        self.transformer = nn.ModuleDict(
            {
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(_Block(width, num_heads, dropout, bias) for _ in range(depth)),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear((1 + skip) * width, num_outputs, bias=bias)
        self._initialize(0.02, 0.02 / math.sqrt(2 * depth))

    def _initialize(self, std: float, residual_std: float) -> None:
        """Normal weights, smaller where a block adds to the residual stream, so that depth does not widen it; no biases."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual_std if name.endswith("c_proj") else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, mu: Tensor, t: Tensor) -> Tensor:
        """See `Network`: (B, L, num_inputs), or (B, L) where that is 1, and (B,) -> (B, L, num_outputs).

        Raises:
            ValueError: the sequences are too long, or show another number of classes.
        """
        x_BLK = mu[..., None] if self.num_inputs == 1 and mu.dim() == 2 else mu
        if x_BLK.dim() != 3 or x_BLK.shape[2] != self.num_inputs:
            expected = "(B, L)" if self.num_inputs == 1 else f"(B, L, {self.num_inputs})"
            raise ValueError(
                f"BFNTransformer was built for inputs {expected}, but was given {tuple(mu.shape)}:"
                " set num_inputs to the number of classes (1 for two classes)."
            )
        if x_BLK.shape[1] > self.seq_len:
            raise ValueError(
                f"BFNTransformer was built for sequences of at most {self.seq_len} positions, but was given"
                f" {x_BLK.shape[1]}: set seq_len to the data's length."
            )
        embedding_BLW = self.input_adapter(x_BLK, t)
        h_BLW = self.transformer["drop"](embedding_BLW)
        for block in cast(nn.ModuleList, self.transformer["h"]):
            h_BLW = block(h_BLW)
        h_BLW = self.transformer["ln_f"](h_BLW)
        if self.skip:
            h_BLW = torch.cat((h_BLW, embedding_BLW.to(h_BLW.dtype)), dim=-1)
        return self.lm_head(h_BLW)

    def parameter_groups(self, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Weights of linear maps are decayed; biases, norms and embeddings are not. See `Network.parameter_groups`."""
        weights = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        decayed = [parameter for name, parameter in self.named_parameters() if name in weights]
        spared = [parameter for name, parameter in self.named_parameters() if name not in weights]
        return parameter_groups(decayed, spared, weight_decay)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = _Attention(width, num_heads, dropout, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = _Perceptron(width, dropout, bias)

    def forward(self, x_BLW: Tensor) -> Tensor:
        x_BLW = x_BLW + self.attn(self.ln_1(x_BLW))
        return x_BLW + self.mlp(self.ln_2(x_BLW))


class _Attention(nn.Module):
    """Every position attends to all others; queries, keys and values come from one map, in this order."""

    def __init__(self, width: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x_BLW: Tensor) -> Tensor:
        qkv = self.c_attn(x_BLW).unflatten(-1, (3, self.num_heads, -1))
        q_BNLD, k_BNLD, v_BNLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        y_BNLD = scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, dropout_p=dropout)
        return nn.functional.dropout(self.c_proj(y_BNLD.transpose(1, 2).flatten(2)), self.dropout, self.training)


class _Perceptron(nn.Module):
    """Two layers, four times as wide in between."""

    def __init__(self, width: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLW: Tensor) -> Tensor:
        return self.dropout(self.c_proj(gelu(self.c_fc(x_BLW), approximate="tanh")))
