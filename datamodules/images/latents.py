"""Latents that were encoded once and kept on disk: shards that are memory-mapped, or one npz file an image.

Batches are ``{"latents": float32 (B, C, h, w), "labels": int64 (B,)}``. What is stored is never loaded whole.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.datamodule import ZooDataModule
from datamodules.base.loader import ResumableLoader
from datamodules.base.sample_indices import SampleIndices
from datamodules.images.in_memory import stratified_split
from zoo.base.random import SampleRandom

__all__ = ["CachedLatents", "LatentBatch", "LatentSet"]

_MANIFEST = "manifest.json"
_KINDS = ("moments", "latent")
_EVALUATION = -1
"""The epoch whose numbers evaluation draws, always the same."""


class LatentBatch(TypedDict):
    """A batch of latents; without the axis B, one sample.

    Attributes:
        latents: float32 (B, C, h, w), scaled to about unit variance.
        labels: int64 (B,).
    """

    latents: Tensor
    labels: Tensor


class _Store(Protocol):
    """Latents on disk, by the number of the sample.

    Attributes:
        shape: Of what is stored of one sample.
        labels: int64 (N,).
    """

    shape: tuple[int, int, int]
    labels: np.ndarray

    def read(self, indices: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Stored values (B, *shape) of samples, of the mirrored image where ``mirrored``, bool (B,), is true."""


