"""What all tests share."""

from collections.abc import Iterator

import pytest

from zoo.process import tune_process

tune_process()  # before torch is imported

from distributed import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The warm gloo ranks of this run: started when a test first asks, killed when the run ends or is interrupted."""
    ranks = RankPool()
    yield ranks
    ranks.close()
