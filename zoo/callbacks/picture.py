"""Grids of images as pictures, pixel by pixel.

Shape suffixes: N images, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PADDING = 2
"""Pixels between two tiles and around the grid."""

_BACKGROUND = 96
_LABEL_HEIGHT = 12


def tile_scale(height: int) -> int:
    """Whole factor by which tiles of this height are enlarged, so that 8x8 digits can be seen: about 64 pixels high."""
    return max(1, 64 // height)


def tile_corner(position: int, columns: int, height: int, width: int, scale: int, margin: int = 0) -> tuple[int, int]:
    """Left and top pixel of a tile of `picture_grid`.

    Args:
        position: Place of the image in row-major order.
        columns: Columns of the grid.
        height: Height of an image before it is enlarged.
        width: Width of an image before it is enlarged.
        scale: Factor by which tiles are enlarged.
        margin: Width of the margin that `label_margin` gives.
    """
    row, column = divmod(position, columns)
    return margin + PADDING + column * (width * scale + PADDING), PADDING + row * (height * scale + PADDING)


def label_margin(labels: Sequence[str]) -> int:
    """Pixels that row labels take at the left."""
    font = ImageFont.load_default(_LABEL_HEIGHT)
    return max((round(font.getlength(label)) + 2 * PADDING for label in labels), default=0)


def as_picture(image_CHW: Tensor) -> Image.Image:
    """One uint8 image (C, H, W) as a PIL image, grey or RGB, unchanged.

    Raises:
        ValueError: If it has neither 1 nor 3 channels.
    """
    if image_CHW.shape[0] not in (1, 3):
        raise ValueError(f"A picture has 1 (grey) or 3 (RGB) channels, got an image with {image_CHW.shape[0]}.")
    pixels = image_CHW.cpu()
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())


def picture_grid(image_NCHW: Tensor, columns: int, *, scale: int | None = None, row_labels: Sequence[str] = ()) -> Image.Image:
    """Lay out images row by row, from left to right, each enlarged by a whole factor without smoothing.

    Args:
        image_NCHW: (N, C, H, W) uint8, grey or RGB.
        columns: Columns of the grid.
        scale: Factor by which each pixel is enlarged; None for `tile_scale`.
        row_labels: A label for each row, written at the left; empty for none.

    Returns:
        The picture, in mode "L" or "RGB"; `tile_corner` says where each image lies.

    Raises:
        ValueError: If there are no images.
    """
    if not len(image_NCHW):
        raise ValueError("A grid wants at least one image, got none.")
    _, channels, height, width = image_NCHW.shape
    scale = scale or tile_scale(height)
    columns = min(columns, len(image_NCHW))
    rows = -(-len(image_NCHW) // columns)
    margin = label_margin(row_labels)
    size = (
        margin + PADDING + columns * (width * scale + PADDING),
        PADDING + rows * (height * scale + PADDING),
    )
    picture = Image.new("L" if channels == 1 else "RGB", size, _BACKGROUND if channels == 1 else (_BACKGROUND,) * 3)
    for position, image_CHW in enumerate(image_NCHW):
        tile = as_picture(image_CHW).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        picture.paste(tile, tile_corner(position, columns, height, width, scale, margin))
    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(row_labels):
        top = tile_corner(row * columns, columns, height, width, scale, margin)[1] + height * scale // 2
        draw.text((margin, top), label, fill="white", font=ImageFont.load_default(_LABEL_HEIGHT), anchor="rm")
    return picture


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` positions spread evenly over `count`, the first and the last among them.

    Example:
        >>> evenly_spaced(11, 3)
        [0, 5, 10]
    """
    if wanted >= count:
        return list(range(count))
    return torch.linspace(0, count - 1, wanted).round().long().tolist() if wanted > 1 else [count - 1]
