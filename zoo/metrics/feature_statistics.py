"""Mean and covariance of features: computed batch by batch, written to files, read from ours and from ADM's.

A Fréchet distance needs no more of a set of images than these two, so the real images of a large data set can be
replaced by a file, and fifty thousand generated ones need not be held.

Shape suffixes: B images of a batch, N images, C channels, H height, W width, D features, K classes.
"""

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from zoo.metrics.extractors import registered_name

Images = Tensor | str | Path | Iterable[Tensor]
"""Images for a function that reads them batch by batch: uint8 (N, C, H, W), a folder of PNG files, or batches (B, C, H, W)."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mu: (D,) float64, the mean.
        sigma: (D, D) float64, the covariance, with divisor N - 1.
        extractor: Name of the extractor whose features they are; None if the file did not say.
        num_images: Number of images; None if the file did not say.
    """

    mu: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]
    extractor: str | None = None
    num_images: int | None = None

    def save(self, path: str | Path) -> None:
        """Write an `.npz` with `mu`, `sigma`, and where known `extractor` and `num_images`.

        Args:
            path: The file; its folder is made if needed. Whoever reads it reads a whole one.

        Raises:
            ValueError: If the name does not end in `.npz`.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"Statistics are written as an .npz file, got path={str(path)!r}: end its name in .npz.")
        known: dict[str, Any] = {"extractor": self.extractor, "num_images": self.num_images}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez(file, mu=self.mu, sigma=self.sigma, **{name: value for name, value in known.items() if value is not None})
        temporary.replace(path)

    def check(self, extractor: str, num_features: int | None, source: str) -> None:
        """Make sure that they can be compared with an extractor's features.

        Args:
            extractor: Name of the extractor.
            num_features: Number of its features D; None if that is not known.
            source: What these statistics are, for the message.

        Raises:
            ValueError: If they were made with another extractor, or hold another number of features.
        """
        if self.extractor is not None and self.extractor != extractor:
            raise ValueError(
                f"{source} hold features of the extractor {self.extractor!r}, not of {extractor!r}: "
                f"pass extractor={self.extractor!r}, or statistics made with {extractor!r}."
            )
        if num_features is not None and num_features != len(self.mu):
            raise ValueError(
                f"{source} hold {len(self.mu)} features, and the extractor {extractor!r} gives {num_features}: "
                "they were made with another extractor."
            )


def read_statistics(path: str | Path) -> FeatureStatistics:
    """Read statistics of features: a file of ours, a `mu`/`sigma` file in ADM's form, or ADM's reference batch.

    ADM's statistics of ImageNet (`fid_stats_imagenet256_guided_diffusion.npz`, `fid_stats_imagenet512_...`) hold a float32
    `mu` and a float64 `sigma`; its reference batches (`VIRTUAL_imagenet256_labeled.npz`) hold the same two beside the
    images themselves, which are not read. Everything is converted to float64, and nothing is unpickled.

    Args:
        path: The `.npz` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no `.npz`, lacks `mu` or `sigma`, or these are no finite mean and covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No statistics at {path}: pass an .npz file with `mu` and `sigma`, "
            "ADM's or one that zoo.metrics.write_statistics wrote."
        )
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array")
        with arrays:
            if missing := {"mu", "sigma"} - set(arrays.files):
                raise ValueError(f"it lacks {' and '.join(sorted(missing))} and holds {', '.join(sorted(arrays.files))}")
            found = {name: arrays[name] for name in ("mu", "sigma", "extractor", "num_images") if name in arrays.files}
        mu, sigma = _checked(found["mu"], found["sigma"], "mu", "sigma")
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path} is no file of feature statistics, an .npz with mu (D,) and sigma (D, D): {error}. "
            "Make one with zoo.metrics.write_statistics."
        ) from error
    extractor, count = (found[name].item() if name in found else None for name in ("extractor", "num_images"))
    return FeatureStatistics(mu, sigma, extractor, count)