class _Shards:
    """Shards as `LatentCacheWriter` writes them."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.shape: tuple[int, int, int] = tuple(manifest["shape"])
        self.folders = [root / shard["name"] for shard in manifest["shards"]]
        sizes = [shard["num_samples"] for shard in manifest["shards"]]
        index = self._concatenated("index", sizes)
        # A sample that two shards hold, as padding samplers make them, counts once.
        numbers, first = np.unique(index, return_index=True)
        if len(numbers) != manifest["num_samples"]:
            raise ValueError(f"{root} holds {len(numbers)} samples, but its {_MANIFEST} says {manifest['num_samples']}.")
        self.labels = self._concatenated("labels", sizes)[first]
        starts = np.cumsum([0, *sizes])
        self._shard = np.searchsorted(starts, first, side="right") - 1
        self._row = first - starts[self._shard]
        self._open: dict[tuple[int, str], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a memory map would be pickled as a copy of all that it holds

    def _concatenated(self, name: str, sizes: list[int]) -> np.ndarray:
        parts = [_load(folder / f"{name}.npy") for folder in self.folders]
        for folder, part, size in zip(self.folders, parts, sizes, strict=True):
            if part.shape != (size,):
                raise ValueError(f"{folder / f'{name}.npy'} has shape {part.shape} instead of ({size},): it is damaged.")
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _mapped(self, shard: int, name: str) -> np.ndarray:
        if (shard, name) not in self._open:
            path = self.folders[shard] / f"{name}.npy"
            array = _load(path, mapped=True)
            if array.shape[1:] != self.shape:
                raise ValueError(f"{path} holds samples of shape {array.shape[1:]} instead of {self.shape}: it is damaged.")
            self._open[shard, name] = array
        return self._open[shard, name]

    def read(self, indices: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """See `_Store`."""
        found = np.empty((len(indices), *self.shape), np.float32)
        shard, row = self._shard[indices], self._row[indices]
        for number in np.unique(shard):
            for name, wanted in (("moments", ~mirrored), ("moments_flip", mirrored)):
                here = np.flatnonzero((shard == number) & wanted)
                if len(here):
                    found[here] = self._mapped(int(number), name)[row[here]]
        return found


class _Files:
    """One npz file an image, ``<class>/<name>.npz``."""

    def __init__(self, root: Path, classes: list[str] | None = None, shape: tuple[int, int, int] | None = None) -> None:
        self.root = root
        if classes is None:
            classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes = classes
        folders = [root / name for name in classes]
        names = [sorted(path.name for path in folder.glob("*.npz") if not path.name.startswith(".")) for folder in folders]
        if not any(names):
            raise FileNotFoundError(
                f"{root} holds no latents: give a folder with {_MANIFEST}, or with <class>/<image>.npz below it;"
                " LatentCacheWriter makes either."
            )
        self.labels = np.repeat(np.arange(len(folders)), [len(of_class) for of_class in names])
        # Bytes of one array, not objects: workers share its memory, however many files there are.
        self._names = np.array([name.encode() for of_class in names for name in of_class])
        first = self._path(0)
        self.shape = shape or _array_of(first, "moments").shape
        if len(self.shape) != 3:
            raise ValueError(f"{first} holds moments of shape {self.shape} instead of (channels, height, width).")

    def _path(self, index: int) -> Path:
        return self.root / self.classes[self.labels[index]] / self._names[index].decode()

    def read(self, indices: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """See `_Store`."""
        found = np.empty((len(indices), *self.shape), np.float32)
        for row, (index, flip) in enumerate(zip(indices.tolist(), mirrored.tolist(), strict=True)):
            path = self._path(index)
            array = _array_of(path, "moments_flip" if flip else "moments")
            if array.shape != self.shape:
                raise ValueError(f"{path} holds an array of shape {array.shape} instead of {self.shape}, as others have.")
            found[row] = array
        return found


class LatentSet(Dataset[LatentBatch]):
    """Latents of some samples of a cache.

    Mirroring and the noise of the posterior are pure functions of (seed, epoch, number of the sample in the cache), whatever
    its batch, worker, process or split.

    Args:
        store: Latents on disk.
        indices: numbers of the samples in it, int64 (N,).
        kind: ``moments`` (mean and log-variance side by side, unscaled) or ``latent`` (scaled already).
        scale: factor of latents that are drawn from moments.
        seed: seed of the draws.
        flip: whether the mirrored image's latents are taken in half of the epochs.
        training: Whether each epoch has its own draws; otherwise the image itself with one fixed noise.
    """

    def __init__(
        self,
        store: _Store,
        indices: Tensor,
        kind: Literal["moments", "latent"],
        scale: float,
        seed: int = 0,
        flip: bool = True,
        training: bool = True,
    ) -> None:
        self.store = store
        self.indices = indices
        self.kind = kind
        self.scale = scale
        self.seed = seed
        self.flip = flip and training
        self.training = training
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch."""
        self.epoch = epoch if self.training else _EVALUATION

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> LatentBatch:
        batch = self.batch([index])
        return {"latents": batch["latents"][0], "labels": batch["labels"][0]}

    def batch(self, indices: list[int]) -> LatentBatch:
        """A whole batch.

        Raises:
            ValueError: a file is damaged or of another shape; it is named.
        """
        index_B = self.indices[indices]
        random = SampleRandom(self.seed, index_B, epoch=self.epoch)
        mirrored_B = random.uniform("latents.flip") < 0.5 if self.flip else torch.zeros(len(index_B), dtype=torch.bool)
        stored = torch.from_numpy(self.store.read(index_B.numpy(), mirrored_B.numpy()))
        if self.kind == "moments":
            mean_BCHW, log_variance_BCHW = stored.chunk(2, dim=1)
            noise_BCHW = random.normal("latents.posterior", tuple(mean_BCHW.shape[1:]))
            stored = (mean_BCHW + (0.5 * log_variance_BCHW.clamp(-30, 20)).exp() * noise_BCHW) * self.scale
        return {"latents": stored, "labels": torch.from_numpy(self.store.labels[index_B.numpy()]).long()}


