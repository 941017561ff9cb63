"""Positions of a batch's samples in the global order of an epoch, which name their random draws."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from zoo.strategy_contract import data_replicas, sample_positions

__all__ = ["eval_positions", "global_positions", "train_positions"]


def train_positions(module: LightningModule, batch_size: int) -> Tensor:
    """Positions of the current training batch, (batch_size,).

    Args:
        module: the module; without a trainer its samples are the first ones.
        batch_size: number of samples in this process's batch.
    """
    if module._trainer is None:
        return global_positions(module, batch_size, 0, batch_size)
    nominal = getattr(module.trainer.train_dataloader, "batch_size", None) or batch_size
    return global_positions(module, batch_size, module.trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1, nominal)


def eval_positions(module: LightningModule, batch_size: int) -> Tensor:
    """Positions of the current validation, test or prediction batch, (batch_size,); as `train_positions`."""
    loop = None if module._trainer is None else module.trainer._active_loop
    if loop is None:
        return global_positions(module, batch_size, 0, batch_size)
    trainer = module.trainer
    loader = (trainer.val_dataloaders if trainer.validating or trainer.training else
              trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders)  # fmt: skip
    # For predictions Lightning builds new loaders, around batches that are chosen already.
    sampler = getattr(loader, "batch_sampler", None)
    nominal = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None) or batch_size
    if trainer.training:  # validation inside fit
        loop = trainer.fit_loop.epoch_loop.val_loop
    progress = loop.batch_progress.current  # type: ignore[union-attr]
    return global_positions(module, batch_size, progress.ready - 1, nominal)


def global_positions(module: LightningModule, batch_size: int, batch_idx: int, nominal: int) -> Tensor:
    """Positions of this process's samples, (batch_size,); rank r of W holds r, r+W, r+2W, ...

    Args:
        module: the module.
        batch_size: number of samples in this process's batch.
        batch_idx: number of the batch in the epoch.
        nominal: number of samples in a full batch.
    """
    within = torch.arange(batch_size, device=module.device)
    if module._trainer is None:
        return batch_idx * nominal + within
    # A strategy that deals out samples in another way says which ones these are.
    positions = sample_positions(module.trainer.strategy, batch_size)
    if positions is not None:
        return positions.to(module.device)
    num_replicas, rank = data_replicas(module.trainer.strategy)
    return (batch_idx * nominal + within) * num_replicas + rank
