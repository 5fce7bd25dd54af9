# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import settings

from tests.examples import PROFILE
from tests.ranks import RankPool
from tests.recipes.launching import Launcher

pytest_plugins = ["pytester", "tests.capabilities", "tests.recipes.results"]

# No deadline: a loaded machine is no error. By default every run draws the same examples.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, derandomize=False)
settings.register_profile("many", deadline=None, derandomize=False)
settings.load_profile(PROFILE)
torch.compiler.set_stance("force_eager")  # AutoModel compiles anew for every length


@pytest.fixture(scope="session")
def ranks():
    """The worker processes of this run."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def launcher():
    """What launches recipes on forked processes."""
    found = Launcher()
    yield found
    found.stop()
