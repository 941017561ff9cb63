"""Latent images as tokens and back. Shape suffixes: B samples, C channels, H height, W width, N tokens."""

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["known_positions", "patchify", "token_mask", "unpatchify"]


def patchify(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """Tokens (B, H W / p^2, C p^2), row by row; within a token channels, then rows, then columns, as published."""
    rows_columns = x_BCHW.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # B C h w p p
    return rows_columns.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpatchify(x_BND: Tensor, latent_shape: tuple[int, int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: (B, C, H, W)."""
    channels, height, width = latent_shape
    split = x_BND.unflatten(1, (height // patch_size, width // patch_size)).unflatten(3, (channels, patch_size, patch_size))
    return split.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)


def token_mask(known_BHW: Tensor, patch_size: int) -> Tensor:
    """Mask of known tokens (B, N): those with every pixel known.

    Args:
        known_BHW: bool, true where known.
        patch_size: pixels of a token along each axis.
    """
    return patchify(known_BHW[:, None], patch_size).all(-1)


def known_positions(known_BHW: Tensor, height: int, width: int) -> Tensor:
    """Mask of known latent positions (B, height, width) for known pixels.

    Where a position stands for several pixels, all of them must be known. Where the latents are larger than the image, they are
    the image with a border, which is known.

    Args:
        known_BHW: bool, true where a pixel is known.
        height: rows of the latents.
        width: columns of the latents.
    """
    rows, columns = known_BHW.shape[1:]
    if rows > height or columns > width:
        return patchify(known_BHW[:, None], rows // height).all(-1).unflatten(1, (height, width))
    above, left = (height - rows) // 2, (width - columns) // 2
    return pad(known_BHW, (left, width - columns - left, above, height - rows - above), value=True)
