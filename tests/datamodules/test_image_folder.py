"""Folders of pictures: the published centre crop, labels by sorted folder, mirroring as a pure function, bad input named."""

import logging
import os
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import distributed, nn

from datamodules import ImageFolder, ImageNet
from datamodules.images.center_crop import center_crop
from datamodules.images.labelled_files import read_rgb
from zoo.base.hyperparameters import build


def random_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_folder(root: Path, counts: dict[str, int], size: int = 8, suffix: str = ".png") -> None:
    """``counts`` pictures in each folder, such as ``train/cat``, all different."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            seed = zlib.crc32(f"{folder}/{number}".encode())
            Image.fromarray(random_pixels(size, size, seed)).save(root / folder / f"{number:03d}{suffix}")


# The centre crop


def resampled(pixels: np.ndarray, length: int, kernel, support: float) -> np.ndarray:
    """The first axis resized to ``length`` by its definition: a normalised, stretched kernel around each new centre."""
    old = len(pixels)
    scale = old / length
    stretch = max(scale, 1)
    centre = (np.arange(length)[:, None] + 0.5) * scale
    pixel = np.arange(old)[None]
    window = [np.trunc(centre + side * support * stretch + 0.5) for side in (-1, 1)]  # a pixel on the edge counts at one side
    weights = np.where((window[0] <= pixel) & (pixel < window[1]), kernel((pixel - centre + 0.5) * (1 / stretch)), 0)
    weights /= weights.sum(1, keepdims=True)
    return np.clip(np.floor(np.tensordot(weights, pixels, 1) + 0.5), 0, 255)


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    return np.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def resized(pixels: np.ndarray, height: int, width: int, kernel, support: float) -> np.ndarray:
    rows = resampled(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1) if width != pixels.shape[1] else pixels
    return resampled(rows, height, kernel, support) if height != pixels.shape[0] else rows


def reference_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    pixels = pixels.astype(float)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resized(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    scale = size / min(pixels.shape[:2])
    pixels = resized(pixels, round(pixels.shape[0] * scale), round(pixels.shape[1] * scale), bicubic, 2)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@settings(max_examples=60, deadline=None)
@given(height=st.integers(3, 75), width=st.integers(3, 75), size=st.integers(4, 17))
def test_the_crop_is_what_its_definition_gives(height, width, size):
    """Odd sizes, both orientations, pictures smaller than the target; the rounding of Pillow's fixed-point sums apart."""
    pixels = random_pixels(height, width) // 4 + 96  # nothing overshoots 0 or 255, so that the order of the axes is no matter
    cropped = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert cropped.shape == (size, size, 3)
    error = np.abs(cropped - reference_crop(pixels, size))
    assert (error.max() <= 3) and (error.mean() < 0.6)


def test_a_picture_of_the_right_size_is_left_alone_and_one_twice_as_large_is_averaged():
    pixels = random_pixels(16, 16)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 16)), pixels)
    mean = pixels.reshape(8, 2, 8, 2, 3).astype(float).mean((1, 3))
    assert np.abs(np.asarray(center_crop(Image.fromarray(pixels), 8)) - mean).max() <= 1
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels[:, :15]), 15)), pixels[:15, :15])
    with pytest.raises(ValueError, match="size=0"):
        center_crop(Image.fromarray(pixels), 0)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_pictures_of_all_modes_become_rgb(suffix, tmp_path):
    value = {"1": 255, "L": 100, "LA": (100, 7), "P": 3, "RGB": (10, 100, 200), "RGBA": (10, 100, 200, 7), "CMYK": (0, 0, 0, 155)}
    fits = {".png": value.keys() - {"CMYK"}, ".tif": value.keys(), ".jpg": {"1", "L", "RGB", "CMYK"}, ".webp": {"RGB", "RGBA"}}
    for mode in sorted(fits[suffix]):
        picture = Image.new(mode, (9, 8), value[mode])
        if mode == "P":
            picture.putpalette([0, 0, 0] * 3 + [10, 100, 200])
            picture.info["transparency"] = 3
        picture.save(tmp_path / f"{mode}{suffix}")
        colour = {"1": (255,) * 3, "L": (100,) * 3, "LA": (100,) * 3, "CMYK": (100,) * 3}.get(mode, (10, 100, 200))
        read = read_rgb(tmp_path / f"{mode}{suffix}", 8)
        assert (read.dtype, read.shape) == (torch.uint8, (3, 8, 8))
        assert (read.int() - torch.tensor(colour)[:, None, None]).abs().max() <= (0 if suffix in (".png", ".tif") else 4)


