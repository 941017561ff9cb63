"""A user's own pictures and masks, read whole before any work starts on them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

__all__ = ["read_masks", "read_pictures"]

_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_pictures(folder: Path, image_shape: tuple[int, int, int], resize: bool) -> tuple[Tensor, list[Path]]:
    """Read all PNG and JPEG files of a folder, in the order of their names.

    Args:
        folder: The folder; subfolders are not read.
        image_shape: Channels, height and width to return: 1 channel is grey, 3 are RGB.
        resize: Whether pictures of another size are resized (antialiased); otherwise they are an error.

    Returns:
        Pictures uint8 (N, C, H, W), and their files.

    Raises:
        FileNotFoundError: The folder is missing or holds no picture.
        ValueError: A file is broken, has more than 8 bits a channel, transparent pixels, or another size; it is named.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of pictures {folder} does not exist: give a folder of PNG or JPEG files.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"The folder of pictures {folder} holds no file ending in {', '.join(_SUFFIXES)}.")
    mode = "L" if image_shape[0] == 1 else "RGB"
    return torch.stack([_read(path, mode, image_shape, resize, Image.Resampling.BICUBIC) for path in paths]), paths


def read_masks(source: Path, pictures: list[Path], image_shape: tuple[int, int, int], resize: bool) -> Tensor:
    """Read the mask of each picture: white is known, black is to be filled in.

    Args:
        source: One file for all pictures, or a folder that holds, for each picture, a PNG of the same name (its suffix
            apart) or the very same name.
        pictures: The pictures' files.
        image_shape: Channels, height and width of the pictures.
        resize: Whether masks of another size are resized (nearest pixel); otherwise they are an error.

    Returns:
        bool (N, 1, H, W), true where a pixel is known: where the grey value is 128 or more.

    Raises:
        FileNotFoundError: The file or folder, or the mask of a picture, is missing.
        ValueError: A mask is broken or has another size.
    """
    if source.is_dir():
        paths = []
        for picture in pictures:
            named = [source / f"{picture.stem}.png", source / picture.name]
            found = next((path for path in named if path.is_file()), None)
            if found is None:
                raise FileNotFoundError(f"The picture {picture} has no mask: {named[0]} does not exist.")
            paths.append(found)
    elif source.is_file():
        paths = [source] * len(pictures)
    else:
        raise FileNotFoundError(
            f"The mask file or folder {source} does not exist: give one, with white pixels where the picture is known."
        )
    read = {path: _read(path, "L", image_shape, resize, Image.Resampling.NEAREST) for path in set(paths)}
    return torch.stack([read[path] for path in paths]) >= 128


def _read(path: Path, mode: str, image_shape: tuple[int, int, int], resize: bool, filter: Image.Resampling) -> Tensor:
    _, height, width = image_shape
    try:
        with Image.open(path) as opened:
            # Pillow opens a PNG of 16 bits as one of 8 unless it is grey without alpha; only the raw mode tells.
            if opened.mode.startswith(("I", "F")) or ";16B" in str(opened.tile):
                raise ValueError(f"{path} has more than 8 bits a channel: save it with 8.")
            if opened.has_transparency_data and opened.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise ValueError(f"{path} has transparent pixels: save it without transparency.")
            picture = ImageOps.exif_transpose(opened).convert(mode)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable picture ({error}): replace it or take it out of the folder.") from error
    if picture.size != (width, height):
        if not resize:
            raise ValueError(
                f"{path} has {picture.width}x{picture.height} pixels (width x height), not {width}x{height}; "
                f"change the file or set predict_resize: true."
            )
        picture = picture.resize((width, height), filter)
    return pil_to_tensor(picture)
