"""The masked transformer: an encoder that sees the visible tokens only, and a decoder that fills in the others.

Source: You et al., arXiv 2503.07197, section 3 and appendix D; the weights carry the published names, those of MAR.
Shape suffixes: B samples, N tokens, V visible tokens, P picked tokens, S class slots, L = S + tokens, C channels of a token,
D width, H heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.emigm.head import DiffLossHead

__all__ = ["MaskedTransformer"]

_EPS = 1e-6


class _Attention(nn.Module):
    """Full attention; queries of some positions only, if wanted."""

    def __init__(self, width: int, num_heads: int, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x_BLD: Tensor, query_BPD: Tensor | None = None) -> Tensor:
        """Output at all positions, or at those of ``query_BPD``."""
        dropout = self.attn_dropout if self.training else 0.0
        if query_BPD is None:
            q, k, v = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            width = x_BLD.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = nn.functional.linear(query_BPD, weight[:width], bias[:width])
            q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            keys_values = nn.functional.linear(x_BLD, weight[width:], bias[width:])
            k, v = keys_values.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


class _Mlp(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(nn.functional.gelu(self.fc1(x_BLD)))))


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = _Attention(width, num_heads, attn_dropout, proj_dropout)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = _Mlp(width, proj_dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.mlp(self.norm2(x_BLD))

    def at(self, x_BLD: Tensor, position_BP: Tensor) -> Tensor:
        """The block's output (B, P, D) at some positions, without computing it at the others."""
        x_BPD = _gather(x_BLD, position_BP)
        h_BLD = self.norm1(x_BLD)
        x_BPD = x_BPD + self.attn(h_BLD, _gather(h_BLD, position_BP))
        return x_BPD + self.mlp(self.norm2(x_BPD))


