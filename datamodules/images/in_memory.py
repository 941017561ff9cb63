"""Image data sets held in memory: Digits, MNIST, FashionMNIST, CIFAR10.

Batches are torchvision-shaped: images float (B, C, H, W) in [0, 1] and labels int64 (B,). Pixels are kept as uint8 and
divided by their largest value when a batch is made, all samples of it at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import TensorDataset, random_split
from torchvision.datasets.utils import download_and_extract_archive
from typing_extensions import override

from datamodules.assets.fetch import fetch
from datamodules.base.loader import ResumableLoader
from datamodules.images.mirrored_images import MirroredImages
from datamodules.images.official_files import cifar_folder, find_idx, read_cifar, read_idx
from datamodules.images.prediction import ImagePrediction

__all__ = [
    "CIFAR10",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "IdxImages",
    "ImageDataModule",
    "LabelledImages",
    "Splits",
    "stratified_split",
]

_SPLIT_SEED = 2024
"""Splits are the same for every run, whatever its seed: scores of several seeds are scores on the same pictures."""
_PUBLISHED_SPLIT_SEED = 2147483647


class LabelledImages(MirroredImages):
    """Images in memory, with labels.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        largest: The pixel value that stands for 1.0: 255, or 16 for the digits of scikit-learn.
        flip_seed: If given, each image is mirrored left to right in half of the epochs, as a pure function of
            (``flip_seed``, epoch, index).
    """

    def __init__(self, images: Tensor, labels: Tensor, largest: int = 255, flip_seed: int | None = None) -> None:
        self.images = images
        self.labels = labels
        self.largest = largest
        super().__init__(flip_seed)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: images float (B, C, H, W) in [0, 1] and labels (B,)."""
        images = self.images[indices].float().div_(self.largest)
        return self.mirrored(images, indices), self.labels[indices]


