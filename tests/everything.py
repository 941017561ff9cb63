"""Imports of the fork server: the whole zoo, and what its commands import when they run."""

import gc

import shtab  # noqa: F401
import torch.distributed.run
import torch.utils.tensorboard  # noqa: F401

import zoo.cli.command  # noqa: F401
from zoo.hub import import_everything

import_everything()
gc.collect()
gc.freeze()  # pages of what is imported stay shared with the forks
