import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks():
    """The worker processes of this run."""
    pool = RankPool()
    yield pool
    pool.stop()