def frechet_distance(mu1: npt.ArrayLike, sigma1: npt.ArrayLike, mu2: npt.ArrayLike, sigma2: npt.ArrayLike) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    torch-fidelity computes it, in float64. With Inception features this is the FID (Heusel et al., arXiv 1706.08500).

    Args:
        mu1: (D,) mean of the first.
        sigma1: (D, D) covariance of the first.
        mu2: (D,) mean of the second.
        sigma2: (D, D) covariance of the second.

    Raises:
        ValueError: If a shape or a type is wrong, a value is not finite, or the two differ in D.

    Example:
        >>> frechet_distance([0.0, 0.0], [[4.0, 0.0], [0.0, 1.0]], [3.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
        10.0
    """
    mean_1, covariance_1 = _checked(np.asarray(mu1), np.asarray(sigma1), "mu1", "sigma1")
    mean_2, covariance_2 = _checked(np.asarray(mu2), np.asarray(sigma2), "mu2", "sigma2")
    if len(mean_1) != len(mean_2):
        raise ValueError(f"Statistics of {len(mean_1)} and of {len(mean_2)} features: they are of different extractors.")
    first, second = {"mu": mean_1, "sigma": covariance_1}, {"mu": mean_2, "sigma": covariance_2}
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


class FeatureStream:
    """Features of images taken batch by batch: their mean and covariance, and the extractor's logits.

    Memory does not grow with the number of images, except by the logits (8 kB an image with Inception's 1008, on the
    CPU), without which there is no inception score. The order of the images matters to nothing but the splits of that
    score.

    Args:
        extractor: As in `feature_distances`.
        weights_path: Inception's weights file, or the folder of your own `FeatureClassifier`.
        device: Where the features are computed.

    Raises:
        ValueError: If the extractor or its weights are unknown.
        ConnectionError: If Inception's weights must be downloaded and cannot be.

    Example:
        >>> stream = FeatureStream("fd_digits_mlp")
        >>> for batch in torch.randint(0, 256, (5, 20, 1, 8, 8), dtype=torch.uint8):
        ...     stream.update(batch)
        >>> stream.statistics().num_images, tuple(stream.logits.shape)
        (100, (100, 10))
    """

    def __init__(self, extractor: str, weights_path: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        name = registered_name(extractor)
        extractor_class = FEATURE_EXTRACTORS_REGISTRY[name]
        self.extractor = extractor
        self.device = torch.device(device)
        self._features, self._logits = _layers(extractor_class)
        layers = [self._features] if self._logits is None else [self._features, self._logits]
        path = str(weights_path) if weights_path else None
        network = extractor_class(name, layers, feature_extractor_weights_path=path, verbose=False)
        self._network = network.requires_grad_(False).eval().to(self.device)
        self._count = 0
        self._mean_D = self._scatter_DD = torch.zeros(())
        self._kept: list[Tensor] = []

    @property
    def num_images(self) -> int:
        """Number of images so far."""
        return self._count

    @property
    def logits(self) -> Tensor | None:
        """(N, K) float64 on the CPU, in the order of the images; None if the extractor has no logits."""
        return torch.cat(self._kept) if self._kept else None

    @torch.no_grad()
    def extract(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, D) and logits (B, K) of a batch, float64 on the stream's device; nothing is added.

        Args:
            image_BCHW: (B, C, H, W) uint8.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: If they are not (B, C, H, W).
        """
        if image_BCHW.dtype != torch.uint8:
            raise TypeError(f"`images` must be uint8, got {image_BCHW.dtype}; round them with zoo.base.samples.to_uint8.")
        if image_BCHW.ndim != 4:
            raise ValueError(f"`images` must have shape (B, C, H, W), got {tuple(image_BCHW.shape)}.")
        found = self._network.convert_features_tuple_to_dict(self._network(image_BCHW.to(self.device)))
        return found[self._features].double(), None if self._logits is None else found[self._logits].double()

    def add(self, features_BD: Tensor, logits_BK: Tensor | None) -> None:
        """Take up what `extract` gave, of this process or another; an empty batch changes nothing.

        Moments are merged pairwise (Chan, Golub and LeVeque 1979), which loses no digits where the mean is large.
        """
        count = len(features_BD)
        if not count:
            return
        mean_D = features_BD.mean(dim=0)
        centred_BD = features_BD - mean_D
        scatter_DD = centred_BD.T @ centred_BD
        if self._count:
            total = self._count + count
            step_D = mean_D - self._mean_D
            self._scatter_DD += scatter_DD + torch.outer(step_D, step_D) * (self._count * count / total)
            self._mean_D += step_D * (count / total)
        else:
            self._mean_D, self._scatter_DD = mean_D, scatter_DD
        self._count += count
        if logits_BK is not None:
            self._kept.append(logits_BK.cpu())

    def update(self, image_BCHW: Tensor) -> None:
        """Take up a batch of images, uint8 (B, C, H, W)."""
        self.add(*self.extract(image_BCHW))

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of all features so far.

        Raises:
            ValueError: If there are fewer than two images.
        """
        if self._count < 2:
            raise ValueError(f"A covariance wants at least 2 images, got {self._count}.")
        covariance_DD = self._scatter_DD / (self._count - 1)
        return FeatureStatistics(self._mean_D.cpu().numpy(), covariance_DD.cpu().numpy(), self.extractor, self._count)


def stream_features(
    images: Images,
    extractor: str,
    *,
    weights_path: str | Path | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> FeatureStream:
    """Take the features of images batch by batch.

    Args:
        images: uint8 (N, C, H, W); or a folder, whose PNG files are read in the order of their names, as the writers of
            predictions name them; or batches uint8 (B, C, H, W).
        extractor: As in `feature_distances`.
        weights_path: Inception's weights file, or the folder of your own `FeatureClassifier`.
        batch_size: Images per pass through the extractor; given batches are taken as they are.
        device: Where the features are computed; None for where the tensor lies, and the CPU for all else.

    Returns:
        The stream, which knows mean, covariance and logits.

    Raises:
        TypeError: If the images are not uint8.
        FileNotFoundError: If the folder does not exist or holds no PNG.
        ValueError: If images differ in shape, or the extractor or its weights are unknown.
        ConnectionError: If Inception's weights must be downloaded and cannot be.
    """
    if batch_size < 1:
        raise ValueError(f"stream_features: batch_size={batch_size} must be at least 1.")
    if device is None:
        device = images.device if isinstance(images, Tensor) else "cpu"
    stream = FeatureStream(extractor, weights_path, device)
    if isinstance(images, Tensor):
        batches: Iterable[Tensor] = images.split(batch_size)
    else:
        batches = folder_batches(images, batch_size) if isinstance(images, str | Path) else images
    shape: torch.Size | None = None
    for image_BCHW in batches:
        if shape is not None and image_BCHW.shape[1:] != shape:
            raise ValueError(f"All images must have one shape, got {tuple(image_BCHW.shape[1:])} after {tuple(shape)}.")
        shape = image_BCHW.shape[1:]
        stream.update(image_BCHW)
    return stream


def write_statistics(
    path: str | Path,
    images: Images,
    extractor: str,
    *,
    weights_path: str | Path | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> FeatureStatistics:
    """Write the statistics of real images, for later comparisons that need the images no more.

    Args:
        path: The `.npz` file to write: keys `mu`, `sigma`, `extractor`, `num_images`.
        images: The real images; this and what follows as in `stream_features`.
        extractor: As in `feature_distances`.
        weights_path: Weights of the extractor. The file does not name them: statistics of your own classifier are right
            for that classifier only.
        batch_size: Images per pass through the extractor.
        device: Where the features are computed.

    Returns:
        What was written.

    Raises:
        TypeError: As `stream_features`.
        FileNotFoundError: As `stream_features`.
        ValueError: As `stream_features`; or `path` does not end in `.npz`, or there are fewer than two images.
        ConnectionError: As `stream_features`.

    Example:
        >>> import tempfile
        >>> images = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     statistics = write_statistics(f"{folder}/real.npz", images, "fd_digits_mlp")
        ...     read_statistics(f"{folder}/real.npz").num_images
        100
    """
    if Path(path).suffix != ".npz":  # before the work, not after
        raise ValueError(f"Statistics are written as an .npz file, got path={str(path)!r}: end its name in .npz.")
    stream = stream_features(images, extractor, weights_path=weights_path, batch_size=batch_size, device=device)
    statistics = stream.statistics()
    statistics.save(path)
    return statistics


def folder_batches(folder: str | Path, batch_size: int = 256) -> Iterator[Tensor]:
    """The PNG files of a folder in the order of their names, as batches uint8 (B, C, H, W).

    Args:
        folder: The folder; its subfolders are not looked into.
        batch_size: Images per batch; no more are held at a time.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no PNG.
        ValueError: If a picture is neither 8-bit grey nor RGB, or differs in size or channels from the first.
    """
    paths = sorted(Path(folder).glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"There are no PNG files in {folder}: pass the folder in which the images lie.")
    first = _read_png(paths[0])
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            image_CHW = _read_png(path)
            if image_CHW.shape != first.shape:
                raise ValueError(
                    f"{path} has shape {tuple(image_CHW.shape)} (channels, height, width), and {paths[0].name} "
                    f"{tuple(first.shape)}: all images of one distance must be alike."
                )
            images.append(image_CHW)
        yield torch.stack(images)


def _read_png(path: Path) -> Tensor:
    """One picture as uint8 (C, H, W), pixel by pixel."""
    with Image.open(path) as picture:
        if picture.mode not in ("L", "RGB"):
            raise ValueError(f"{path} is a picture of mode {picture.mode}, neither 8-bit grey (L) nor RGB: convert it.")
        pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _checked(mu: npt.NDArray[Any], sigma: npt.NDArray[Any], mu_name: str, sigma_name: str) -> tuple[Any, Any]:
    """Mean and covariance in float64, if they are such."""
    for name, array, ndim in ((mu_name, mu, 1), (sigma_name, sigma, 2)):
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
        if array.ndim != ndim or not array.size:
            raise ValueError(f"{name} must have shape {('(D,)', '(D, D)')[ndim - 1]}, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite")
    if sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{sigma_name} must have shape {(len(mu), len(mu))} beside {mu_name} of {mu.shape}, got {sigma.shape}")
    return mu.astype(np.float64), sigma.astype(np.float64)


def _layers(extractor_class: Any) -> tuple[str, str | None]:
    """The layers of the Fréchet distance and of the inception score; None where the latter are no logits of their own."""
    features = extractor_class.get_default_feature_layer_for_metric("fid")
    try:
        logits = extractor_class.get_default_feature_layer_for_metric("isc")
    except (KeyError, ValueError, NotImplementedError):
        return features, None
    return features, None if logits == features else logits
