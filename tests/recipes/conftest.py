# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.recipes.trainings import Trainings


@pytest.fixture(scope="session")
def trainings(tmp_path_factory):
    """The launches of this run."""
    found = Trainings(tmp_path_factory.mktemp("recipes"))
    yield found
    found.stop()
