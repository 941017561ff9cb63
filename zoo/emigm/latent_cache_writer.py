"""Latents of a whole data set on disk: memory-mapped shards, or the published layout of one file an image.

A cache folder holds ``manifest.json``, written before the first latent with ``"complete": false`` and again at the end with
``true``, and

* in the layout ``shards`` folders ``shard-<rank>-<number>``, each with the arrays ``index.npy`` (n,), ``labels.npy`` (n,),
  ``moments.npy`` and ``moments_flip.npy`` (n, C, h, w). Samples may stand in any order; ``index`` tells which they are;
* in the layout ``npz`` the files ``<class>/<file name of the image>.npz`` with ``moments`` and ``moments_flip`` (C, h, w).

Whatever has its final name is complete: it was written under a name that begins with a dot, and renamed. So a run that is
killed at any moment leaves a cache that the next run continues.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from typing_extensions import override

__all__ = ["EncodesLatents", "LatentCacheWriter"]

MANIFEST = "manifest.json"
_LOADING = ("batch_size", "num_workers", "pin_memory", "seed", "flip", "on_error")
"""Arguments of a DataModule that say how data are loaded and trained on, not which they are."""
_AT_THE_END = ("complete", "num_samples", "shards")
"""Entries of the manifest that are known at the end only."""


@runtime_checkable
class EncodesLatents(Protocol):
    """A module whose predictions are latents to be cached."""

    #: Asked before a batch is encoded: which of its samples, bool (B,), are on disk already.
    finished: Callable[[Mapping[str, Any]], Tensor] | None

    def cache_description(self) -> dict[str, Any]:
        """Plain data needed to read the latents; it includes ``flip``."""


class LatentCacheWriter(BasePredictionWriter):
    """Writes what `predict_step` returned as ``moments`` and ``moments_flip`` into a cache that `CachedLatents` reads.

    A run that was cut short, by ``kill -9`` as well, is continued by the same command: samples on disk are not encoded
    again; in the layout ``shards``, those before the first that is missing are not even read. Each process writes shards of
    its own, so that any number of them may begin and another number continue; they must share the folder. A folder that
    holds latents of other data or of another codec is refused.

    Args:
        folder: the cache.
        layout: ``shards`` of many samples, which are memory-mapped, or ``npz``, the published code's one file an image, below
            a folder for each class.
        shard_size: samples in a shard. So many are held in memory before they are written, and lost when the run is killed.
        dtype: type of the stored numbers. The published layout is float32.

    Raises:
        ValueError: ``shard_size`` < 1, or float16 in the published layout.
    """

    def __init__(
        self,
        folder: Path,
        layout: Literal["shards", "npz"] = "shards",
        shard_size: int = 4096,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        super().__init__("batch")
        if shard_size < 1:
            raise ValueError(f"LatentCacheWriter: shard_size={shard_size} must be at least 1.")
        if layout not in ("shards", "npz"):
            raise ValueError(f"LatentCacheWriter: layout={layout!r} must be shards or npz.")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"LatentCacheWriter: dtype={dtype!r} must be float32 or float16.")
        if layout == "npz" and dtype != "float32":
            raise ValueError("LatentCacheWriter: the layout npz is float32; use dtype: float32, or layout: shards.")
        self.folder = Path(folder)
        self.layout = layout
        self.shard_size = shard_size
        self.dtype = dtype
        self._done: set[int] = set()
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._number = 0
        self._start = 0
        self._given = 0
        self._manifest: dict[str, Any] = {}

    # Lightning hooks

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the cache, see what it holds, and tell the module what it need not encode.

        Raises:
            TypeError: the module's predictions are not latents.
            ValueError: there are several predict loaders, or the folder holds something else than this run's latents.
        """
        if not isinstance(pl_module, EncodesLatents):
            raise TypeError(
                f"LatentCacheWriter writes the predictions of a module that encodes, such as LatentEncoder, not of"
                f" {type(pl_module).__name__}: set --model LatentEncoder."
            )
        if len(trainer.num_predict_batches) > 1:
            raise ValueError(
                f"LatentCacheWriter writes one predict loader, got {len(trainer.num_predict_batches)}: cache them one after"
                " another, each in a folder of its own."
            )
        self._manifest = self._describe(trainer, pl_module.cache_description())
        if self.layout == "npz" and not self._manifest["flip"]:
            raise ValueError("LatentCacheWriter: the layout npz holds mirrored images, too: set flip of the encoder to true.")
        if self.layout == "npz" and self._manifest["classes"] is None:
            raise ValueError(
                "LatentCacheWriter: the layout npz has a folder for each class, but the data names none: use layout: shards."
            )
        self._check_folder()  # on each process, so that all of them stop
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in [*self.folder.glob(".*.partial"), *self.folder.glob("*/.*.partial")]:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            if not (self.folder / MANIFEST).exists():
                self._write_manifest({**self._manifest, "complete": False})
        trainer.strategy.barrier("latent cache: opened")
        shards = _shards(self.folder)
        mine = [int(shard.name.rpartition("-")[2]) for shard in shards if shard.name.startswith(_prefix(trainer.global_rank))]
        self._number = max(mine, default=-1) + 1
        self._done = {int(index) for shard in shards for index in np.load(shard / "index.npy")}
        self._waiting = {}
        self._start = self._given = 0
        loader: Any = trainer.predict_dataloaders
        if self._done and hasattr(loader, "start_at"):  # of a ZooDataModule, which numbers samples in their order
            first_missing = next(index for index in range(len(self._done) + 1) if index not in self._done)
            loader.start_at(min(first_missing, len(loader.dataset)))
            self._start = loader.state_dict()["samples"]
        pl_module.finished = self.finished
        trainer.predict_loop.return_predictions = False  # a data set's latents do not fit into memory

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the latents of a batch, or keep them until a shard is full.

        Raises:
            TypeError: the prediction is no dictionary with ``index``.
            ValueError: entries are missing, have another shape than the cache, or are not finite.
        """
        if not isinstance(prediction, Mapping) or not isinstance(prediction.get("index"), Tensor):
            raise TypeError('LatentCacheWriter wants predict_step to return a dictionary with the sample ids as "index".')
        self._given += len(batch["index"])
        if self._start and int(batch["index"].min() if len(batch["index"]) else self._start) < self._start:
            raise ValueError(
                f"LatentCacheWriter: the data numbers its samples in another order than it gives them, so that"
                f" folder={self.folder} cannot be continued: number them 0, 1, 2 ... as they come, and give a new folder."
            )
        if not len(prediction["index"]):
            return
        arrays = self._arrays(prediction)
        if self.layout == "npz":
            self._write_files(arrays, prediction)
            return
        for name, array in arrays.items():
            self._waiting.setdefault(name, []).append(array)
        while sum(map(len, self._waiting["index"])) >= self.shard_size:
            self._write_shard(trainer.global_rank, self.shard_size)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last shard; when all processes have, rank 0 completes the manifest."""
        if self._waiting.get("index"):
            self._write_shard(trainer.global_rank, self.shard_size)
        trainer.strategy.barrier("latent cache: written")
        given = int(trainer.strategy.reduce(torch.tensor(self._given, device=pl_module.device), reduce_op="sum"))
        try:
            if trainer.is_global_zero:
                whole = trainer.num_predict_batches[0] == len(trainer.predict_dataloaders)  # type: ignore[arg-type]
                self._complete(whole, given)
        finally:
            trainer.strategy.barrier("latent cache: complete")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the module."""
        pl_module.finished = None  # type: ignore[assignment]

    # What is there

    def finished(self, batch: Mapping[str, Any]) -> Tensor:
        """Mask, bool (B,), of the samples of a batch that are in the cache."""
        if self.layout == "npz":
            return torch.tensor([self._file(path, label).exists() for path, label in self._names(batch)], dtype=torch.bool)
        return torch.tensor([index in self._done for index in batch["index"].tolist()], dtype=torch.bool)

    def _describe(self, trainer: Trainer, description: dict[str, Any]) -> dict[str, Any]:
        data: Any = getattr(trainer, "datamodule", None)
        config = getattr(data, "init_config", None)
        if config is not None:
            arguments = {name: value for name, value in config["init_args"].items() if name not in _LOADING}
            config = {"class_path": config["class_path"], "init_args": arguments}
        classes = getattr(data, "classes", None)
        manifest = {
            "layout": self.layout,
            "dtype": self.dtype,
            **description,
            "classes": None if classes is None else [str(name) for name in classes],
            "data": config,
            "data_samples": len(trainer.predict_dataloaders.dataset),  # type: ignore[union-attr]
        }
        return json.loads(json.dumps(manifest))  # as it will be read again

    def _check_folder(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            if self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                raise ValueError(
                    f"LatentCacheWriter: folder={self.folder} holds files, but no {MANIFEST}, so it is no cache that could be"
                    " continued: give a new or empty folder."
                )
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"LatentCacheWriter: {path} is damaged ({error}): give a new folder.") from error
        differing = [
            f"{name} is {found.get(name)}, this run has {self._manifest.get(name)}"
            for name in dict.fromkeys([*self._manifest, *found])
            if name not in _AT_THE_END and found.get(name) != self._manifest.get(name)
        ]
        if differing:
            raise ValueError(
                f"LatentCacheWriter: folder={self.folder} holds latents of other data or of another codec"
                f" ({'; '.join(differing)}): give a new folder, or the options of the run that began this one."
            )

    # Writing

    def _arrays(self, prediction: Mapping[str, Any]) -> dict[str, np.ndarray]:
        count, shape = len(prediction["index"]), tuple(self._manifest["shape"])
        names = ["moments", *(["moments_flip"] if self._manifest["flip"] else [])]
        arrays = {}
        for name in names:
            moments = prediction.get(name)
            if not isinstance(moments, Tensor) or tuple(moments.shape) != (count, *shape):
                given = tuple(moments.shape) if isinstance(moments, Tensor) else "missing"
                raise ValueError(f'LatentCacheWriter: prediction entry "{name}" must have shape {(count, *shape)}, is {given}.')
            array = moments.float().cpu().numpy()
            with np.errstate(over="ignore"):
                arrays[name] = array.astype(self.dtype)
            if not np.isfinite(arrays[name]).all():
                wide = " in float16; set dtype: float32" if np.isfinite(array).all() else ": are the codec's weights damaged?"
                raise ValueError(
                    f'LatentCacheWriter: "{name}" of samples {prediction["index"].tolist()[:5]} ... is not finite{wide}'
                )
        if not isinstance(prediction.get("label"), Tensor) or len(prediction["label"]) != count:
            raise ValueError(
                "LatentCacheWriter: the predictions hold no labels, one for each sample: give data whose predict batches have"
                ' "label".'
            )
        arrays["labels"] = prediction["label"].cpu().numpy().astype(np.int64)
        arrays["index"] = prediction["index"].cpu().numpy().astype(np.int64)
        return arrays

    def _write_shard(self, rank: int, size: int) -> None:
        """Write the first `size` waiting samples, or all if there are fewer, as one shard."""
        arrays = {name: np.concatenate(parts) for name, parts in self._waiting.items()}
        self._waiting = {name: [array[size:]] if len(array) > size else [] for name, array in arrays.items()}
        final = self.folder / f"{_prefix(rank)}{self._number:06d}"
        temporary = final.with_name(f".{final.name}.partial")
        temporary.mkdir()
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array[:size])
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(final)
        self._number += 1

    def _write_files(self, arrays: dict[str, np.ndarray], prediction: Mapping[str, Any]) -> None:
        for row, (path, label) in enumerate(self._names(prediction)):
            final = self._file(path, label)
            final.parent.mkdir(exist_ok=True)
            temporary = final.with_name(f".{final.name}.partial")
            with temporary.open("wb") as file:
                np.savez(file, moments=arrays["moments"][row], moments_flip=arrays["moments_flip"][row])
            temporary.replace(final)

    def _names(self, batch: Mapping[str, Any]) -> list[tuple[str, int]]:
        if "path" not in batch or "label" not in batch:
            raise ValueError(
                f'LatentCacheWriter: the layout npz needs "path" and "label" of each sample, got {sorted(batch)}: give data read'
                " from image files, or use layout: shards."
            )
        return list(zip(batch["path"], batch["label"].tolist(), strict=True))

    def _file(self, path: str, label: int) -> Path:
        return self.folder / self._manifest["classes"][label] / f"{Path(path).name}.npz"

    def _complete(self, whole: bool, given: int) -> None:
        """Count what is there and write the manifest.

        Args:
            whole: whether this run went through all of the data.
            given: samples that all processes were given.

        Raises:
            ValueError: several images have one name.
        """
        expected = self._manifest["data_samples"]
        counted: dict[str, Any]
        if self.layout == "npz":
            count = sum(1 for _ in self.folder.glob("[!.]*/[!.]*.npz"))
            counted = {"num_samples": count}
        else:
            shards = _shards(self.folder)
            indices = [np.load(shard / "index.npy") for shard in shards]
            count = len(np.unique(np.concatenate(indices))) if indices else 0
            sizes = [{"name": shard.name, "num_samples": len(index)} for shard, index in zip(shards, indices, strict=True)]
            counted = {"num_samples": count, "shards": sizes}
        if self.layout == "npz" and whole and count < given:
            raise ValueError(
                f"LatentCacheWriter: {given - count} of {given} images have the file name of another one of their class, and the"
                " layout npz tells images apart by it: rename them, or use layout: shards."
            )
        self._write_manifest({**self._manifest, "complete": whole, **counted})
        left_out = f" of {expected} in the data (the others were not given: unreadable?)" if count < expected else ""
        end = f"samples{left_out}, complete" if whole else f"of {expected} samples; the same command continues"
        print(f"LatentCacheWriter: {self.folder}, {count} {end}.")

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        temporary = self.folder / f".{MANIFEST}.partial"
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        temporary.replace(self.folder / MANIFEST)


def _prefix(rank: int) -> str:
    return f"shard-{rank:04d}-"


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*-*"))
