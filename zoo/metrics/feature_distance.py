"""Distance between the features of generated and real images: Fréchet and kernel distance, and inception score.

With Inception features these are the FID (Heusel et al., arXiv 1706.08500), the KID (Bińkowski et al., arXiv
1801.01401) and the IS (Salimans et al., arXiv 1606.03498). With another extractor they are the same formulas of other
features, so a figure means something only beside its extractor, its sample count and its real-data floor; the functions
here always give the three together. All statistics are float64; torch-fidelity computes them.

Shape suffixes: N images, C channels, H height, W width.
"""

import dataclasses
import functools
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo.metrics.extractors import registered_name

NUM_SAMPLES = 2000
"""The usual sample count with the zoo's shipped extractors; the Fréchet distance falls with the count, so state another."""

NUM_INCEPTION_SAMPLES = 10_000
"""The sample count of Inception FID here, as in the BFN-Solver paper's released commands (not the 50,000 of others)."""


@dataclass(frozen=True)
class FeatureDistances:
    """Distances of generated from real images, and what they were computed with.

    Attributes:
        extractor: Name of the feature extractor.
        num_samples: Number of generated images.
        num_reference: Number of real images; None if only their statistics were at hand, and these did not say.
        frechet_distance: Squared 2-Wasserstein distance of Gaussian fits to the features; FID with Inception.
        kernel_distance: Unbiased squared MMD with kernel (x.y / D + 1)^3, mean over random subsets; KID with Inception.
            None if only statistics of the real images were at hand.
        kernel_distance_std: Standard deviation of the kernel distance over the subsets; None as above.
        inception_score: exp of the mean KL from a generated image's class probabilities to their mean, over 10 splits.
            None if the extractor has no logits.
        inception_score_std: Standard deviation of the inception score over the splits; None as above.
    """

    extractor: str
    num_samples: int
    num_reference: int | None
    frechet_distance: float
    kernel_distance: float | None
    kernel_distance_std: float | None
    inception_score: float | None
    inception_score_std: float | None


def feature_distances(
    samples: Tensor,
    reference: Tensor,
    extractor: str,
    *,
    weights_path: str | Path | None = None,
    batch_size: int = 256,
    kid_subset_size: int = 500,
    kid_subsets: int = 100,
) -> FeatureDistances:
    """Fréchet distance, kernel distance and inception score of generated images.

    The features of the reference are kept for the life of the process, by content.

    Args:
        samples: (N, C, H, W) uint8, the generated images; on CUDA the features are computed there.
        reference: (M, C, H, W) uint8, the real images.
        extractor: A shipped extractor (`fd_digits_mlp`, `fd_mnist_cnn`, `fd_fashion_cnn`), `feature-classifier` with a
            folder, `inception-v3-compat`, or one that you registered with torch-fidelity.
        weights_path: Inception's weights file, or the folder of your own `FeatureClassifier`.
        batch_size: Images per pass through the extractor.
        kid_subset_size: Images per random subset of the kernel distance.
        kid_subsets: Number of subsets of the kernel distance.

    Returns:
        The distances; see `real_data_floor` for what to hold them against.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If the images differ in shape, are fewer than a subset, or the extractor or its weights are unknown.
        ConnectionError: If Inception's weights must be downloaded and cannot be.
    """
    name = registered_name(extractor)
    for argument, images in (("samples", samples), ("reference", reference)):
        if images.dtype != torch.uint8:
            raise TypeError(f"`{argument}` must be uint8 images, got {images.dtype}; round them with zoo.base.samples.to_uint8.")
        if images.ndim != 4 or images.shape[1:] != reference.shape[1:]:
            raise ValueError(
                f"`{argument}` must have shape (N, C, H, W) and the reference's C, H, W, got {tuple(images.shape)} "
                f"against a reference of {tuple(reference.shape)}."
            )
        if len(images) < kid_subset_size:
            raise ValueError(
                f"`{argument}` holds {len(images)} images, fewer than kid_subset_size={kid_subset_size}: "
                "draw more, or pass a smaller subset."
            )
    scores = calculate_metrics(
        input1=_Images(samples),
        input2=_Images(reference),
        input2_cache_name=_content_key(reference, name, weights_path),
        cache_root=_process_cache(),
        feature_extractor=name,
        feature_extractor_weights_path=str(weights_path) if weights_path else None,
        fid=True,
        kid=True,
        isc=True,
        kid_subset_size=kid_subset_size,
        kid_subsets=kid_subsets,
        batch_size=batch_size,
        cuda=samples.is_cuda,
        save_cpu_ram=True,  # no worker processes: the images are in memory already
        verbose=False,
    )
    return FeatureDistances(
        extractor=extractor,
        num_samples=len(samples),
        num_reference=len(reference),
        frechet_distance=scores["frechet_inception_distance"],
        kernel_distance=scores["kernel_inception_distance_mean"],
        kernel_distance_std=scores["kernel_inception_distance_std"],
        inception_score=scores["inception_score_mean"],
        inception_score_std=scores["inception_score_std"],
    )


_floors: dict[tuple[Any, ...], FeatureDistances] = {}


