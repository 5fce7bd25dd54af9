# SPDX-License-Identifier: Apache-2.0
"""The launcher ends what fails or hangs, and says why."""

import os
import time
from pathlib import Path

import pytest

from tests.processes import STILL_SECONDS, Stuck
from tests.recipes.launching import Failed

WORKS = "tests.recipes.test_launching.Works"


class Works:
    """A recipe that trains nothing: rank 1 raises, or all wait, as its config specifies."""

    def __init__(self, cfg):
        self.cfg = cfg

    def setup(self):
        print("set up", flush=True)

    def run_train_validation_loop(self):
        if self.cfg.raises and os.environ["RANK"] == "1":
            raise ValueError("rank 1 does not like this recipe")
        while self.cfg.waits:
            time.sleep(1)
        Path(f"done_{os.environ['RANK']}").touch()


@pytest.fixture
def launch(tmp_path_factory, launcher):
    def run(*, raises: bool = False, waits: bool = False) -> list[str]:
        directory = tmp_path_factory.mktemp("launch")
        recipe = {"recipe": WORKS, "checkpoint": {}, "raises": raises, "waits": waits}
        # One that waits logs nothing more, however long it is given.
        still_seconds = 5 if waits and not raises else STILL_SECONDS
        launcher.launch(directory, recipe, processes=2, still_seconds=still_seconds)
        return sorted(path.name for path in directory.glob("done_*"))

    return run


def test_every_rank_runs_the_recipe_to_its_end(launch):
    assert launch() == ["done_0", "done_1"]


def test_a_rank_that_raises_ends_the_others_and_gives_its_error(launch):
    with pytest.raises(Failed, match=r"^rank 1: ValueError: rank 1 does not like") as error:
        launch(raises=True, waits=True)
    assert not error.value.trained


def test_ranks_that_log_nothing_new_are_ended_and_the_next_launch_works(launch):
    with pytest.raises(Stuck, match="nothing new for 5 s"):
        launch(waits=True)
    assert launch() == ["done_0", "done_1"]
