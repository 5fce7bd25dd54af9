# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.recipes.trainings import Trainings


@pytest.fixture(scope="session")
def trainings(tmp_path_factory, launcher):
    """The launches of this run."""
    return Trainings(tmp_path_factory.mktemp("recipes"), launcher)
