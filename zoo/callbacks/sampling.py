"""Drawing samples from the module inside a callback: checked before the run starts, shared out over the ranks.

Shape suffixes: N samples, C channels, H height, W width, L bytes of the longest text.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from zoo.base.nearest import nearest
from zoo.base.samples import ChecksSampling, Samples, SupportsSampling, TextSamples, to_uint8
from zoo.metrics.feature_statistics import FeatureStream

T = TypeVar("T")

_NO_UTF8 = b"\xff"  # a byte that no text contains


def check_sampling(
    pl_module: LightningModule,
    samplers: Sequence[str | None],
    nfes: Sequence[int | None],
    user: str,
    kind: type[Samples] | type[TextSamples],
) -> None:
    """Make sure, before the run starts, that the module can draw what a callback will ask for, as far as the module can tell.

    Args:
        pl_module: The module.
        samplers: Names of samplers; None stands for the module's own.
        nfes: Numbers of network function evaluations; None stands for the module's own.
        user: Who asks, for the message.
        kind: What is wanted, images or texts.

    Raises:
        TypeError: If the module does not offer `SupportsSampling`, or draws the other kind.
        ValueError: If a sampler is unknown (the nearest name is given), or a number is less than 1 or too few for a sampler.
    """
    if not isinstance(pl_module, SupportsSampling):
        raise TypeError(
            f"{user} draws samples, but {type(pl_module).__name__} does not offer zoo.base.samples.SupportsSampling "
            "(`sample` and `sampler_names`): add these, or remove the callback."
        )
    known = pl_module.sampler_names
    for sampler in samplers:
        if sampler is not None and sampler not in known:
            raise ValueError(
                f"{user}: {type(pl_module).__name__} has no sampler {sampler!r}{nearest(sampler, known)} "
                f"(it has {', '.join(known)})."
            )
    for nfe in nfes:
        if nfe is not None and nfe < 1:
            raise ValueError(f"{user}: the number of network function evaluations must be at least 1, got nfe={nfe}.")
    if not isinstance(pl_module, ChecksSampling):
        return
    wanted, drawn = ("texts" if issubclass(found, TextSamples) else "images" for found in (kind, pl_module.sample_type))
    if wanted != drawn:
        raise TypeError(
            f"{user} wants {wanted}, and {type(pl_module).__name__} draws {drawn} as it is configured: remove the callback."
        )
    for sampler, nfe in itertools.product(samplers, nfes):
        try:
            pl_module.check_sampler(sampler, nfe)
        except ValueError as error:
            raise ValueError(f"{user}: {sampler or 'its own sampler'} with nfe={nfe}: {error}") from error


def check_cadence(trainer: Trainer, every_n_epochs: int | None, user: str) -> None:
    """Make sure that a callback that acts in every n-th validation will get its turn.

    Raises:
        ValueError: If training runs without validation.
    """
    if every_n_epochs is not None and not trainer.enable_validation:
        raise ValueError(
            f"{user}: every_n_epochs={every_n_epochs} acts in validation, and this run has none: "
            "give it a validation loader and step, or remove the callback."
        )


def is_due(trainer: Trainer, every_n_epochs: int | None) -> bool:
    """Whether this validation inside `fit` is one of an n-th epoch."""
    inside_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
    return inside_fit and every_n_epochs is not None and (trainer.current_epoch + 1) % every_n_epochs == 0


def draw_images(trainer: Trainer, pl_module: LightningModule, num_samples: int, **options: Any) -> tuple[Tensor, int]:
    """Draw the images 0 to N-1, each rank its share, in the precision of the run.

    Args:
        trainer: The trainer.
        pl_module: A module that offers `SupportsSampling`.
        num_samples: Number of samples N.
        options: `batch_size`, samples per pass on each rank; and `seed`, `sampler`, `nfe` of the module's `sample`.

    Returns:
        uint8 images (N, C, H, W) in the order of the sample ids, on every rank, and the evaluations each really cost.

    Raises:
        TypeError: If the module draws texts.
    """
    shares, spent = _draw_share(trainer, pl_module, num_samples, _pixels, **options)
    return _gather(trainer, torch.cat(shares), num_samples), spent


def draw_texts(trainer: Trainer, pl_module: LightningModule, num_samples: int, **options: Any) -> tuple[list[str], int]:
    """Draw the texts 0 to N-1; arguments as of `draw_images`.

    Returns:
        The texts in the order of the sample ids, on every rank, and the evaluations each really cost.

    Raises:
        TypeError: If the module draws images.
    """
    shares, spent = _draw_share(trainer, pl_module, num_samples, _texts, **options)
    rows = [text.encode() for share in shares for text in share]
    width = torch.tensor(max(1, *map(len, rows)), device=pl_module.device)  # 1, if all texts are empty
    if trainer.world_size > 1:
        width = trainer.strategy.reduce(width, reduce_op="max")
    padded = b"".join(row.ljust(int(width), _NO_UTF8) for row in rows)
    bytes_NL = torch.frombuffer(bytearray(padded), dtype=torch.uint8).reshape(len(rows), int(width)).to(pl_module.device)
    found = _gather(trainer, bytes_NL, num_samples).cpu().numpy()
    return [row.tobytes().rstrip(_NO_UTF8).decode() for row in found], spent


def draw_features(trainer: Trainer, pl_module: LightningModule, num_samples: int, stream: FeatureStream, **options: Any) -> int:
    """Draw the images 0 to N-1 and take their features, batch by batch, each rank its share; no image is kept.

    Features are computed outside of the run's precision, so that they are the same whatever it is.

    Args:
        trainer: The trainer.
        pl_module: A module that offers `SupportsSampling`.
        num_samples: Number of samples N.
        stream: What takes up the features of all ranks in the order of the sample ids, on rank 0; left as it is on others.
        options: As for `draw_images`.

    Returns:
        The evaluations each sample really cost.

    Raises:
        TypeError: If the module draws texts.
    """
    done, spent = 0, 0
    for image_BCHW, nfe in _draw_batches(trainer, pl_module, num_samples, _pixels, **options):
        features_BD, logits_BK = stream.extract(image_BCHW)
        # The ids of one batch of all ranks follow one another, so they can be taken up now.
        features_BD = _gather(trainer, features_BD, num_samples - done)
        logits_BK = None if logits_BK is None else _gather(trainer, logits_BK, num_samples - done)
        done, spent = done + len(features_BD), nfe
        if trainer.is_global_zero:
            stream.add(features_BD, logits_BK)
    return spent


def _draw_share(
    trainer: Trainer, pl_module: LightningModule, num_samples: int, content: Callable[[Samples | TextSamples], T], **options: Any
) -> tuple[list[T], int]:
    """Draw this rank's samples, batch by batch, with the evaluations that each sample really cost."""
    share, spent = [], 0
    for found, nfe in _draw_batches(trainer, pl_module, num_samples, content, **options):
        share.append(found)
        spent = nfe
    return share, spent