class MaskedTransformer(nn.Module):
    """Transformer and diffusion head, with the published names of the weights.

    Args:
        num_tokens: number of tokens N.
        token_channels: channels C of a token.
        width: width D.
        encoder_depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        num_heads: attention heads.
        head_depth: blocks of the diffusion head.
        head_width: width of the diffusion head.
        num_classes: number of classes.
        buffer_size: number of slots S that carry the class.
        use_mae: leave masked tokens out of the encoder; otherwise a single encoder (``encoder_depth + decoder_depth`` blocks)
            sees `mask_token` in their place, without a position of its own in its first half, as published.
        cfg_with_mask: "no class" and "masked" are one vector (classifier-free guidance with mask).
        attn_dropout: dropout of attention weights.
        proj_dropout: dropout of the outputs of attention and MLP.
        grad_checkpointing: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: a size below 1, or heads that do not divide the width.
    """

    def __init__(
        self,
        num_tokens: int,
        token_channels: int,
        width: int,
        encoder_depth: int,
        decoder_depth: int,
        num_heads: int,
        head_depth: int,
        head_width: int,
        num_classes: int = 1000,
        buffer_size: int = 64,
        use_mae: bool = True,
        cfg_with_mask: bool = True,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"num_tokens": num_tokens, "width": width, "encoder_depth": encoder_depth, "decoder_depth": decoder_depth}
        sizes |= {"num_heads": num_heads, "num_classes": num_classes, "buffer_size": buffer_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"MaskedTransformer: {name}={size} must be at least 1.")
        if width % num_heads:
            raise ValueError(f"MaskedTransformer: num_heads={num_heads} must divide width={width}.")
        self.num_tokens = num_tokens
        self.token_channels = token_channels
        self.num_classes = num_classes
        self.buffer_size = buffer_size
        self.use_mae = use_mae
        self.cfg_with_mask = cfg_with_mask
        self.grad_checkpointing = grad_checkpointing

        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.mask_token = self.fake_latent if cfg_with_mask else nn.Parameter(torch.empty(1, 1, width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, num_tokens + buffer_size, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, num_tokens + buffer_size, width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, num_tokens, width))
        self.class_emb = nn.Embedding(num_classes, width)
        self.z_proj = nn.Linear(token_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=_EPS)
        dropouts = (attn_dropout, proj_dropout)
        self.encoder_blocks = nn.ModuleList(_Block(width, num_heads, *dropouts) for _ in range(encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=_EPS)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList(_Block(width, num_heads, *dropouts) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=_EPS)
        self._init_weights()
        self.diffloss = DiffLossHead(token_channels, width, head_depth, head_width)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned)
        for parameter in (self.class_emb.weight, self.fake_latent, self.mask_token, *tables):
            nn.init.normal_(parameter, std=0.02)

    @property
    def width(self) -> int:
        """Width D."""
        return self.z_proj.out_features

    @property
    def data_dtype(self) -> torch.dtype:
        """Float type of data, noise and losses."""
        return torch.float64 if self.diffloss.dtype == torch.float64 else torch.float32

    def class_embedding(self, label_B: Tensor | None, batch_size: int, drop_B: Tensor | None = None) -> Tensor:
        """Embedding (B, D) of the classes; that of "no class" without labels, and where ``drop_B`` is true.

        Raises:
            ValueError: a label out of range.
        """
        fake_BD = self.fake_latent.expand(batch_size, -1)
        if label_B is None:
            return fake_BD
        if not torch.compiler.is_compiling() and bool(((label_B < 0) | (label_B >= self.num_classes)).any()):
            low, high = int(label_B.min()), int(label_B.max())
            raise ValueError(f"Classes must lie in 0 ... {self.num_classes - 1} (num_classes), got labels from {low} to {high}.")
        class_BD = self.class_emb(label_B)
        return class_BD if drop_B is None else torch.where(drop_B[:, None], fake_BD.to(class_BD.dtype), class_BD)

    def forward(
        self,
        x_BNC: Tensor,
        class_BD: Tensor,
        visible_BV: Tensor | None = None,
        mask_BN: Tensor | None = None,
        picked_BP: Tensor | None = None,
    ) -> Tensor:
        """Condition z of the head, (B, N, D), or (B, P, D) at the picked positions.

        Args:
            x_BNC: tokens; what masked ones hold does not matter.
            class_BD: from `class_embedding`.
            visible_BV: positions of the visible tokens, in any order, for the encoder that sees these only.
            mask_BN: true where masked, for the single encoder.
            picked_BP: positions whose output is wanted; the last block then computes no others.

        Raises:
            ValueError: tokens of another shape, or neither positions nor mask.
        """
        if x_BNC.shape[1:] != (self.num_tokens, self.token_channels):
            raise ValueError(
                f"The network was built for {self.num_tokens} tokens of {self.token_channels} channels, but the data has"
                f" {tuple(x_BNC.shape[1:])}: codec and patch_size must be those of the weights."
            )
        if self.use_mae:
            if visible_BV is None:
                raise ValueError("MaskedTransformer: the encoder of visible tokens needs visible_BV, their positions.")
            h_BLD = self._scatter(self._encode_visible(x_BNC, class_BD, visible_BV), visible_BV)
        else:
            if mask_BN is None:
                raise ValueError("MaskedTransformer: the single encoder needs mask_BN.")
            h_BLD = self.decoder_embed(self._encode_all(x_BNC, class_BD, mask_BN))
        h_BLD = h_BLD + self.decoder_pos_embed_learned
        *blocks, last = self.decoder_blocks
        for block in blocks:
            h_BLD = self._run(block, h_BLD)
        position_BND = self.diffusion_pos_embed_learned
        if picked_BP is None:
            h_BLD = self._run(last, h_BLD)
            return self.decoder_norm(h_BLD)[:, self.buffer_size :] + position_BND
        h_BPD = last.at(h_BLD, picked_BP + self.buffer_size)  # type: ignore[operator]
        return self.decoder_norm(h_BPD) + position_BND[0][picked_BP]

    def _encode_visible(self, x_BNC: Tensor, class_BD: Tensor, visible_BV: Tensor) -> Tensor:
        """Class slots and visible tokens (B, S + V, D); masked tokens are never computed with."""
        tokens_BVC = _gather(x_BNC, visible_BV).to(self.z_proj.weight.dtype)
        # Not by indexing the table: its gradient is a sum in the order of threads, and a resumed run would not be exact.
        position_BND = self.encoder_pos_embed_learned[:, self.buffer_size :].expand(len(x_BNC), -1, -1)
        x_BVD = self.z_proj(tokens_BVC) + _gather(position_BND, visible_BV)
        h_BLD = self.z_proj_ln(torch.cat([self._slots(class_BD).to(x_BVD.dtype), x_BVD], dim=1))
        for block in self.encoder_blocks:
            h_BLD = self._run(block, h_BLD)
        return self.decoder_embed(self.encoder_norm(h_BLD))

    def _scatter(self, h_BLD: Tensor, visible_BV: Tensor) -> Tensor:
        """The encoder's output at all positions, `mask_token` where masked (B, S + N, D)."""
        slots_BSD, visible_BVD = h_BLD[:, : self.buffer_size], h_BLD[:, self.buffer_size :]
        mask_11D = self.mask_token.to(h_BLD.dtype).view(1, 1, -1)
        all_BND = mask_11D.expand(len(h_BLD), self.num_tokens, -1)
        where_BVD = visible_BV[..., None].expand(-1, -1, h_BLD.shape[-1])
        return torch.cat([slots_BSD, all_BND.scatter(1, where_BVD, visible_BVD)], dim=1)

    def _encode_all(self, x_BNC: Tensor, class_BD: Tensor, mask_BN: Tensor) -> Tensor:
        """The single encoder's first half, (B, S + N, D): masked tokens are `mask_token`, after positions and norm."""
        hidden_BN1 = mask_BN[..., None]
        tokens_BNC = x_BNC.masked_fill(hidden_BN1, 0).to(self.z_proj.weight.dtype)
        x_BND = self.z_proj(tokens_BNC) + self.encoder_pos_embed_learned[:, self.buffer_size :]
        h_BLD = self.z_proj_ln(torch.cat([self._slots(class_BD).to(x_BND.dtype), x_BND], dim=1))
        slots_BSD, x_BND = h_BLD[:, : self.buffer_size], h_BLD[:, self.buffer_size :]
        h_BLD = torch.cat([slots_BSD, torch.where(hidden_BN1, self.mask_token.to(x_BND.dtype).view(1, 1, -1), x_BND)], dim=1)
        for block in self.encoder_blocks:
            h_BLD = self._run(block, h_BLD)
        return self.encoder_norm(h_BLD)

    def _slots(self, class_BD: Tensor) -> Tensor:
        """The class in all slots, with their positions (B, S, D)."""
        return class_BD[:, None] + self.encoder_pos_embed_learned[:, : self.buffer_size]

    def _run(self, block: nn.Module, h_BLD: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            recomputed: Any = checkpoint(block, h_BLD, use_reentrant=False)
            return recomputed
        return block(h_BLD)


def _gather(x_BLD: Tensor, position_BP: Tensor) -> Tensor:
    """Rows (B, P, D) of each sample."""
    return x_BLD.gather(1, position_BP[..., None].expand(-1, -1, x_BLD.shape[-1]))
