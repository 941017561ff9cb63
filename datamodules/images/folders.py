"""Folders of pictures, one folder for each class: ImageFolder, ImageNet.

Batches are torchvision-shaped: images float (B, 3, H, W) in [0, 1] and labels int64 (B,). Pictures are read from their
files when a batch is made.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.loader import ResumableLoader
from datamodules.images.in_memory import stratified_split
from datamodules.images.labelled_files import LabelledFiles
from datamodules.images.mirrored_images import MirroredImages
from datamodules.images.prediction import ImagePrediction

__all__ = ["FolderImages", "FolderPictures", "ImageFolder", "ImageNet"]

_MOST_REFERENCE_BYTES = 2**31

_logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
Split = Literal["train", "val", "test"]


class FolderImages(MirroredImages):
    """Pictures on disk, with labels.

    Args:
        files: The pictures' files.
        image_size: Height and width of the images.
        on_error: Treatment of a picture that cannot be read: raise, or make a smaller batch.
        flip_seed: If given, each image is mirrored left to right in half of the epochs, as a pure function of
            (``flip_seed``, epoch, index).
    """

    def __init__(self, files: LabelledFiles, image_size: int, on_error: OnError = "raise", flip_seed: int | None = None) -> None:
        self.files = files
        self.image_size = image_size
        self.on_error = on_error
        super().__init__(flip_seed)

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: images float (B, 3, H, W) in [0, 1] and labels (B,)."""
        kept, pixels = self.files.read(indices, self.image_size, self.on_error)
        return self.mirrored(pixels.float().div_(255), kept), self.files.labels[kept]


class FolderPictures(Dataset[dict[str, Any]]):
    """Pictures on disk for ``predict``: batches ``{"index", "image", "label", "path"}``.

    Args:
        files: The pictures' files.
        image_size: Height and width of the images.
        on_error: Treatment of a picture that cannot be read: raise, or make a smaller batch.
    """

    def __init__(self, files: LabelledFiles, image_size: int, on_error: OnError = "raise") -> None:
        self.files = files
        self.image_size = image_size
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.batch([index]).items()}

    def batch(self, indices: list[int]) -> dict[str, Any]:
        """A whole batch: index and label int64 (B,), image float (B, 3, H, W) in [0, 1], path a list of B names."""
        kept, pixels = self.files.read(indices, self.image_size, self.on_error)
        paths = [self.files.path(index) for index in kept]
        return {"index": torch.tensor(kept), "image": pixels.float().div_(255), "label": self.files.labels[kept], "path": paths}


