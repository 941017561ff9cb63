"""What all tests share."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from zoo.cli.process import tune_process

# Before torch is imported: tests run beside one another, so that each has one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers would import torch in each
tune_process()

from hypothesis import HealthCheck, settings  # noqa: E402

if TYPE_CHECKING:
    from distributed import RankPool

if "PYTEST_XDIST_WORKER" in os.environ:
    from fork_server import fork_server_here

    fork_server_here()

# What is imported stays: the collector looks for garbage less often.
gc.set_threshold(50_000, 20, 100)

# The same examples in each run, and no test that looks at the clock.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A group, a seed, or a level of messages, that a test leaves in this process would be that of the next."""
    levels = {name: logging.getLogger(name).level for name in ("lightning", "lightning.pytorch", "lightning.fabric")}
    seeds = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    yield
    for name, value in seeds.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def pool() -> "Iterator[RankPool]":
    """The warm gloo ranks of this run: started when a test first asks, killed when the run ends or is interrupted."""
    from distributed import RankPool  # where tests run, not in the process that hands them out

    ranks = RankPool()
    yield ranks
    ranks.close()
