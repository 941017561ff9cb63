"""Distance of generated images from statistics in a file, or of a folder of pictures: batch by batch, none is held.

The Fréchet distance and the inception score are those of `feature_distances`. The kernel distance needs the features
themselves on both sides, so it is not measured here, and neither is a floor where the real images are not at hand.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from zoo.metrics.feature_distance import FeatureDistances
from zoo.metrics.feature_statistics import (
    FeatureStatistics,
    FeatureStream,
    Images,
    frechet_distance,
    read_statistics,
    stream_features,
)

Statistics = FeatureStatistics | str | Path
"""Statistics of real images, or the file that holds them."""

_SPLITS = 10  # with the two below: what torch-fidelity scores by default, so that its figures and ours are the same
_SHUFFLE = True
_SEED = 2020


def streamed_distances(stream: FeatureStream, statistics: Statistics) -> FeatureDistances:
    """Distances of the images that a stream has seen.

    Args:
        stream: What has seen the generated images.
        statistics: Statistics of the real images, or their file.

    Returns:
        The distances; those that statistics cannot give are None, and so is what the file does not say.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the stream saw fewer than two images, the file is wrong, or it is of another extractor.
    """
    source = "These statistics" if isinstance(statistics, FeatureStatistics) else f"The statistics in {statistics}"
    real = statistics if isinstance(statistics, FeatureStatistics) else read_statistics(statistics)
    found = stream.statistics()
    real.check(stream.extractor, len(found.mu), source)
    score: dict[str, float] = {}
    if stream.logits is not None and stream.num_images >= _SPLITS:
        score = isc_features_to_metric(stream.logits, _SPLITS, _SHUFFLE, _SEED)
    return FeatureDistances(
        extractor=stream.extractor,
        num_samples=stream.num_images,
        num_reference=real.num_images,
        frechet_distance=frechet_distance(found.mu, found.sigma, real.mu, real.sigma),
        kernel_distance=None,
        kernel_distance_std=None,
        inception_score=score.get(KEY_METRIC_ISC_MEAN),
        inception_score_std=score.get(KEY_METRIC_ISC_STD),
    )


def statistics_distances(
    samples: Images,
    statistics: Statistics,
    extractor: str,
    *,
    weights_path: str | Path | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> FeatureDistances:
    """Fréchet distance of generated images from statistics of real ones, and their inception score.

    Args:
        samples: The generated images, as in `stream_features`, like what follows `statistics`.
        statistics: Statistics of the real images, or their file, as `read_statistics` wants it.
        extractor: As in `feature_distances`; the one that the statistics were made with (ADM's files: Inception).
        weights_path: Inception's weights file, or the folder of your own `FeatureClassifier`.
        batch_size: Images per pass through the extractor.
        device: Where the features are computed.

    Returns:
        The distances. `kernel_distance` is None, and so is `inception_score` if the extractor has no logits or there are
        fewer than ten images.

    Raises:
        TypeError: If the images are not uint8.
        FileNotFoundError: If the file or the folder does not exist.
        ValueError: If images differ in shape, there are fewer than two, the file is wrong or of another extractor, or the
            extractor or its weights are unknown.
        ConnectionError: If Inception's weights must be downloaded and cannot be.
    """
    if not isinstance(statistics, FeatureStatistics):
        statistics = _read(statistics, extractor)
    stream = stream_features(samples, extractor, weights_path=weights_path, batch_size=batch_size, device=device)
    return streamed_distances(stream, statistics)


def folder_distances(
    folder: str | Path,
    reference: Tensor | Statistics,
    extractor: str,
    *,
    weights_path: str | Path | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> FeatureDistances:
    """The same of the PNG files in a folder, such as `ImageGridWriter(single_files=True)` writes at `zoo predict`.

    PNG keeps every pixel, so the figure is that of the images before they were written.

    Args:
        folder: Folder with the generated images.
        reference: Real images: uint8 (M, C, H, W), a folder of PNG files, statistics, or an `.npz` file of them.
        extractor: As in `feature_distances`.
        weights_path: Inception's weights file, or the folder of your own `FeatureClassifier`.
        batch_size: Images per pass through the extractor; no more are held at a time.
        device: Where the features are computed, by default on the CPU.

    Returns:
        The distances, as `statistics_distances` gives them.

    Raises:
        TypeError: As `statistics_distances`.
        FileNotFoundError: As `statistics_distances`.
        ValueError: As `statistics_distances`.
        ConnectionError: As `statistics_distances`.
    """
    device = device or "cpu"
    if isinstance(reference, Tensor) or (isinstance(reference, str | Path) and Path(reference).is_dir()):
        real = stream_features(reference, extractor, weights_path=weights_path, batch_size=batch_size, device=device)
        reference = real.statistics()
    return statistics_distances(folder, reference, extractor, weights_path=weights_path, batch_size=batch_size, device=device)


def _read(path: str | Path, extractor: str) -> FeatureStatistics:
    """The file's statistics, which must be of the extractor as far as it says: found before the images are looked at."""
    statistics = read_statistics(path)
    statistics.check(extractor, None, f"The statistics in {path}")
    return statistics