class ImageFolder(ImagePrediction):
    """Your own pictures, one folder for each class: ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

    Classes are the folders of ``train`` in alphabetical order. Pictures of any size become ``image_size`` x
    ``image_size`` RGB by the centre crop of ADM (`datamodules.images.center_crop`). ``test`` reads ``root/test`` where it
    exists, else the validation pictures.

    Args:
        root: The folder that holds ``train``.
        image_size: Height and width of the images.
        flip: Whether training pictures are mirrored left to right in half of the epochs.
        val_fraction: Share of the training pictures held out for validation, the same of every class, where ``root``
            has no ``val``.
        on_error: Treatment of a picture that cannot be read: ``raise``, or ``skip``: leave it out of its batch, name
            the first few, and report the number at the end.
        predict_split: Let ``predict`` run over this split, in order and not mirrored, instead of drawing samples; to
            store latents, for example.
        **kwargs: Arguments of `ImagePrediction` and `ZooDataModule`.

    Raises:
        ValueError: A size or fraction out of range, or ``predict_split`` together with other choices of what to predict.
    """

    feature_extractor: ClassVar[str] = "inception-v3-compat"
    """Name of the extractor for feature distances (``zoo.metrics``)."""
    num_levels: ClassVar[int] = 256
    """Number of values that a pixel can have."""

    def __init__(
        self,
        root: Path,
        image_size: int = 256,
        flip: bool = True,
        val_fraction: float | None = None,
        on_error: OnError = "raise",
        predict_split: Literal["train", "val"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}, and must be at least 1.")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}, and must lie between 0 and 1.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}, and must be raise or skip.")
        if predict_split not in (None, "train", "val"):
            raise ValueError(f"predict_split is {predict_split!r}, and must be train, val or left out.")
        if predict_split is not None and (self.predict_images is not None or self.predict_labels is not None):
            other = "predict_images" if self.predict_images is not None else "predict_labels"
            raise ValueError(f"predict_split ({predict_split}) has pictures and labels of its own: leave {other} out.")
        self.root = Path(root)
        self.image_size = image_size
        self.image_shape = (3, image_size, image_size)
        self.flip = flip
        self.val_fraction = val_fraction
        self.on_error = on_error
        self.predict_split = predict_split
        self._classes: list[str] | None = None
        self._files: dict[Split, LabelledFiles] = {}

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels: the folders of ``train``, or of ``val`` where that is all.

        Raises:
            FileNotFoundError: There are no class folders.
            ValueError: They are not those of the data set.
        """
        if self._classes is None:
            folder = next((self.root / name for name in ("train", "val") if (self.root / name).is_dir()), self.root / "train")
            self._classes = self._class_folders(folder)
        return self._classes

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 ... ``num_classes - 1``."""
        return len(self.classes)

    def files(self, split: Split) -> LabelledFiles:
        """The pictures of a split; listed once.

        Raises:
            FileNotFoundError: A folder is missing, or a class folder is empty.
            ValueError: The class folders do not fit, or ``val_fraction`` is given although there is a ``val``.
        """
        if split not in self._files:
            if split == "val" or (split == "train" and self.val_fraction is not None):
                self._list_train_and_val(split)
            elif split == "test":
                self._files["test"] = self._find("test") if (self.root / "test").is_dir() else self.files("val")
            else:
                self._files["train"] = self._find("train")
        return self._files[split]

    def reference_images(self) -> Tensor:
        """Images to compare generated ones with: all pictures of ``train``, not mirrored.

        Returns:
            uint8 (N, 3, H, W).

        Raises:
            TypeError: They do not fit into memory (2 GiB).
        """
        parts = [self.files("train")] + ([self.files("val")] if self.val_fraction is not None else [])
        size = sum(map(len, parts)) * 3 * self.image_size**2
        if size > _MOST_REFERENCE_BYTES:
            raise TypeError(
                f"The {sum(map(len, parts))} training pictures of {self.root} are {size / 1e9:.1f} GB at {self.image_size}x"
                f"{self.image_size}, too many to compare samples with in memory: compare with a file of their statistics "
                "(mean and covariance of the features), or take a smaller image_size."
            )
        return torch.cat([part.read(list(range(len(part))), self.image_size, self.on_error)[1] for part in parts])

    def read_predict_set(self) -> Dataset[Any]:
        """Data of ``predict``: a split, or those of `ImagePrediction`.

        Raises:
            FileNotFoundError: Pictures or masks are missing.
            ValueError: One of the user's pictures is damaged or does not fit, or ``predict_labels`` names a class that
                does not exist.
        """
        if self.predict_split is None:
            return super().read_predict_set()
        return FolderPictures(self.files(self.predict_split), self.image_size, self.on_error)

    @override
    def setup(self, stage: str) -> None:
        """List the pictures that the stage needs.

        Raises:
            FileNotFoundError: A folder is missing, or a class folder is empty.
            ValueError: The class folders do not fit.
        """
        super().setup(stage)
        splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.files(split)

    @override
    def teardown(self, stage: str) -> None:
        """Report the pictures that were left out."""
        for files in {id(files): files for files in self._files.values()}.values():
            if (report := files.skipped()) is not None:
                _logger.warning(report)

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        flip_seed = self.data_seed if self.flip else None
        return self.train_loader(FolderImages(self.files("train"), self.image_size, self.on_error, flip_seed))

    @override
    def val_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(FolderImages(self.files("val"), self.image_size, self.on_error))

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(FolderImages(self.files("test"), self.image_size, self.on_error))

    def _list_train_and_val(self, split: Split) -> None:
        has_val = (self.root / "val").is_dir()
        if has_val and self.val_fraction is not None:
            raise ValueError(
                f"val_fraction ({self.val_fraction}) divides the training pictures where there is no val folder, but "
                f"{self.root / 'val'} exists: leave val_fraction out."
            )
        if has_val:
            self._files[split] = self._find(split)
        elif self.val_fraction is None:
            self._check_layout(self.root / "train")
            raise FileNotFoundError(
                f"{self.root} has no folder val: put the validation pictures into {self.root / 'val'}/<class>, or set "
                "val_fraction to hold out a share of the training pictures."
            )
        else:
            everything = self._find("train")
            num_held_out = max(1, round(self.val_fraction * len(everything)))
            kept, held_out = stratified_split(everything.labels, num_held_out)
            self._files["train"], self._files["val"] = everything.subset(kept), everything.subset(held_out)

    def _find(self, split: Split) -> LabelledFiles:
        folder = self.root / split
        found = self._class_folders(folder)
        if unknown := sorted({*found} - {*self.classes}):
            raise ValueError(
                f"{folder} has class folders that {self.root / 'train'} lacks: {', '.join(unknown[:5])}"
                f"{', ...' * (len(unknown) > 5)}."
            )
        return LabelledFiles.find(folder, self.classes, found)

    def _class_folders(self, folder: Path) -> list[str]:
        self._check_layout(folder)
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not found:
            raise FileNotFoundError(
                f"{folder} has no class folders: put each picture into the folder of its class, {folder}/<class>."
                f"{self._how_to_lay_out()}"
            )
        self._check_classes(found, folder)
        return found

    def _check_layout(self, folder: Path) -> None:
        if not folder.is_dir():
            if not self.root.is_dir():
                raise FileNotFoundError(f"The folder root={self.root} does not exist.")
            raise FileNotFoundError(
                f"root={self.root} has no folder {folder.name}: root is the folder that holds train/<class>/<picture> and "
                f"val/<class>/<picture>."
            )

    def _how_to_lay_out(self) -> str:
        """Advice for folders without class folders; a subclass that knows its files extends it."""
        return ""

    def _check_classes(self, found: list[str], folder: Path) -> None:
        """Make sure that the class folders of a split are those of the data set; a subclass that knows them does more."""


