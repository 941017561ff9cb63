"""The square picture that generative models of ImageNet are trained on and compared with."""

from __future__ import annotations

from PIL import Image

__all__ = ["center_crop"]


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Shrink or enlarge a picture until its shorter side is ``size``, and cut out the middle.

    The picture is halved by averaging (``BOX``, odd sizes rounded down) while its shorter side is at least
    ``2 * size``, then resized with ``BICUBIC``. Where an odd number of pixels is cut off, the larger part goes from the
    right and from below. This is the preparation of ADM (Dhariwal and Nichol, arXiv 2105.05233), whose reference
    statistics the published figures use.

    Args:
        picture: Any picture of 8 bits a channel whose mode can be resized, RGB for example.
        size: Height and width to return, in pixels.

    Returns:
        A picture of ``size`` x ``size`` pixels.

    Raises:
        ValueError: ``size`` < 1.
    """
    if size < 1:
        raise ValueError(f"center_crop: size={size} must be at least 1.")
    width, height = picture.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        picture = picture.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
