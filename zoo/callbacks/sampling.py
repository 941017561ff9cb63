"""Drawing samples from the module inside a callback: checked before the run starts, shared out over the ranks.

Shape suffixes: N samples, C channels, H height, W width.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from zoo.option_errors import nearest
from zoo.sampling import SupportsSampling, to_uint8


def check_sampling(pl_module: LightningModule, samplers: Sequence[str | None], nfes: Sequence[int | None], user: str) -> None:
    """Make sure, before the run starts, that the module can draw what a callback will ask for.

    Args:
        pl_module: The module.
        samplers: Names of samplers; None stands for the module's own.
        nfes: Numbers of network function evaluations; None stands for the module's own.
        user: Who asks, for the message.

    Raises:
        TypeError: If the module does not offer `SupportsSampling`.
        ValueError: If a sampler is unknown (the nearest name is given) or a number is less than 1.
    """
    if not isinstance(pl_module, SupportsSampling):
        raise TypeError(
            f"{user} draws samples, but {type(pl_module).__name__} does not offer zoo.sampling.SupportsSampling "
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


def draw_samples(
    trainer: Trainer,
    pl_module: LightningModule,
    num_samples: int,
    *,
    batch_size: int,
    seed: int,
    sampler: str | None,
    nfe: int | None,
) -> tuple[Tensor, int]:
    """Draw the samples 0 to N-1, each rank its share, in the precision of the run.

    Args:
        trainer: The trainer.
        pl_module: A module that offers `SupportsSampling`.
        num_samples: Number of samples N.
        batch_size: Samples per pass on each rank.
        seed: Seed of the samples.
        sampler: Name of the sampler.
        nfe: Network function evaluations per sample.

    Returns:
        uint8 images (N, C, H, W) in the order of the sample ids, on every rank, and the evaluations each really cost.
    """
    module = cast(SupportsSampling, pl_module)
    # Every rank draws equally many, so that ranks that compute together stay together; ids from N on are dropped.
    padded = math.ceil(num_samples / trainer.world_size) * trainer.world_size
    index_N = torch.arange(trainer.global_rank, padded, trainer.world_size, device=pl_module.device)
    shares = []
    spent = 0
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for index_B in index_N.split(batch_size):
            samples = module.sample(index_B, seed=seed, sampler=sampler, nfe=nfe)
            shares.append(to_uint8(samples.images))
            spent = samples.nfe
    share_NCHW = torch.cat(shares)
    if trainer.world_size == 1:
        return share_NCHW, spent
    gathered_RNCHW = trainer.strategy.all_gather(share_NCHW)
    return gathered_RNCHW.transpose(0, 1).flatten(0, 1)[:num_samples], spent