class ImageNet(ImageFolder):
    """ImageNet-1k: 1,281,167 photographs of 1,000 classes, from ``root/train/<wnid>`` and ``root/val/<wnid>``.

    Labels are the usual ones, the alphabetical order of the WordNet ids (``n01440764`` is 0). Its 50,000 validation
    pictures also serve for ``test``, since the official test pictures have no labels.

    Its arguments are those of `ImageFolder`, `ImagePrediction` and `ZooDataModule`. To draw samples of a trained model,
    the files need not be there.
    """

    num_classes = 1000

    def files(self, split: Split) -> LabelledFiles:
        """The pictures of a split, ``test`` being those of ``val``; listed once.

        Raises:
            FileNotFoundError: A folder is missing, or a class folder is empty.
            ValueError: There are others than the 1,000 class folders, or ``val_fraction`` is given although there is a
                ``val``.
        """
        return super().files("val" if split == "test" else split)

    def _check_classes(self, found: list[str], folder: Path) -> None:
        foreign = [name for name in found if not re.fullmatch(r"n\d{8}", name)]
        if foreign or len(found) != self.num_classes:
            what = f"others ({', '.join(foreign[:5])})" if foreign else f"{len(found)} of them"
            raise ValueError(
                f"ImageNet has {self.num_classes} class folders such as n01440764, and {folder} has {what}: complete them, or "
                "take ImageFolder for other classes and for a part of ImageNet's."
            )

    def _how_to_lay_out(self) -> str:
        return (
            " The archive ILSVRC2012_img_val.tar holds the validation pictures in one heap: "
            f'`torchvision.datasets.ImageNet("{self.root}", split="val")` sorts them into folders, if that archive and '
            "ILSVRC2012_devkit_t12.tar.gz lie in root."
        )
