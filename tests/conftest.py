# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import settings

from tests.examples import PROFILE
from tests.ranks import RankPool, fork_ranks

pytest_plugins = [
    "pytester",
    "tests.capabilities",
    "tests.recipes.results",
    "tests.bench.kernel_table",
]

# No deadline: a loaded machine is no error. By default every run draws the same examples.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, derandomize=False)
settings.register_profile("many", deadline=None, derandomize=False)
settings.load_profile(PROFILE)
torch.compiler.set_stance("force_eager")  # AutoModel compiles anew for every length

LONGEST = [
    f"tests/{name}.py"
    for name in (
        "recipes/test_options",
        "test_recipe",
        "test_recipe_v41",
        "kernels/triton/test_parity",
        "test_model",
        "test_v41",
    )
]
"""Files that start first when several run at a time, so that none is left to run alone."""


def pytest_collection_modifyitems(items):
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(scope="session")
def ranks():
    """The worker processes of this run."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture
def forked_local_ranks(monkeypatch):
    """Ranks of ``verify`` and ``bench`` are forks, which need not import AutoModel."""
    monkeypatch.setattr("nemo_dsv4_cp.tools.local_ranks.spawn", fork_ranks)


@pytest.fixture(scope="session")
def launcher():
    """What launches recipes on forked processes."""
    from tests.recipes.launching import Launcher  # kernels are tested without AutoModel, too

    found = Launcher()
    yield found
    found.stop()