# Batches


def test_labels_follow_the_sorted_class_folders(tmp_path):
    write_folder(tmp_path, {"train/dog": 3, "train/Ape": 2, "train/cat": 4, "val/cat": 2, "val/dog": 1})
    data = ImageFolder(tmp_path, image_size=8, batch_size=3)
    data.setup("fit")
    assert (data.classes, data.num_classes, data.image_shape) == (["Ape", "cat", "dog"], 3, (3, 8, 8))
    assert data.files("train").labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    batches = list(data.val_dataloader())
    (images, labels) = batches[0]
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (3, 3, 8, 8), torch.int64)
    assert labels.tolist() == [1, 1, 2]
    expected = np.stack([np.asarray(Image.open(tmp_path / f"val/{name}.png")) for name in ("cat/000", "cat/001", "dog/000")])
    assert torch.equal(images, torch.from_numpy(expected).permute(0, 3, 1, 2).float() / 255)
    assert [labels.tolist() for _, labels in data.test_dataloader()] == [[1, 1, 2]], "without a test folder, that of val"
    write_folder(tmp_path, {"test/Ape": 2})
    (batch,) = ImageFolder(tmp_path, image_size=8).test_dataloader()
    assert batch[1].tolist() == [0, 0]


def epoch_of(data: ImageFolder, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_half_of_the_pictures_are_mirrored_anew_each_epoch(tmp_path):
    write_folder(tmp_path, {"train/a": 40, "train/b": 24, "val/a": 1})
    plain = ImageFolder(tmp_path, image_size=8, flip=False, batch_size=64, seed=1)
    flipping = ImageFolder(tmp_path, image_size=8, batch_size=64, seed=1)
    mirrored = []
    for epoch in range(6):
        ((images, labels),), ((originals, expected),) = epoch_of(flipping, epoch), epoch_of(plain, epoch)
        assert torch.equal(labels, expected)
        is_mirrored = (images == originals.flip(-1)).flatten(1).all(1)
        assert (is_mirrored ^ (images == originals).flatten(1).all(1)).all()
        mirrored.append(is_mirrored)
    share = torch.stack(mirrored).float().mean()
    assert abs(share - 0.5) < 4 * 0.5 / (6 * 64) ** 0.5
    assert len({tuple(epoch.tolist()) for epoch in mirrored}) == 6


def test_mirroring_does_not_depend_on_workers_batches_or_resuming(tmp_path):
    write_folder(tmp_path, {"train/a": 14, "train/b": 10, "val/a": 1})
    data = ImageFolder(tmp_path, image_size=8, batch_size=4, seed=3)
    whole = epoch_of(data, 1)
    assert same(epoch_of(ImageFolder(tmp_path, image_size=8, batch_size=4, seed=3, num_workers=2), 1), whole)
    ((images, _),) = epoch_of(ImageFolder(tmp_path, image_size=8, batch_size=24, seed=3), 1)
    assert torch.equal(images, torch.cat([batch[0] for batch in whole]))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    resumed = ImageFolder(tmp_path, image_size=8, batch_size=4, seed=3).train_dataloader()
    resumed.load_state_dict(dict(loader.state_dict()))
    assert same(list(resumed), whole[2:])
    assert not same(epoch_of(ImageFolder(tmp_path, image_size=8, batch_size=4, seed=4), 1), whole)


def test_a_share_is_held_out_where_there_is_no_val(tmp_path):
    write_folder(tmp_path, {"train/a": 20, "train/b": 10})
    data = ImageFolder(tmp_path, image_size=8, val_fraction=0.1)
    data.setup("fit")
    train, val = data.files("train"), data.files("val")
    assert (train.labels.bincount().tolist(), val.labels.bincount().tolist()) == ([18, 9], [2, 1])
    paths = [files.path(index) for files in (train, val) for index in range(len(files))]
    assert sorted(paths) == sorted(str(path) for path in tmp_path.glob("train/*/*"))
    again = ImageFolder(tmp_path, image_size=8, val_fraction=0.1, seed=5)
    assert again.files("val").path(0) == val.path(0), "the same whatever the seed"
    reference = data.reference_images()
    assert (reference.dtype, reference.shape) == (torch.uint8, (30, 3, 8, 8))


def test_too_many_pictures_to_compare_with_are_refused(tmp_path):
    write_folder(tmp_path, {"train/a": 2, "val/a": 1}, size=4)
    with pytest.raises(TypeError, match=r"2 training pictures .* 2\.4 GB .* file of their statistics"):
        ImageFolder(tmp_path, image_size=20_000).reference_images()


# Prediction


class Recorder(L.LightningModule):
    """Returns what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def predict_step(self, batch, batch_idx):
        return batch


def predicted(root: Path, **options) -> list[dict]:
    """What this process is given to predict."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    trainer = L.Trainer(
        default_root_dir=root, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    return trainer.predict(Recorder(), datamodule=ImageFolder(root, image_size=8, batch_size=3, **options))


def predicted_of_both_kinds(root: Path) -> list[list[tuple]]:
    kinds = ({"predict_split": "train"}, {"predict_samples": 9, "predict_labels": [1, 0]})
    return [
        [
            (batch["index"].tolist(), batch["label"].tolist(), [Path(path).name for path in batch.get("path", [])])
            for batch in predicted(root, **options)
        ]
        for options in kinds
    ]


def test_predict_goes_through_a_split_in_order_and_unmirrored(tmp_path):
    write_folder(tmp_path, {"train/b": 2, "train/a": 3, "val/b": 1})
    batches = predicted(tmp_path, predict_split="train")
    assert all(batch.keys() == {"index", "image", "label", "path"} for batch in batches)
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2], [3, 4]]
    assert [batch["label"].tolist() for batch in batches] == [[0, 0, 0], [1, 1]]
    paths = [path for batch in batches for path in batch["path"]]
    assert paths == [str(path) for path in sorted(tmp_path.glob("train/*/*"))]
    for batch in batches:
        for image, path in zip(batch["image"], batch["path"], strict=True):
            assert torch.equal(image, read_rgb(path, 8).float() / 255)
    (batch,) = predicted(tmp_path, predict_split="val")
    assert (batch["index"].tolist(), batch["label"].tolist()) == ([0], [1])