def real_data_floor(
    reference: Tensor,
    extractor: str,
    num_samples: int | None = None,
    *,
    weights_path: str | Path | None = None,
    batch_size: int = 256,
    kid_subset_size: int = 500,
    kid_subsets: int = 100,
) -> FeatureDistances:
    """Distance between two fixed random parts of the real images: what real data scores against real data.

    The Fréchet distance is biased upwards by about 1/N, so the first part is as large as the set of generated images
    that the floor stands beside, but at most half of the data; the second part is the rest. Where the data are fewer
    than twice the samples the floor lies too high, and a good model can come to lie below it. Kept for the life of the
    process.

    Args:
        reference: (M, C, H, W) uint8, the real images.
        extractor: As in `feature_distances`, like the arguments after the next.
        num_samples: Size of the first part; None, or more than M // 2, for half of the images.
        weights_path: Weights of the extractor.
        batch_size: Images per pass through the extractor.
        kid_subset_size: Images per random subset of the kernel distance.
        kid_subsets: Number of subsets of the kernel distance.

    Returns:
        The distances of the first part from the second.

    Raises:
        TypeError: As `feature_distances`.
        ValueError: As `feature_distances`; the first part must hold a whole subset.
        ConnectionError: As `feature_distances`.
    """
    half = len(reference) // 2
    size = half if num_samples is None else min(num_samples, half)
    if size < kid_subset_size:
        raise ValueError(
            f"The floor compares {size} of the {len(reference)} real images with the rest, fewer than "
            f"kid_subset_size={kid_subset_size}: pass a smaller subset."
        )
    key = (_content_key(reference, registered_name(extractor), weights_path), size, kid_subset_size, kid_subsets)
    if key not in _floors:
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0)).to(reference.device)
        _floors[key] = feature_distances(
            reference[order[:size]],
            reference[order[size:]],
            extractor,
            weights_path=weights_path,
            batch_size=batch_size,
            kid_subset_size=kid_subset_size,
            kid_subsets=kid_subsets,
        )
    return _floors[key]


class FeatureDistance(Metric):
    """`feature_distances` as a torchmetrics metric that collects images batch by batch and rank by rank.

    Args:
        extractor: As in `feature_distances`, like the arguments below.
        weights_path: Weights of the extractor.
        batch_size: Images per pass through the extractor.
        kid_subset_size: Images per random subset of the kernel distance.
        kid_subsets: Number of subsets of the kernel distance.

    Example:
        >>> metric = FeatureDistance("fd_digits_mlp", kid_subset_size=50)
        >>> images = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8)
        >>> metric.update(images, real=True)
        >>> metric.update(images, real=False)
        >>> abs(metric.compute()["frechet_distance"]) < 1e-6
        True
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    samples: list[Tensor]
    reference: list[Tensor]

    def __init__(
        self,
        extractor: str,
        weights_path: str | Path | None = None,
        batch_size: int = 256,
        kid_subset_size: int = 500,
        kid_subsets: int = 100,
    ) -> None:
        super().__init__()
        registered_name(extractor)
        self.arguments: dict[str, Any] = {
            "extractor": extractor,
            "weights_path": weights_path,
            "batch_size": batch_size,
            "kid_subset_size": kid_subset_size,
            "kid_subsets": kid_subsets,
        }
        self.add_state("samples", default=[], dist_reduce_fx="cat")
        self.add_state("reference", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Add a batch.

        Args:
            images: (N, C, H, W) uint8.
            real: Whether these are real images (the reference) or generated ones.
        """
        (self.reference if real else self.samples).append(images)

    def compute(self) -> dict[str, Any]:
        """The fields of `FeatureDistances` of all images so far.

        Raises:
            ValueError: If no real or no generated images were given.
        """
        if not len(self.samples) or not len(self.reference):
            raise ValueError("FeatureDistance wants real and generated images before compute; update it with both.")
        distances = feature_distances(dim_zero_cat(self.samples), dim_zero_cat(self.reference), **self.arguments)
        return dataclasses.asdict(distances)


class _Images(Dataset[Tensor]):
    """uint8 images as torch-fidelity reads them: one tensor per item, on the CPU."""

    def __init__(self, image_NCHW: Tensor) -> None:
        self.image_NCHW = image_NCHW.cpu()

    def __len__(self) -> int:
        return len(self.image_NCHW)

    def __getitem__(self, index: int) -> Tensor:
        return self.image_NCHW[index]


@functools.cache
def _cache_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zoo-feature-distance-")


def _process_cache() -> str:
    """Folder where torch-fidelity keeps reference features; private to this process and removed with it."""
    return _cache_folder().name


def _content_key(images: Tensor, extractor: str, weights_path: str | Path | None) -> str:
    """A key that is equal only for equal images, extractor and weights."""
    digest = hashlib.blake2b(images.cpu().contiguous().numpy().data, digest_size=16)
    digest.update(f"{tuple(images.shape)} {extractor} {weights_path}".encode())
    if weights_path is not None and Path(weights_path).exists():
        path = Path(weights_path)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
