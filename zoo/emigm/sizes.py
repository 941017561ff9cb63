"""The published sizes.

Source: You et al., arXiv 2503.07197, tables 6 and 7.
"""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Architecture", "SizeName", "architecture", "chosen_sizes"]

SizeName = Literal["xsmall", "small", "base", "large", "huge"]


@dataclass
class Architecture:
    """Widths and depths of transformer and head.

    Args:
        width: width of the transformer.
        encoder_depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        num_heads: attention heads.
        head_depth: blocks of the diffusion head.
        head_width: width of the diffusion head.
    """

    width: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    head_depth: int
    head_width: int


_TRANSFORMERS = {
    "xsmall": (448, 10, 8),
    "small": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 16, 16),
    "huge": (1280, 20, 16),
}
_HEADS_256 = {"xsmall": (3, 1024), "small": (3, 1024), "base": (6, 1024), "large": (8, 1280), "huge": (12, 1536)}
_HEADS_512 = {"xsmall": (6, 1280), "small": (6, 1280), "base": (8, 1280), "large": (8, 1280), "huge": (12, 1536)}


def architecture(size: SizeName, image_size: int) -> Architecture:
    """Sizes by name; above 256 pixels the head is that of the 512-pixel models (``huge`` was published for 256 only).

    Args:
        size: name.
        image_size: pixels along the longer side.

    Raises:
        ValueError: unknown size.
    """
    if size not in get_args(SizeName):
        raise ValueError(f"There is no size {size!r}; there are {', '.join(get_args(SizeName))}. Others: give an architecture.")
    width, depth, num_heads = _TRANSFORMERS[size]
    head_depth, head_width = (_HEADS_256 if image_size <= 256 else _HEADS_512)[size]
    return Architecture(width, depth, depth, num_heads, head_depth, head_width)


def chosen_sizes(size: SizeName | None, own: Architecture | None, image_size: int) -> Architecture:
    """A published size or an architecture of one's own.

    Args:
        size: Name; None with ``own``.
        own: Architecture; None with ``size``.
        image_size: Pixels along the longer side.

    Raises:
        ValueError: If both or neither is given, or the name is unknown.
    """
    if (size is None) == (own is None):
        raise ValueError(f"EMIGM: give size ({', '.join(get_args(SizeName))}) or an architecture of your own, one of the two.")
    return architecture(size, image_size) if own is None else own  # type: ignore[arg-type]
