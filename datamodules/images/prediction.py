"""Data of `predict` for images: sample numbers, or the user's own pictures; classes if chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.datamodule import ZooDataModule
from datamodules.base.loader import ResumableLoader
from datamodules.base.sample_indices import SampleIndices
from datamodules.images.user_images import read_masks, read_pictures

__all__ = ["ImagePrediction", "Pictures", "PredictBatch"]


class PredictBatch(TypedDict, total=False):
    """Batch of ``predict_step``; without the axis B, one sample of it.

    Attributes:
        index: int64 (B,), number of the sample over all processes; its random seed.
        label: int64 (B,), class of the sample; absent where none is chosen.
        image: float (B, C, H, W) in [0, 1], the user's picture; absent for unconditional samples.
        mask: bool (B, 1, H, W), true where a pixel is known; absent with ``image``.
        path: Names of the pictures' files; absent with ``image``.
    """

    index: Tensor
    label: Tensor
    image: Tensor
    mask: Tensor
    path: list[str] | str


class Pictures(Dataset[PredictBatch]):
    """The user's pictures: batches ``{"index", "image", "mask", "path"}``, and ``"label"`` where classes are chosen.

    Args:
        images: uint8 (N, C, H, W).
        masks: bool (N, 1, H, W), true where a pixel is known.
        paths: The pictures' files.
        labels: Classes of the pictures, cycled over their numbers. ``None``: none are chosen.
    """

    def __init__(self, images: Tensor, masks: Tensor, paths: list[Path], labels: Sequence[int] | None = None) -> None:
        self.numbers = SampleIndices(len(paths), labels)
        self.images = images
        self.masks = masks
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> PredictBatch:
        image = self.images[index].float().div_(255)
        return {**self.numbers[index], "image": image, "mask": self.masks[index], "path": self.paths[index]}  # type: ignore[typeddict-item]


class ImagePrediction(ZooDataModule, ABC):
    """The base of image data: what ``predict`` draws, or works on.

    Args:
        predict_samples: Number of samples that ``predict`` draws, numbered from 0; a sample's number is its seed.
        predict_images: A folder of the user's pictures (PNG, JPEG) for ``predict``, in-painting for example. They are
            all read before any sampling starts.
        predict_masks: A mask file for all of ``predict_images``, or a folder with one of the same name for each. White
            pixels are known, black ones are to be filled in. Without masks all pixels are known.
        predict_resize: Whether pictures and masks of another size than ``image_shape`` are resized; otherwise they are
            an error.
        predict_labels: The class of what ``predict`` draws, or a list of classes that is cycled over the sample numbers
            (of ``predict_images``, too: editing is filling in with a chosen class). ``None``: the model chooses. A model
            without classes takes no notice.
        **kwargs: Arguments of `ZooDataModule`.

    Raises:
        ValueError: ``predict_samples`` < 1, masks without pictures, or an empty list of labels.
    """

    image_shape: tuple[int, int, int]
    """Channels, height, width."""

    def __init__(
        self,
        predict_samples: int = 100,
        predict_images: Path | None = None,
        predict_masks: Path | None = None,
        predict_resize: bool = False,
        predict_labels: Sequence[int] | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if predict_samples < 1:
            raise ValueError(f"predict_samples is {predict_samples}, and must be at least 1.")
        if predict_masks is not None and predict_images is None:
            raise ValueError(f"predict_masks ({predict_masks}) needs predict_images: the folder of pictures they belong to.")
        self.predict_samples = predict_samples
        self.predict_images = None if predict_images is None else Path(predict_images)
        self.predict_masks = None if predict_masks is None else Path(predict_masks)
        self.predict_resize = predict_resize
        self.predict_labels = [predict_labels] if isinstance(predict_labels, int) else predict_labels
        if self.predict_labels is not None and not len(self.predict_labels):
            raise ValueError("predict_labels is an empty list: name at least one class, or leave it out.")
        self._predict_set: Dataset[Any] | None = None

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes; labels are 0 ... ``num_classes - 1``."""

    def check_predict_labels(self) -> None:
        """Make sure that the chosen classes exist; needs no data where ``predict_labels`` is ``None``.

        Raises:
            ValueError: One of them does not.
        """
        wrong = [label for label in self.predict_labels or () if not 0 <= label < self.num_classes]
        if wrong:
            raise ValueError(
                f"predict_labels holds {', '.join(map(str, wrong[:5]))}{', ...' * (len(wrong) > 5)}, and the classes of "
                f"{type(self).__name__} are 0 to {self.num_classes - 1}."
            )

    def read_predict_set(self) -> Dataset[Any]:
        """Data of ``predict``, with all of the user's pictures read.

        Raises:
            FileNotFoundError: The user's pictures or masks are missing.
            ValueError: One of them is damaged or does not fit, or ``predict_labels`` names a class that does not exist.
        """
        self.check_predict_labels()
        if self.predict_images is None:
            return SampleIndices(self.predict_samples, self.predict_labels)
        images, paths = read_pictures(self.predict_images, self.image_shape, self.predict_resize)
        if self.predict_masks is None:
            masks = torch.ones(len(images), 1, *self.image_shape[1:], dtype=torch.bool)
        else:
            masks = read_masks(self.predict_masks, paths, self.image_shape, self.predict_resize)
        return Pictures(images, masks, paths, self.predict_labels)

    @override
    def setup(self, stage: str) -> None:
        """Read the data of ``predict``; a subclass does the rest."""
        if stage == "predict":
            self._predict_set = self.read_predict_set()

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of sample numbers, or of the user's pictures."""
        return self.eval_loader(self._predict_set or self.read_predict_set())
