"""Grids are pixel-exact enlargements in row-major order."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.callbacks.picture import as_picture, evenly_spaced, label_margin, picture_grid, tile_corner, tile_scale


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [(), ("0", "3", "16")])
def test_every_tile_is_its_image_enlarged(channels: int, labels: tuple[str, ...]) -> None:
    images = torch.randint(0, 256, (7, channels, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = picture_grid(images, columns=3, scale=2, row_labels=labels)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture)
    for position, image in enumerate(images):
        left, top = tile_corner(position, 3, 5, 4, 2, label_margin(labels))
        tile = pixels[top : top + 10, left : left + 8]
        expected = np.asarray(as_picture(image)).repeat(2, axis=0).repeat(2, axis=1)
        assert np.array_equal(tile, expected)


def test_single_pictures_are_unchanged() -> None:
    image = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    assert np.array_equal(np.asarray(as_picture(image)), image.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(as_picture(image[:1])), image[0].numpy())
    assert isinstance(as_picture(image), Image.Image)


def test_small_images_are_enlarged_to_be_seen() -> None:
    assert [tile_scale(height) for height in (8, 28, 32, 64, 256)] == [8, 2, 2, 1, 1]


def test_evenly_spaced_keeps_both_ends() -> None:
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(100, 4) == [0, 33, 66, 99]
    assert evenly_spaced(100, 1) == [99]


def test_impossible_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        picture_grid(torch.zeros(0, 1, 4, 4, dtype=torch.uint8), columns=2)
    with pytest.raises(ValueError, match="got an image with 2"):
        as_picture(torch.zeros(2, 4, 4, dtype=torch.uint8))