def _draw_batches(
    trainer: Trainer,
    pl_module: LightningModule,
    num_samples: int,
    content: Callable[[Samples | TextSamples], T],
    *,
    batch_size: int,
    seed: int,
    sampler: str | None,
    nfe: int | None,
) -> Iterator[tuple[T, int]]:
    """Draw this rank's share, a batch at a time: its content, and the evaluations each sample really cost."""
    module = cast(SupportsSampling, pl_module)
    # Every rank draws equally many, so that ranks that compute together stay together; ids from N on are dropped.
    padded = math.ceil(num_samples / trainer.world_size) * trainer.world_size
    index_N = torch.arange(trainer.global_rank, padded, trainer.world_size, device=pl_module.device)
    for index_B in index_N.split(batch_size):
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            samples = module.sample(index_B, seed=seed, sampler=sampler, nfe=nfe)
            found = content(samples)
        yield found, samples.nfe


def _gather(trainer: Trainer, share: Tensor, num_samples: int) -> Tensor:
    """The shares of all ranks (..., one row a sample) in the order of the sample ids."""
    if trainer.world_size == 1:
        return share
    return trainer.strategy.all_gather(share).transpose(0, 1).flatten(0, 1)[:num_samples]


def _pixels(samples: Samples | TextSamples) -> Tensor:
    if not isinstance(samples, Samples):
        raise TypeError(
            f"Images are needed, but the module's `sample` gave {type(samples).__name__}, not a zoo.base.samples.Samples."
        )
    return to_uint8(samples.images)


def _texts(samples: Samples | TextSamples) -> list[str]:
    if not isinstance(samples, TextSamples):
        raise TypeError(
            f"Texts are wanted, and the module's `sample` gave {type(samples).__name__}, not zoo.base.samples.TextSamples."
        )
    return samples.texts
