# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import settings

from tests.ranks import RankPool

pytest_plugins = ["pytester", "tests.capabilities", "tests.recipes.results"]

settings.register_profile("patient", deadline=None)  # a loaded machine is no error
settings.load_profile("patient")
torch.compiler.set_stance("force_eager")  # AutoModel compiles anew for every length


@pytest.fixture(scope="session")
def ranks():
    """The worker processes of this run."""
    pool = RankPool()
    yield pool
    pool.stop()
