"""Base class of codecs, which turn batches into a flow's data and back."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from zoo.base.hyperparameters import Configurable
from zoo.base.random import SampleRandom
from zoo.base.samples import Samples, TextSamples

__all__ = ["Codec"]


class Codec(Configurable, ABC):
    """Writes batches as *levels*, whole numbers 0 ... K - 1 for each element, which any flow can take as its data.

    How many levels there are is decided by the head and the flow.
    """

    #: Shape of one sample's data: (H, W, C) or (L,).
    data_shape: tuple[int, ...]

    @abstractmethod
    def units(self) -> dict[str, float]:
        """Units in which likelihoods are reported: name -> how many of them one nat per element is."""

    @abstractmethod
    def check(self, num_levels: int) -> None:
        """Refuse a number of levels that the data cannot have.

        Raises:
            ValueError: saying what to change.
        """

    @abstractmethod
    def encode(self, batch: Any, num_levels: int, random: SampleRandom) -> Tensor:
        """Levels of a training or test batch, int64 (B, *data shape).

        Args:
            batch: as the DataModule gives it.
            num_levels: K.
            random: the batch's random numbers, for codecs that draw the levels.

        Raises:
            ValueError: the batch has another shape, or values outside its range.
        """

    @abstractmethod
    def known(self, batch: Any, num_levels: int) -> tuple[Tensor, Tensor] | None:
        """Elements given by the user's input: levels and a bool mask, both (B, *data shape); None without input."""

    @abstractmethod
    def samples(self, levels: Tensor, nfe: int, trajectory: Tensor | None, num_levels: int) -> Samples | TextSamples:
        """Levels as what the user gets.

        Args:
            levels: (B, *data shape); of continuous data they may lie between whole numbers, and outside 0 ... K - 1.
            nfe: network calls that they took.
            trajectory: levels on the way (B, T, *data shape).
            num_levels: K.
        """

    @abstractmethod
    def prediction(self, samples: Samples | TextSamples, batch: dict[str, Any]) -> dict[str, Any]:
        """Result of ``predict_step`` for samples, with the user's known elements put back as given."""
