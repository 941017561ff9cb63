"""Language data that are read whole, of which a part is held out."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.loader import ResumableLoader
from datamodules.text.language_data import LanguageData

__all__ = ["SplitData"]


class SplitData(LanguageData):
    """The base of language data whose samples are in memory, for training and for validation.

    Args:
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.
    """

    #: Name of a sample, for messages.
    sample_name: ClassVar[str] = "sample"

    @property
    @abstractmethod
    def source(self) -> str:
        """Origin of the samples."""

    @property
    @abstractmethod
    def splits(self) -> tuple[list[Any], list[Any]]:
        """The samples for training and for validation."""

    @abstractmethod
    def batches(self, samples: list[Any], training: bool = False) -> Dataset[Any]:
        """Samples as a data set that makes whole batches.

        Args:
            samples: At least one.
            training: Whether they are those of training.
        """

    @property
    def marks_retries(self) -> bool:
        """Whether training batches tell which samples had been put back."""
        return True

    @override
    def setup(self, stage: str) -> None:
        """Read the samples, or the prompts."""
        super().setup(stage)
        if stage != "predict":
            _ = self.splits

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        if not self.splits[0]:
            raise ValueError(f"No {self.sample_name} of {self.source} is left to train on: lower val_fraction.")
        return self.train_loader(self.batches(self.splits[0], training=True), mark_retries=self.marks_retries)

    @override
    def val_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        return self.eval_loader(self.batches(self.splits[1])) if self.splits[1] else []

    @override
    def test_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """The validation batches; no third part is held out."""
        return self.val_dataloader()