class Splits(NamedTuple):
    """The three parts of a data set, each images uint8 (N, C, H, W) and labels int64 (N,)."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def stratified_split(labels: Tensor, num_held_out: int) -> tuple[Tensor, Tensor]:
    """Divide samples into two parts with the same share of every class, always in the same way.

    Within a random order sorted by class, the held-out samples lie evenly spaced: each class gives its share to within
    one sample, and the parts have exactly the sizes asked for.

    Args:
        labels: int64 (N,).
        num_held_out: Size of the second part.

    Returns:
        Indices of the kept and of the held-out samples, each in increasing order.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    order = order[labels[order].argsort(stable=True)]
    places = ((torch.arange(num_held_out) + 0.5) * len(labels) / max(num_held_out, 1)).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[order[places]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


class ImageDataModule(ImagePrediction, ABC):
    """The base of image data held in memory; a subclass reads the splits.

    ``predict`` draws ``predict_samples`` samples, or works on the user's own pictures: see the arguments of
    `ImagePrediction`.

    Args:
        **kwargs: Arguments of `ImagePrediction` and `ZooDataModule`.
    """

    num_classes = 10
    feature_extractor: ClassVar[str]
    """Name of the extractor for feature distances (``zoo.metrics``)."""
    largest: ClassVar[int] = 255
    """The pixel value that stands for 1.0."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flip = False
        self._splits: Splits | None = None

    @property
    def num_levels(self) -> int:
        """Number of values that a pixel can have."""
        return self.largest + 1

    @abstractmethod
    def read(self) -> Splits:
        """Read the data set; called once, on first use."""

    @property
    def splits(self) -> Splits:
        """Training, validation and test set as uint8 images and labels."""
        if self._splits is None:
            self._splits = self.read()
        return self._splits

    def reference_images(self) -> Tensor:
        """Images to compare generated ones with: all real images but the test set's, so the official training set.

        Returns:
            uint8 (N, C, H, W), 255 for 1.0.
        """
        images = torch.cat([self.splits.train[0], self.splits.val[0]])
        return images if self.largest == 255 else images.float().mul(255 / self.largest).round().to(torch.uint8)

    @override
    def setup(self, stage: str) -> None:
        """Read the data of the stage.

        Raises:
            FileNotFoundError: Files of the data set, or the user's pictures or masks, are missing.
            ValueError: A file is damaged or does not fit.
        """
        super().setup(stage)
        if stage != "predict":
            _ = self.splits

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        flip_seed = self.data_seed if self.flip else None
        return self.train_loader(LabelledImages(*self.splits.train, self.largest, flip_seed))

    @override
    def val_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(LabelledImages(*self.splits.val, self.largest))

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(LabelledImages(*self.splits.test, self.largest))


class Digits(ImageDataModule):
    """Handwritten digits of scikit-learn: 1,797 real 8x8 pictures, fetched once (9 MB), at home on a CPU.

    Pixels are k/16, k = 0 ... 16. A fixed stratified split gives 1,437 for training, 180 each for validation and test.

    Its arguments are those of `ImagePrediction` and `ZooDataModule`.
    """

    image_shape = (1, 8, 8)
    feature_extractor = "fd_digits_mlp"
    largest = 16

    @override
    def prepare_data(self) -> None:
        """Fetch the asset ``digits``."""
        fetch("digits")

    def read(self) -> Splits:
        """Read and split the 1,797 digits."""
        images, labels = _read_csv(fetch("digits") / "digits.csv.gz", self.image_shape)
        return _three_splits(images, labels, num_val=180, num_test=180)


class IdxImages(ImageDataModule, ABC):
    """Data sets in the file format of MNIST: 60,000 and 10,000 grey 28x28 pictures of ten classes.

    Args:
        root: Folder with the official idx files, gzipped or not, or with torchvision's ``<class>/raw`` below it.
            ``None``: what a package registry carries.
        download: Whether torchvision downloads the official files into ``root`` if they are missing.
        val_fraction: Share of the training pictures held out for validation, by the split of the published Bayesian
            flow networks (which hold out 0.01). ``None``: 5,000 pictures, stratified.
        **kwargs: Arguments of `ImagePrediction` and `ZooDataModule`.

    Raises:
        ValueError: ``download`` without ``root``, or a fraction outside (0, 1).
    """

    image_shape = (1, 28, 28)
    asset: ClassVar[str]
    """Asset that is fetched if ``root`` is ``None``."""
    official: ClassVar[type[torchvision.datasets.MNIST]]
    """Torchvision's class, which downloads."""

    def __init__(
        self, root: Path | None = None, download: bool = False, val_fraction: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if download and root is None:
            raise ValueError("download: true needs root, the folder to download into.")
        _check_fraction(val_fraction)
        self.root = None if root is None else Path(root)
        self.download = download
        self.val_fraction = val_fraction

    @override
    def prepare_data(self) -> None:
        """Fetch or download the files if need be."""
        if self.root is None:
            fetch(self.asset)
        elif self.download:
            self.official(self.root, download=True)

    def read(self) -> Splits:
        """Read the official files and hold training pictures out for validation."""
        name = self.official.__name__
        folders = [fetch(self.asset)] if self.root is None else [self.root, self.root / name / "raw"]
        train, test = _read_idx_pair(name, folders, "train"), _read_idx_pair(name, folders, "t10k")
        return _official_splits(train, test, self.val_fraction)


class MNIST(IdxImages):
    """MNIST: the official files where you have them, else 5,000 real MNIST digits that a package carries (1.4 MB).

    The official 60,000 training pictures are divided into 55,000 for training and 5,000 for validation; those of the
    package into 4,000 for training, 500 for validation and 500 for test.
    """

    feature_extractor = "fd_mnist_cnn"
    asset = "mnist-5k"
    official = torchvision.datasets.MNIST

    def read(self) -> Splits:
        """Read and split the official files or the 5,000.

        Raises:
            ValueError: ``val_fraction`` without ``root``.
        """
        if self.root is not None:
            return super().read()
        if self.val_fraction is not None:
            raise ValueError("val_fraction divides the official files: set root, the folder that holds them, or leave it out.")
        images, labels = _read_csv(fetch(self.asset) / "mnist_5k.csv.gz", self.image_shape)
        return _three_splits(images, labels, num_val=500, num_test=500)


class FashionMNIST(IdxImages):
    """Fashion-MNIST: 70,000 pictures of clothes, from your folder or from Debian's package of the same files (31 MB).

    The 60,000 training pictures are divided into 55,000 for training and 5,000 for validation.
    """

    feature_extractor = "fd_fashion_cnn"
    asset = "fashion-mnist"
    official = torchvision.datasets.FashionMNIST


class CIFAR10(ImageDataModule):
    """CIFAR-10: 60,000 colour photographs, 32x32, of ten classes, from the official files.

    The 50,000 training pictures are divided into 45,000 for training and 5,000 for validation, stratified.

    Args:
        root: Folder that holds ``cifar-10-batches-bin`` (binary version) or ``cifar-10-batches-py`` (pickles, of which
            only containers and arrays are admitted), or is one of them.
        download: Whether the official binary archive (170 MB) is downloaded into ``root`` if it holds neither.
        flip: Whether training pictures are mirrored left to right in half of the epochs.
        val_fraction: Share of the training pictures held out for validation, by the split of the published Bayesian
            flow networks (which hold out 0.01). ``None``: 5,000 pictures, stratified.
        **kwargs: Arguments of `ImagePrediction` and `ZooDataModule`.

    Raises:
        ValueError: A fraction outside (0, 1).
    """

    image_shape = (3, 32, 32)
    feature_extractor = "inception-v3-compat"
    archive: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    archive_md5: ClassVar[str] = "c32a1d4ab5d03f1284b67883e8d87530"

    def __init__(
        self,
        root: Path,
        download: bool = False,
        flip: bool = False,
        val_fraction: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_fraction(val_fraction)
        self.root = Path(root)
        self.download = download
        self.flip = flip
        self.val_fraction = val_fraction

    @override
    def prepare_data(self) -> None:
        """Download and verify the official binary archive if need be."""
        if self.download and cifar_folder(self.root) is None:
            self.root.mkdir(parents=True, exist_ok=True)
            download_and_extract_archive(self.archive, str(self.root), md5=self.archive_md5)

    def read(self) -> Splits:
        """Read the official files and divide the training set."""
        folder = cifar_folder(self.root)
        if folder is None:
            raise FileNotFoundError(
                f"{self.root} holds no CIFAR-10: unpack the official cifar-10-binary.tar.gz there, or set download: true."
            )
        return _official_splits(read_cifar(folder, train=True), read_cifar(folder, train=False), self.val_fraction)


def _check_fraction(val_fraction: float | None) -> None:
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, and must lie between 0 and 1.")


def _read_csv(path: Path, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Rows of pixel values followed by the label."""
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, *image_shape).clone(), table[:, -1].long()


def _read_idx_pair(name: str, folders: list[Path], part: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """The images and labels of one part of an idx data set."""
    files = []
    for kind, dims in (("images", 3), ("labels", 1)):
        file = f"{part}-{kind}-idx{dims}-ubyte"
        path = find_idx(folders, file)
        if path is None:
            where = " or ".join(str(folder) for folder in folders)
            raise FileNotFoundError(
                f"{name}'s file {file} (or {file}.gz) is not in {where}: put it there, set download: true, or leave root out."
            )
        files.append((path, read_idx(path, dims)))
    (images_path, images), (labels_path, labels) = files
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds pictures {tuple(images.shape)} and {labels_path} {len(labels)} labels: they are not "
            f"{name}'s 28x28 pictures with one label each."
        )
    return images.unsqueeze(1), labels.long()


def _official_splits(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], val_fraction: float | None) -> Splits:
    """Hold out for validation a part of the 60,000 or 50,000 training pictures, never of the test set."""
    images, labels = train
    if val_fraction is None:
        kept, held_out = stratified_split(labels, min(5_000, len(labels) // 10))
    else:  # as in the published code of arXiv 2308.07037
        generator = torch.Generator().manual_seed(_PUBLISHED_SPLIT_SEED)
        parts = random_split(TensorDataset(labels), [1 - val_fraction, val_fraction], generator)
        kept, held_out = (torch.tensor(part.indices, dtype=torch.long) for part in parts)
    return Splits((images[kept], labels[kept]), (images[held_out], labels[held_out]), test)


def _three_splits(images: Tensor, labels: Tensor, num_val: int, num_test: int) -> Splits:
    rest, test = stratified_split(labels, num_test)
    train, val = stratified_split(labels[rest], num_val)
    train, val = rest[train], rest[val]
    return Splits((images[train], labels[train]), (images[val], labels[val]), (images[test], labels[test]))
