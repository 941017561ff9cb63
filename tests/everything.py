"""Imports of the fork server: the whole zoo, and what its commands import when they run."""

import gc

import shtab  # noqa: F401
import torch.distributed.run
import torch.utils.tensorboard  # noqa: F401

import datamodules
import strategies
from zoo.hub import import_methods

import_methods()
for package in (datamodules, strategies):
    for name in package.__all__:
        getattr(package, name)
gc.collect()
gc.freeze()  # pages of what is imported stay shared with the forks
