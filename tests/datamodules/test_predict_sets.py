"""What predict works on: sample numbers, or the user's own pictures and masks, checked before any work starts."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CIFAR10, Digits


def picture(path: Path, size=(8, 8), mode="L", fill=None) -> np.ndarray:
    """Write a random picture, or one of a single value, and return its pixels."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "I;16": ()}[mode]
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], *channels))
    if fill is not None:
        pixels[:] = fill
    pixels = pixels.astype(np.uint16 if mode == "I;16" else np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def deep_png(colour_type: int, channels: int) -> bytes:
    """A PNG of 8x8 pixels with 16 bits a channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\xff" * 8 * channels) * 8
    head = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def predict_batch(data) -> dict:
    data.setup("predict")
    (batch,) = list(data.predict_dataloader())
    return batch


def test_samples_are_numbered_over_all_batches():
    data = Digits(predict_samples=10, batch_size=4)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(batch.keys() == {"index"} for batch in batches)
    assert batches[0]["index"].dtype == torch.int64


def test_pictures_come_in_the_order_of_their_names_with_values_in_0_1(tmp_path):
    pixels = {name: picture(tmp_path / name) for name in ("b.png", "a.png", "c.PNG")}
    (tmp_path / "notes.txt").write_text("not a picture")
    batch = predict_batch(Digits(predict_images=tmp_path))
    assert [Path(path).name for path in batch["path"]] == ["a.png", "b.png", "c.PNG"]
    assert batch["index"].tolist() == [0, 1, 2]
    expected = torch.from_numpy(np.stack([pixels["a.png"], pixels["b.png"], pixels["c.PNG"]])).float() / 255
    assert torch.equal(batch["image"][:, 0], expected)
    assert batch["mask"].shape == (3, 1, 8, 8)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].all(), "without masks all pixels are known"


def test_colour_and_grey_pictures_are_converted_to_the_model_s_channels(tmp_path):
    pixels = picture(tmp_path / "a.png", (32, 32), "RGB")
    picture(tmp_path / "b.png", (32, 32), "L")
    picture(tmp_path / "c.png", (32, 32), "RGBA", fill=255)
    batch = predict_batch(CIFAR10(root=tmp_path, predict_images=tmp_path))
    assert batch["image"].shape == (3, 3, 32, 32)
    assert torch.equal(batch["image"][0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    assert torch.equal(batch["image"][1, 0], batch["image"][1, 2])
    picture(tmp_path / "grey" / "d.png", (8, 8), "RGB")
    assert predict_batch(Digits(predict_images=tmp_path / "grey"))["image"].shape == (1, 1, 8, 8)


def test_white_is_known_and_black_is_to_be_filled_in(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "images" / name)
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, :3], half[:, 3], half[:, 4] = 255, 128, 127
    (tmp_path / "masks").mkdir()
    Image.fromarray(half).save(tmp_path / "masks" / "a.png")
    Image.fromarray(255 - half).save(tmp_path / "masks" / "b.png")
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:, :4] = True
    one = predict_batch(Digits(predict_images=tmp_path / "images", predict_masks=tmp_path / "masks" / "a.png"))
    assert torch.equal(one["mask"], known.expand(2, 1, 8, 8))
    each = predict_batch(Digits(predict_images=tmp_path / "images", predict_masks=tmp_path / "masks"))
    assert torch.equal(each["mask"][0, 0], known)
    assert torch.equal(each["mask"][1, 0, :, [0, 3, 5]], torch.tensor([False, False, True]).expand(8, 3))


def test_a_jpeg_finds_its_png_mask(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "masks" / "a.png", fill=0)
    batch = predict_batch(Digits(predict_images=tmp_path / "images", predict_masks=tmp_path / "masks"))
    assert not batch["mask"].any()


def test_another_size_is_an_error_or_resized_on_request(tmp_path):
    picture(tmp_path / "images" / "a.png", (16, 12), fill=51)
    picture(tmp_path / "mask.png", (4, 2), fill=255)
    with pytest.raises(ValueError, match=r"a\.png has 16x12 pixels .*, not 8x8.* predict_resize: true"):
        Digits(predict_images=tmp_path / "images").setup("predict")
    batch = predict_batch(Digits(predict_images=tmp_path / "images", predict_masks=tmp_path / "mask.png", predict_resize=True))
    assert batch["image"].shape == (1, 1, 8, 8)
    assert torch.equal(batch["image"], torch.full((1, 1, 8, 8), 51.0) / 255)
    assert batch["mask"].all()


def test_a_picture_that_cannot_be_read_is_named_before_sampling_starts(tmp_path):
    picture(tmp_path / "a.png")
    broken = tmp_path / "b.png"
    broken.write_bytes(b"this is no picture")
    with pytest.raises(ValueError, match=f"{broken} is not a readable picture"):
        Digits(predict_images=tmp_path).setup("predict")
    broken.write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=f"{broken} is not a readable picture"):
        Digits(predict_images=tmp_path).setup("predict")
    picture(broken, mode="I;16", fill=1000)
    with pytest.raises(ValueError, match=f"{broken} has more than 8 bits a channel"):
        Digits(predict_images=tmp_path).setup("predict")
    for colour_type, channels in ((2, 3), (4, 2), (6, 4), (0, 1)):
        broken.write_bytes(deep_png(colour_type, channels))
        with pytest.raises(ValueError, match=f"{broken} has more than 8 bits a channel"):
            Digits(predict_images=tmp_path).setup("predict")
    picture(broken, mode="RGBA", fill=100)
    with pytest.raises(ValueError, match=f"{broken} has transparent pixels"):
        Digits(predict_images=tmp_path).setup("predict")


def test_missing_folders_and_masks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        Digits(predict_images=tmp_path / "none").setup("predict")
    with pytest.raises(FileNotFoundError, match=r"holds no file ending in \.png"):
        Digits(predict_images=tmp_path).setup("predict")
    picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"mask file or folder .*none does not exist"):
        Digits(predict_images=tmp_path, predict_masks=tmp_path / "none").setup("predict")
    (tmp_path / "masks").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a\.png has no mask: .*masks/a\.png does not exist"):
        Digits(predict_images=tmp_path, predict_masks=tmp_path / "masks").setup("predict")
