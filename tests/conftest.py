import pytest
import torch

from tests.ranks import RankPool

pytest_plugins = ["pytester", "tests.capabilities"]

torch.compiler.set_stance("force_eager")  # the host compiles anew for every length


@pytest.fixture(scope="session")
def ranks():
    """The worker processes of this run."""
    pool = RankPool()
    yield pool
    pool.stop()
