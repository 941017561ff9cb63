"""Interface of a generating module for callbacks and metrics: samples by id, as 8-bit pixels or texts.

Shape suffixes: B samples, C channels, H height, W width, T time steps of a trajectory.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """A batch of generated images.

    Attributes:
        images: (B, C, H, W), floating point in [0, 1].
        nfe: Number of network function evaluations that each sample cost.
        trajectory: (B, T, C, H, W) in [0, 1], the intermediate states from noise to sample; None if not kept.
    """

    images: Tensor
    nfe: int
    trajectory: Tensor | None = None


@dataclass(frozen=True)
class TextSamples:
    """A batch of generated texts.

    Attributes:
        texts: The text of each sample.
        nfe: Number of network function evaluations that each sample cost.
        trajectory: The intermediate texts of each sample, from noise to sample; None if not kept.
    """

    texts: list[str]
    nfe: int
    trajectory: list[list[str]] | None = None


@runtime_checkable
class SupportsSampling(Protocol):
    """A module from which images or texts can be drawn by sample id.

    Sample `i` under `seed` is the same whatever the batch, the rank or the number of ranks that draws it.
    """

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """The samplers that `sample` accepts by name."""

    def sample(
        self, index_B: Tensor, *, seed: int = 0, sampler: str | None = None, nfe: int | None = None
    ) -> Samples | TextSamples:
        """Draw one image or text per sample id.

        Args:
            index_B: (B,) int64, the global sample ids; with `seed` they are the whole random state.
            seed: Seed of the run.
            sampler: One of `sampler_names`; None for the module's own.
            nfe: Network function evaluations to spend per sample; None for the module's own number.
        """


@runtime_checkable
class ChecksSampling(Protocol):
    """Optional check beside `SupportsSampling`, by which callbacks find mistakes before the run starts."""

    @property
    def sample_type(self) -> type[Samples] | type[TextSamples]:
        """Whether `sample` gives images or texts."""

    def check_sampler(self, sampler: str | None = None, nfe: int | None = None) -> None:
        """Make sure that `sample` can draw so.

        Args:
            sampler: As for `sample`.
            nfe: As for `sample`.

        Raises:
            ValueError: If it cannot, as with fewer evaluations than the sampler needs.
        """


@runtime_checkable
class LabelsSamples(Protocol):
    """Optional interface beside `SupportsSampling` for samples that are meant to show classes."""

    def sample_labels(self, index_B: Tensor) -> Tensor | None:
        """The class that each sample is meant to show, as `sample` draws it by itself.

        A pure function of the sample ids, whatever the seed, the batch or the rank; cheap, without communication.

        Args:
            index_B: (B,) int64, the global sample ids.

        Returns:
            (B,) int64; None if the module, as it is configured, draws without classes.
        """


def labels_of_samples(module: object, index_B: Tensor) -> Tensor | None:
    """The classes that samples are meant to show; None where a module's samples have none.

    Args:
        module: A module; its `sample_labels`, if it has one, knows.
        index_B: (B,) int64, the global sample ids.

    Raises:
        ValueError: If the module does not give one whole number for each sample.
    """
    label_B = module.sample_labels(index_B) if isinstance(module, LabelsSamples) else None
    if label_B is not None and (label_B.shape != index_B.shape or label_B.is_floating_point()):
        raise ValueError(
            f"{type(module).__name__}.sample_labels must give int64 of shape {tuple(index_B.shape)}, one for each sample id, "
            f"got {label_B.dtype} of shape {tuple(label_B.shape)}."
        )
    return label_B


def as_sampled(module: object, images: Tensor) -> Tensor:
    """Real images in the form that a module's samples have, so that a distance between them measures the model alone.

    Args:
        module: a module; its method ``quantize``, if it has one, gives the images the levels of its samples.
        images: uint8 (N, C, H, W).
    """
    quantize = getattr(module, "quantize", None)
    return images if quantize is None else quantize(images)


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits, to the nearest level: the pixels a PNG holds and every metric sees.

    Args:
        images: (..., C, H, W), floating point in [0, 1].

    Returns:
        uint8 tensor of the same shape on the same device, `round(255 * images)`.

    Raises:
        TypeError: If `images` is not floating point.
        ValueError: If a value is not finite or falls outside 0..255 after rounding (nothing is clipped in silence).

    Example:
        >>> to_uint8(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [0, 128, 255]
    """
    if not images.is_floating_point():
        raise TypeError(f"to_uint8 wants floating point images in [0, 1], got {images.dtype}; pass uint8 images as is.")
    level = images.float().mul(255).round()
    if not bool(((level >= 0) & (level <= 255)).all()):  # also False for NaN
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"Images must lie in [0, 1] and be finite, got values from {low:.4g} to {high:.4g}; clamp them where they are made."
        )
    return level.to(torch.uint8)
