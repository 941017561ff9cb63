"""What all tests share."""

import os
from collections.abc import Iterator

import pytest

# Before torch is imported: threads that wait for one another spin for a moment only, then sleep. GNU's default is to spin
# for long, which beside any other busy process (ranks, workers) slows small networks down several times.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from distributed import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The warm gloo ranks of this run: started when a test first asks, killed when the run ends or is interrupted."""
    ranks = RankPool()
    yield ranks
    ranks.close()
