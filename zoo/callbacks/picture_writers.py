"""Predicted images as pictures: a grid, single files, and the way from noise to sample as a strip and an animation.

Shape suffixes: B samples, T time steps, C channels, H height, W width.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, PngImagePlugin
from torch import Tensor

from zoo.base.samples import to_uint8
from zoo.callbacks.picture import as_picture, evenly_spaced, picture_grid
from zoo.callbacks.rank_merge import RankMergingWriter


class FirstSamplesWriter(RankMergingWriter):
    """Base of the writers that draw the samples with the lowest ids into one picture.

    Args:
        filename: Name of the picture.
        num_samples: Number of samples in it.
        entry: Entry of the prediction that holds their pixels, floating point in [0, 1].

    Raises:
        ValueError: If `num_samples` is less than 1.
    """

    def __init__(self, filename: str, num_samples: int, entry: str) -> None:
        super().__init__(filename)
        if num_samples < 1:
            raise ValueError(f"{type(self).__name__}: the number of samples must be at least 1, got {num_samples}.")
        self.num_samples = num_samples
        self.entry = entry
        self._pixels: dict[int, Tensor] = {}

    def open(self, trainer: Trainer) -> None:
        """Begin with no samples."""
        self._pixels = {}

    def pixels(self, pl_module: LightningModule, prediction: Mapping[str, Any]) -> Tensor:
        """The pixels (B, ...) of a batch of predictions, uint8 on the CPU.

        Raises:
            ValueError: If the prediction does not hold them, or not one for each sample id.
        """
        pixels = prediction.get(self.entry)
        if not isinstance(pixels, Tensor) or len(pixels) != len(prediction["index"]):
            raise ValueError(
                f'{type(self).__name__} wants predict_step of {type(pl_module).__name__} to return "{self.entry}", '
                f"one for each sample id, got {sorted(prediction)}: switch it on in the module (an option such as "
                "--model.record_trajectory true), or drop this writer."
            )
        return to_uint8(pixels).cpu()

    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        """Keep the samples with the lowest ids so far."""
        new = dict(zip(prediction["index"].tolist(), self.pixels(pl_module, prediction), strict=True))
        lowest = sorted({*self._pixels, *new})[: self.num_samples]
        # Copies: what is a view of the batch would keep the whole batch.
        self._pixels = {index: new[index].clone() if index in new else self._pixels[index] for index in lowest}

    def close(self, trainer: Trainer) -> None:
        """Write the samples of this rank.

        Raises:
            ValueError: If they differ in size.
        """
        if len({pixels.shape for pixels in self._pixels.values()}) > 1:
            raise ValueError(f"{type(self).__name__}: all images of one picture must have the same size.")
        with self.part(trainer, trainer.global_rank).open("wb") as file:
            np.savez(
                file,
                index=np.array(list(self._pixels), dtype=np.int64),
                pixels=torch.stack(list(self._pixels.values())).numpy() if self._pixels else np.empty(0, np.uint8),
                **self.remarks(),
            )
        self._pixels = {}

    def remarks(self) -> dict[str, Any]:
        """Further arrays of this rank for rank 0."""
        return {}

    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        """Collect the lowest sample ids of all ranks and draw them.

        Raises:
            ValueError: If nothing was predicted.
        """
        found: dict[int, Tensor] = {}
        for part in parts:
            with np.load(part) as arrays:
                found.update(zip(arrays["index"].tolist(), torch.from_numpy(arrays["pixels"]), strict=True))
        if not found:
            raise ValueError(f"{type(self).__name__}: nothing was predicted, so there is nothing to draw.")
        index = sorted(found)[: self.num_samples]
        return self.draw(self.folder(trainer), index, torch.stack([found[i] for i in index]))

    @abstractmethod
    def draw(self, folder: Path, index: list[int], pixels: Tensor) -> list[Path]:
        """Write the picture of some samples, given in the order of their ids; returns the paths."""


class ImageGridWriter(FirstSamplesWriter):
    """Draws the predicted images into `predictions/<filename>`, row by row in the order of the sample ids.

    Each row is labelled with the id of its first image; the PNG's text entry "index" lists all of them. Predictions
    that carry a `path` (the user's own images) are also written singly, to `predictions/images` under the same file
    names, as PNG. All PNG files that are there from the run before are removed first.

    Args:
        filename: Name of the picture.
        num_images: Number of images in the grid.
        columns: Columns of the grid.
        scale: Factor by which each pixel is enlarged; None for about 64 pixels per image.
        single_files: Write every predicted image (not only those of the grid) as a PNG of its own, as
            `predictions/images/<sample id>.png`; there may be any number of them (`zoo.metrics.folder_distances`
            measures them).

    Raises:
        ValueError: If a count is less than 1.
    """

    def __init__(
        self,
        filename: str = "grid.png",
        num_images: int = 100,
        columns: int = 10,
        scale: int | None = None,
        single_files: bool = False,
    ) -> None:
        super().__init__(filename, num_images, "images")
        if columns < 1 or (scale is not None and scale < 1):
            raise ValueError(f"ImageGridWriter: columns and scale must be at least 1, got {columns} and {scale}.")
        self.columns = columns
        self.scale = scale
        self.single_files = single_files
        self._written: dict[str, int] = {}
        self._single = False

    def clear(self, trainer: Trainer) -> None:
        """Remove parts, and the single files of the run before."""
        super().clear(trainer)
        images = self.folder(trainer) / "images"
        for earlier in images.glob("*.png"):
            earlier.unlink()
        if images.is_dir() and not any(images.iterdir()):
            images.rmdir()

    def open(self, trainer: Trainer) -> None:
        """Begin with no samples."""
        super().open(trainer)
        self._written = {}
        self._single = False

    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        """Keep images for the grid, and write the single files.

        Raises:
            ValueError: If two different inputs would be written to the same file.
        """
        super().add(trainer, pl_module, prediction)
        paths: list[str] | None = prediction.get("path")
        if paths is None and not self.single_files:
            return
        images = self.folder(trainer) / "images"
        images.mkdir(parents=True, exist_ok=True)
        self._single = True
        for row, (index, image_CHW) in enumerate(
            zip(prediction["index"].tolist(), self.pixels(pl_module, prediction), strict=True)
        ):
            if paths is None:  # ids are their own names, of which none need be kept
                name = f"{index:06d}.png"
            else:
                name = _file_name(paths[row])
                _claim(self._written, name, index)
            as_picture(image_CHW).save(images / name)

    def remarks(self) -> dict[str, Any]:
        """Whether this rank wrote single files, and the names of those that the user named."""
        return {
            "single": np.array(self._single),
            "name": np.array(list(self._written), dtype=np.str_),
            "name_index": np.array(list(self._written.values())),
        }

    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        """Make sure that no two ranks wrote the same single file, and draw the grid.

        Raises:
            ValueError: If two different inputs were written to the same file.
        """
        written: dict[str, int] = {}
        single = False
        for part in parts:
            with np.load(part) as arrays:
                single = single or bool(arrays["single"])
                for name, index in zip(arrays["name"].tolist(), arrays["name_index"].tolist(), strict=True):
                    _claim(written, name, index)
        paths = super().merge(trainer, parts)
        return [*paths, self.folder(trainer) / "images"] if single else paths

    def draw(self, folder: Path, index: list[int], pixels: Tensor) -> list[Path]:
        """Write the grid."""
        text = PngImagePlugin.PngInfo()
        text.add_text("index", " ".join(map(str, index)))
        labels = [str(first) for first in index[:: self.columns]]
        path = folder / self.filename
        picture_grid(pixels, self.columns, scale=self.scale, row_labels=labels).save(path, pnginfo=text)
        return [path]


class TrajectoryWriter(FirstSamplesWriter):
    """Draws the way from noise to sample: `predictions/<filename>`, one row per sample, and an animation beside it.

    The animation (`.gif`, the samples side by side) shows every time step and rests on the last one. Grey values are
    exact in both; a GIF of colour images is reduced to 256 colours.

    Args:
        filename: Name of the strip, a `.png`; the animation takes the same name with `.gif`.
        num_samples: Number of samples.
        num_frames: Largest number of time steps in the strip, spread evenly, first and last among them.
        frame_milliseconds: Duration of a frame of the animation; its last frame lasts one second more.
        scale: Factor by which each pixel is enlarged; None for about 64 pixels per image.

    Raises:
        ValueError: If `filename` is no `.png`, or a number is less than 1.
    """

    def __init__(
        self,
        filename: str = "trajectory.png",
        num_samples: int = 8,
        num_frames: int = 12,
        frame_milliseconds: int = 100,
        scale: int | None = None,
    ) -> None:
        super().__init__(filename, num_samples, "trajectory")
        if Path(filename).suffix != ".png":
            raise ValueError(f"TrajectoryWriter: filename={filename!r} must end in .png; the .gif is written beside it.")
        if num_frames < 1 or frame_milliseconds < 1 or (scale is not None and scale < 1):
            raise ValueError(
                "TrajectoryWriter: num_frames, frame_milliseconds and scale must be at least 1, "
                f"got {num_frames}, {frame_milliseconds} and {scale}."
            )
        self.num_frames = num_frames
        self.frame_milliseconds = frame_milliseconds
        self.scale = scale

    def draw(self, folder: Path, index: list[int], pixels: Tensor) -> list[Path]:
        """Write strip and animation."""
        path = folder / self.filename
        steps = evenly_spaced(pixels.shape[1], self.num_frames)
        strip_BTCHW = pixels[:, steps]
        labels = [str(i) for i in index]
        picture_grid(strip_BTCHW.flatten(0, 1), len(steps), scale=self.scale, row_labels=labels).save(path)
        frames: list[Image.Image] = [picture_grid(image_BCHW, len(index), scale=self.scale) for image_BCHW in pixels.unbind(1)]
        durations = [self.frame_milliseconds] * (len(frames) - 1) + [self.frame_milliseconds + 1000]
        animation = path.with_suffix(".gif")
        frames[0].save(animation, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)
        return [path, animation]


def _file_name(path: str) -> str:
    """The file name of an input image, as PNG."""
    return Path(path).with_suffix(".png").name


def _claim(written: dict[str, int], name: str, index: int) -> None:
    """Note that a sample takes a file name, unless another one has it."""
    if written.setdefault(name, index) != index:
        raise ValueError(
            f"ImageGridWriter: samples {written[name]} and {index} would both be written to images/{name}: "
            "give the input images different names."
        )
