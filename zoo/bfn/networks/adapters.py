"""Adapters between what a flow shows, the channels inside a network, and what a head reads.

They hold the names of the published weights: ``input_adapter.pos_feats``, ``output_adapter.output_projection`` and so on.
Source: Graves et al., arXiv 2308.07037, and the published code's formats.

Shape suffixes: B samples, H height, W width, L positions, F features, K numbers per element.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["FourierImageInputAdapter", "OutputAdapter", "TextInputAdapter"]


class FourierImageInputAdapter(nn.Module):
    """Appends to each pixel's values, if asked to, its time and sines and cosines of its position.

    Args:
        input_channels: values of a pixel.
        input_shape: (height, width).
        n_freq_bands: frequencies of position, from 1 to half the image's size.
        output_height: features given out; None for all that there are, without a projection.
        add_pos_feats: append the features of position, ``4 n_freq_bands + 2`` of them.
        add_mask: append the time, as 2 t - 1.
    """

    def __init__(
        self,
        input_channels: int = 3,
        input_shape: tuple[int, int] = (32, 32),
        n_freq_bands: int = 64,
        output_height: int | None = None,
        add_pos_feats: bool = True,
        add_mask: bool = True,
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.add_pos_feats = add_pos_feats
        self.add_mask = add_mask
        # Published files hold the features also where the network does not use them.
        self.register_buffer("pos_feats", _position_features(self.input_shape, n_freq_bands))
        features = input_channels + add_mask + add_pos_feats * self.pos_feats.shape[1]
        #: Number of features given out.
        self.output_height = features if output_height is None else output_height
        self.output_projection = None if self.output_height == features else nn.Linear(features, self.output_height)

    pos_feats: Tensor

    def forward(self, x_BHWF: Tensor, t: Tensor) -> Tensor:
        """Features (B, H, W, F) of pixels (B, H, W, input_channels) at times (B,), in float32 or finer unless projected."""
        features = [x_BHWF]
        if self.add_mask:
            time = 2 * t.to(torch.promote_types(t.dtype, torch.float32)) - 1
            features.append(time.view(-1, 1, 1, 1).expand(*x_BHWF.shape[:3], 1))
        if self.add_pos_feats:
            features.append(self.pos_feats.view(*self.input_shape, -1).expand(len(x_BHWF), -1, -1, -1))
        out = torch.cat(features, dim=-1)
        return out if self.output_projection is None else self.output_projection(out.to(self.output_projection.weight.dtype))


class TextInputAdapter(nn.Module):
    """Sum of embeddings of a position's probabilities, of the position itself, and of time.

    Args:
        vocab_size: numbers that the flow shows for each position.
        seq_len: the longest sequence.
        output_size: width of the embedding.
        learn_pos_embedding: learn the positions' embeddings instead of fixing sines and cosines.
    """

    def __init__(self, vocab_size: int, seq_len: int, output_size: int = 256, learn_pos_embedding: bool = False) -> None:
        super().__init__()
        self.learn_pos_embedding = learn_pos_embedding
        if learn_pos_embedding:
            self.pos_embedding = nn.Embedding(seq_len, output_size)
        else:
            self.register_buffer("pos_embedding", _position_code(seq_len, output_size))
        self.inp_embedding = nn.Linear(vocab_size, output_size)
        self.t_embedding = nn.Linear(1, output_size)

    def forward(self, probs_BLK: Tensor, t: Tensor) -> Tensor:
        """Embedding (B, L, output_size) of probabilities (B, L, vocab_size) at times (B,)."""
        dtype = self.inp_embedding.weight.dtype
        code = self.pos_embedding.weight if self.learn_pos_embedding else self.pos_embedding
        time = 2 * t.to(torch.promote_types(t.dtype, torch.float32)) - 1
        values = self.inp_embedding((2 * probs_BLK - 1).to(dtype))
        return values + code[: probs_BLK.shape[1]] + self.t_embedding(time.to(dtype)[:, None, None])  # type: ignore[index]


class OutputAdapter(nn.Module):
    """Linear map from a network's features to the numbers that a head reads.

    Args:
        input_height: features of a pixel.
        output_channels: elements of a pixel.
        output_height: numbers per element.
    """

    def __init__(self, input_height: int, output_channels: int, output_height: int) -> None:
        super().__init__()
        self.output_channels = output_channels
        self.output_height = output_height
        self.output_projection = nn.Linear(input_height, output_channels * output_height)

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_height) -> (..., output_channels, output_height)."""
        return self.output_projection(x).unflatten(-1, (self.output_channels, self.output_height))


def _position_features(shape: tuple[int, ...], bands: int) -> Tensor:
    """Features (H W, 4 bands + 2) of pixels' positions: sines, cosines, and the row and column themselves in [-1, 1]."""
    axes = [torch.linspace(-1, 1, size) for size in shape]
    position = torch.cartesian_prod(*axes)
    frequency = math.pi * torch.stack([torch.linspace(1, size / 2, bands) for size in shape])
    phase = (position[:, :, None] * frequency).flatten(1)
    return torch.cat((phase.sin(), phase.cos(), position), dim=1)


def _position_code(length: int, width: int) -> Tensor:
    """Code (length, width) of positions p: sin(p / 1000^(j / width)) at even j, cos of the same at odd j.

    The published code differs from the usual one in the base, 1000, and in that sines and cosines share no frequency.
    """
    j = torch.arange(width)
    phase = torch.arange(length)[:, None] / 1000 ** (j / width)
    return torch.where(j % 2 == 0, phase.sin(), phase.cos())
