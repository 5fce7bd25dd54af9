# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.faults.launches import STEPS, losses, recipe_for, train


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The directory of a run at CP=2 that nothing happened to."""
    directory = tmp_path_factory.mktemp("reference")
    status = train(directory, recipe_for(directory, cp_size=2), processes=2)
    assert status == 0, (directory / "log").read_text(errors="replace")[-6000:]
    assert sorted(losses(directory)) == list(range(STEPS))
    return directory
