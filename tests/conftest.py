"""What all tests share."""

import os
from collections.abc import Iterator

import pytest

# Before torch is imported: threads that wait for one another then sleep instead of spinning. Beside any other process
# (ranks, workers) spinning slows small networks down by a factor of ten and more.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from distributed import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The warm gloo ranks of this run: started when a test first asks, killed when the run ends or is interrupted."""
    ranks = RankPool()
    yield ranks
    ranks.close()