def test_two_processes_share_out_what_is_predicted(pool, tmp_path):
    write_folder(tmp_path, {"train/b": 5, "train/a": 6})
    ranks = pool.run(predicted_of_both_kinds, tmp_path, world_size=2)
    for kind, expected in enumerate(predicted_of_both_kinds(tmp_path)):
        shares = [
            {(i, label) for index, labels, _ in rank[kind] for i, label in zip(index, labels, strict=True)} for rank in ranks
        ]
        assert not shares[0] & shares[1]
        whole = {(i, label) for index, labels, _ in expected for i, label in zip(index, labels, strict=True)}
        assert shares[0] | shares[1] == whole
        assert len(whole) == (11, 9)[kind]


def test_samples_are_drawn_without_the_files(tmp_path):
    data = ImageNet(tmp_path / "none", predict_samples=3, predict_labels=[999, 0])
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["label"].tolist() == [999, 0, 999]
    with pytest.raises(ValueError, match="predict_labels holds 1000, and the classes of ImageNet are 0 to 999"):
        ImageNet(tmp_path / "none", predict_labels=1000).setup("predict")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        ImageNet(tmp_path / "none", predict_split="val").setup("predict")


# What is wrong is named


def test_a_damaged_picture_is_an_error_or_left_out(tmp_path, caplog):
    write_folder(tmp_path, {"train/a": 6, "train/b": 6, "val/a": 2}, suffix=".jpg")
    cut, empty, deep = (tmp_path / f"train/{name}.jpg" for name in ("a/001", "b/002", "b/005"))
    cut.write_bytes(cut.read_bytes()[:-40])
    empty.write_bytes(b"")
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(deep, format="PNG")
    for path, reason in ((cut, "image file is truncated"), (empty, "cannot identify"), (deep, "more than 8 bits a channel")):
        with pytest.raises(ValueError, match=rf"{path} is not a readable picture \(.*({reason}).*on_error: skip"):
            read_rgb(path, 8)
    with pytest.raises(ValueError, match=f"{cut} is not a readable picture"):
        list(ImageFolder(tmp_path, image_size=8, batch_size=12).train_dataloader())
    for workers in (0, 2):
        caplog.clear()
        data = ImageFolder(tmp_path, image_size=8, batch_size=6, num_workers=workers, on_error="skip", predict_split="train")
        batches = list(data.train_dataloader())
        assert sum(len(labels) for _, labels in batches) == 9
        assert [len(images) for images, _ in batches] == [len(labels) for _, labels in batches]
        (first, second) = data.predict_dataloader()
        assert first["index"].tolist() + second["index"].tolist() == [0, 2, 3, 4, 5, 6, 7, 9, 10]
        assert not {str(cut), str(empty), str(deep)} & {*first["path"], *second["path"]}
        with caplog.at_level(logging.WARNING):
            data.teardown("fit")
        assert caplog.messages[-1].startswith("3 of 12 pictures of")
        assert f"{cut}, {empty}, {deep}." in caplog.messages[-1]
    assert data.files("train").skipped() is not None
    assert data.files("val").skipped() is None


