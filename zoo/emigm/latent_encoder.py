"""Encoding a data set once: images in, what a cache of latents stores out. Wiring; the science is in the codecs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from zoo.emigm.codecs import LatentCodec
from zoo.module import ZooModule

__all__ = ["LatentEncoder"]


class LatentEncoder(ZooModule):
    """Encodes images with a frozen codec, for ``zoo predict`` with a `LatentCacheWriter`. It has nothing to train.

    Batches are dictionaries with ``index`` (B,), ``image`` (B, C, H, W) in [0, 1], and where they exist ``label`` (B,) and
    ``path``.

    Args:
        codec: the codec.
        flip: whether the mirrored images are encoded, too, as the published recipe does in place of mirroring at training.
    """

    def __init__(self, codec: LatentCodec, flip: bool = True) -> None:
        super().__init__(optimizer=torch.optim.SGD)  # never built
        self.codec = codec
        self.flip = flip
        #: Tells of a batch which samples, bool (B,), need not be encoded again; set by who keeps the latents.
        self.finished: Callable[[Mapping[str, Any]], Tensor] | None = None

    def cache_description(self) -> dict[str, Any]:
        """Plain data needed to read the latents and to tell them from those of another codec.

        Returns:
            ``kind`` ("moments" or "latent"), ``shape`` of what is stored of a sample, ``latent_shape``, ``image_shape``,
            ``scale``, ``flip``, ``codec`` (class and arguments but for the path of its weights) and ``weights`` (their
            digest).
        """
        config = self.codec.init_config
        config["init_args"].pop("path", None)  # the digest tells what it holds, wherever it lies
        return {
            "kind": self.codec.cache_kind,
            "shape": list(self.codec.moments_shape),
            "latent_shape": list(self.codec.latent_shape),
            "image_shape": list(self.codec.image_shape),
            "scale": self.codec.scale,
            "flip": self.flip,
            "codec": config,
            "weights": self.codec.fingerprint(),
        }

    @override
    def on_predict_start(self) -> None:
        """Refuse a codec without weights before anything is read."""
        self.codec.require_weights()

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Entries of a batch for a cache.

        Returns:
            ``index``, ``moments`` (B, *shape), with ``flip`` also ``moments_flip`` of the mirrored images, and ``label`` and
            ``path`` where the batch has them. Samples that are finished already are left out; where all are, nothing but an
            empty ``index`` is returned and the codec does not run.

        Raises:
            TypeError: the batch is no dictionary with ``index`` and ``image``.
        """
        if not isinstance(batch, Mapping) or not {"index", "image"} <= set(batch):
            given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise TypeError(
                f'LatentEncoder wants batches with "index" and "image", got {given}: give data whose predict set holds images,'
                " such as ImageFolder."
            )
        index = batch["index"]
        rows = torch.arange(len(index))
        if self.finished is not None:
            rows = rows[~self.finished(batch).cpu()]
        if not len(rows):
            return {"index": index[:0]}
        image_BCHW = batch["image"][rows.to(batch["image"].device)]
        found: dict[str, Any] = {"index": index[rows.to(index.device)], "moments": self.codec.moments(image_BCHW)}
        if self.flip:
            found["moments_flip"] = self.codec.moments(image_BCHW.flip(-1))
        if "label" in batch:
            found["label"] = batch["label"][rows.to(batch["label"].device)]
        if "path" in batch:
            found["path"] = [batch["path"][row] for row in rows.tolist()]
        return found