class CachedLatents(ZooDataModule):
    """Latents that were encoded once, by `LatentCacheWriter` or by the published code (one npz an image).

    In training the latents of the image or of its mirror image are taken, each with probability 1/2, and where mean and
    log-variance (limited to [-30, 20]) are stored, each epoch draws ``(mean + std * noise) * scale``.

    Args:
        root: the cache: a folder with ``manifest.json``, or one with ``<class>/<image>.npz`` below it; labels then are the
            places of the class folders in the order of their names.
        kind: Stored values: ``moments``, or ``latent``, scaled already. ``auto`` takes it from the manifest. The two
            published caches have none, and the same shape (32, 16, 16): for 256 x 256 it is ``moments``, for 512 x 512
            ``latent``.
        scale: factor of latents that are drawn from moments. None: the manifest's, without one 0.2325, that of KL-16. Of
            latents that are scaled already, by what they were; they are taken as they are.
        flip: whether mirrored images are taken, too.
        val_fraction: share of the samples held out, stratified by class, for validation and test. None: nothing is.
        predict_samples: Number of samples that ``predict`` draws, numbered from 0; a sample's number is its seed.
        predict_labels: Class of the samples of ``predict``, or a list of classes that is cycled over their numbers. None:
            the model chooses.
        **kwargs: arguments of `ZooDataModule`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        root: Path,
        kind: Literal["auto", "moments", "latent"] = "auto",
        scale: float | None = None,
        flip: bool = True,
        val_fraction: float | None = None,
        predict_samples: int = 100,
        predict_labels: Sequence[int] | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kind not in ("auto", *_KINDS):
            raise ValueError(f"CachedLatents: kind={kind!r} must be auto, moments or latent.")
        if scale is not None and not scale > 0:
            raise ValueError(f"CachedLatents: scale={scale} must be positive, or null.")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"CachedLatents: val_fraction={val_fraction} must lie between 0 and 1, or be null.")
        if predict_samples < 1:
            raise ValueError(f"CachedLatents: predict_samples={predict_samples} must be at least 1.")
        self.root = Path(root)
        self.kind = kind
        self.scale = scale
        self.flip = flip
        self.val_fraction = val_fraction
        self.predict_samples = predict_samples
        self.predict_labels = [predict_labels] if isinstance(predict_labels, int) else predict_labels
        if self.predict_labels is not None and (not len(self.predict_labels) or min(self.predict_labels) < 0):
            raise ValueError(
                f"CachedLatents: predict_labels={predict_labels} must name at least one class, 0 or more, or be null."
            )
        self._cache: _Cache | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a sample's latents.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is incomplete or damaged, or what it stores is not known.
        """
        channels, height, width = self.cache.store.shape
        return (channels // 2 if self.cache.kind == "moments" else channels, height, width)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without a cache, which ``predict`` does not need."""
        return self.cache.num_classes if self.root.is_dir() else None

    @property
    def latent_scale(self) -> float | None:
        """Factor by which the latents are scaled; None without a cache, or if the cache does not say."""
        return self.cache.scale if self.root.is_dir() else None

    @property
    def cache(self) -> _Cache:
        """Latents on disk; opened on first use.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is incomplete or damaged, or what it stores is not known.
        """
        if self._cache is None:
            self._cache = _open_cache(self.root, self.kind, self.scale)
        return self._cache

    @override
    def setup(self, stage: str) -> None:
        """Read the manifest and the list of samples, not the latents.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is incomplete or damaged, or what it stores is not known.
        """
        if stage != "predict":
            _ = self.cache

    def latent_set(self, split: Literal["train", "val"]) -> LatentSet:
        """The samples of training, or those held out, which are not mirrored and drawn with one fixed noise."""
        labels = torch.from_numpy(self.cache.store.labels)
        num_held_out = 0 if self.val_fraction is None else max(1, round(self.val_fraction * len(labels)))
        kept, held_out = stratified_split(labels, num_held_out)
        training = split == "train"
        return LatentSet(
            self.cache.store,
            kept if training else held_out,
            self.cache.kind,
            self.cache.scale or 1.0,
            seed=self.data_seed,
            flip=self.flip and self.cache.mirrored,
            training=training,
        )

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        return self.train_loader(self.latent_set("train"))

    @override
    def val_dataloader(self) -> Any:
        """Batches of the samples held out; none where none are."""
        return [] if self.val_fraction is None else self.eval_loader(self.latent_set("val"))

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        """Batches of the samples held out.

        Raises:
            ValueError: none are held out.
        """
        if self.val_fraction is None:
            raise ValueError("CachedLatents holds out no samples to test on: set val_fraction, as it was in training.")
        return self.eval_loader(self.latent_set("val"))

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of sample numbers."""
        return self.eval_loader(SampleIndices(self.predict_samples, self.predict_labels))


class _Cache(NamedTuple):
    """An opened cache."""

    store: _Store
    kind: Literal["moments", "latent"]
    scale: float | None
    mirrored: bool
    num_classes: int


def _open_cache(root: Path, kind: Literal["auto", "moments", "latent"], scale: float | None) -> _Cache:
    if not root.is_dir():
        raise FileNotFoundError(f"CachedLatents: root={root} does not exist: write it with LatentCacheWriter, or name another.")
    if not (root / _MANIFEST).exists():
        if any(root.glob("shard-*")):
            raise FileNotFoundError(f"{root} holds shards of latents, but its {_MANIFEST} is missing: copy it, too.")
        files = _Files(root)
        if kind == "auto":
            raise ValueError(
                f"{root} has no {_MANIFEST} that says what its arrays {files.shape} are: set kind to moments (mean and"
                " log-variance, as the published cache of 256 x 256), or to latent (scaled already, as that of 512 x 512)."
            )
        published = 0.2325 if kind == "moments" else None
        return _checked(root, _Cache(files, kind, published if scale is None else scale, True, len(files.classes)))
    try:
        manifest = json.loads((root / _MANIFEST).read_text())
        found, shape, classes = manifest["kind"], tuple(manifest["shape"]), manifest["classes"]
        complete, mirrored, own_scale = manifest["complete"], manifest["flip"], float(manifest["scale"])
        layout = manifest["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / _MANIFEST} is damaged ({type(error).__name__}: {error}): write the cache again.") from error
    if not complete:
        counted = f" ({manifest['num_samples']} of {manifest['data_samples']} samples)" if "num_samples" in manifest else ""
        raise ValueError(f"{root} is not complete{counted}: continue the `zoo predict` that began it.")
    if found not in _KINDS or kind not in ("auto", found):
        raise ValueError(f"{root} stores kind={found!r} by its {_MANIFEST}, not kind={kind!r}: set kind: auto.")
    if found == "latent" and scale not in (None, own_scale):
        raise ValueError(
            f"{root} stores latents that are scaled by {own_scale} already, so scale={scale} cannot be: leave it out."
        )
    store: _Store = _Files(root, classes, shape) if layout == "npz" else _Shards(root, manifest)
    num_classes = int(store.labels.max()) + 1 if classes is None and len(store.labels) else len(classes or ())
    return _checked(root, _Cache(store, found, own_scale if scale is None else scale, mirrored, num_classes))


def _checked(root: Path, cache: _Cache) -> _Cache:
    if not len(cache.store.labels):
        raise ValueError(f"{root} holds no samples: write it again from data that has some.")
    if cache.kind == "moments" and cache.store.shape[0] % 2:
        raise ValueError(
            f"{root} stores arrays of shape {cache.store.shape}: moments have an even number of channels, mean and log-variance;"
            " set kind: latent if these are latents."
        )
    return cache


def _load(path: Path, mapped: bool = False) -> np.ndarray:
    """An array of a shard."""
    try:
        return np.load(path, mmap_mode="r" if mapped else None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The array {path} of the cache is missing: copy the cache again, or write it again.") from error
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy the cache again, or write it again.") from error


def _array_of(path: Path, name: str) -> np.ndarray:
    """One array of an npz file."""
    try:
        with np.load(path) as arrays:
            return arrays[name]
    except KeyError as error:
        raise ValueError(f"{path} holds no array {name}: it is no file of a cache of latents.") from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): encode its image again.") from error