def test_a_batch_without_any_readable_picture_is_an_error(tmp_path):
    write_folder(tmp_path, {"train/a": 2, "val/a": 1})
    (tmp_path / "val/a/000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"None of the 1 picture\(s\) of a batch can be read, .*val/a/000\.png"):
        list(ImageFolder(tmp_path, image_size=8, on_error="skip").val_dataloader())


def test_folders_laid_out_in_another_way_are_named(tmp_path):
    def fails(message: str, error: type[Exception] = FileNotFoundError, stage: str = "fit", **options) -> None:
        with pytest.raises(error, match=message):
            ImageFolder(tmp_path, **options).setup(stage)

    with pytest.raises(FileNotFoundError, match=r"root=.*nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere").setup("fit")
    write_folder(tmp_path, {"cat": 1})
    fails("has no folder train: root is the folder that holds train/<class>/<picture>")
    write_folder(tmp_path, {"train": 1})
    fails("train has no class folders: put each picture into the folder of its class")
    write_folder(tmp_path, {"train/cat": 2, "train/dog": 1})
    fails("has no folder val: .* or set val_fraction")
    write_folder(tmp_path, {"val/ape": 1})
    fails("val has class folders that .*train lacks: ape", ValueError)
    fails(r"val_fraction \(0.1\) divides .*val exists: leave val_fraction out", ValueError, val_fraction=0.1)
    (tmp_path / "train/dog/000.png").rename(tmp_path / "train/dog/000.txt")
    fails(r"train/dog holds no picture \(\.jpg", stage="predict", predict_split="train")


def test_impossible_arguments_are_refused(tmp_path):
    for arguments, message in (
        ({"image_size": 0}, "image_size is 0"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"predict_split": "test"}, "predict_split is 'test'"),
        ({"predict_split": "val", "predict_labels": 1}, r"predict_split \(val\) .* leave predict_labels out"),
        ({"predict_split": "val", "predict_images": tmp_path}, r"predict_split \(val\) .* leave predict_images out"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFolder(tmp_path, **arguments)
    data = build(L.LightningDataModule, {"class_path": "datamodules.ImageFolder", "init_args": {"root": str(tmp_path)}})
    assert (data.root, data.hparams["image_size"], data.hparams["root"]) == (tmp_path, 256, str(tmp_path))


def test_imagenet_has_its_thousand_classes_and_a_sorted_val(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "one.JPEG", format="JPEG")
    for number in range(1000):
        for split in ("train", "val"):
            folder = tmp_path / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            os.link(tmp_path / "one.JPEG", folder / f"{folder.name}_1.JPEG")
    data = ImageNet(tmp_path, image_size=4)
    data.setup("fit")
    data.setup("test")
    assert (data.num_classes, len(data.files("train")), data.files("test") is data.files("val")) == (1000, 1000, True)
    assert torch.equal(data.files("val").labels, torch.arange(1000))
    (tmp_path / "val").rename(tmp_path / "sorted")
    (tmp_path / "val").mkdir()
    os.link(tmp_path / "one.JPEG", tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match=r"no class folders.*torchvision\.datasets\.ImageNet\(.* sorts them"):
        ImageNet(tmp_path).setup("validate")
    (tmp_path / "train/n00000007").rename(tmp_path / "seventh")
    with pytest.raises(ValueError, match=r"ImageNet has 1000 class folders such as n01440764, and .*train has 999 of them"):
        ImageNet(tmp_path).setup("fit")
    (tmp_path / "seventh").rename(tmp_path / "train/cat")
    with pytest.raises(ValueError, match=r"train has others \(cat\): .* take ImageFolder"):
        ImageNet(tmp_path).setup("fit")
