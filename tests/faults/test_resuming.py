# SPDX-License-Identifier: Apache-2.0
"""A checkpoint goes on at another cp_size with the losses of the run that wrote it."""

import shutil
from pathlib import Path

import pytest

from nemo_dsv4_cp.automodel.resume import KEY
from tests.faults.comparing import assert_goes_on
from tests.faults.launches import STEPS_A_CHECKPOINT, recipe_for, train


@pytest.fixture(scope="module")
def resume(tmp_path_factory):
    def run(checkpoint: Path, *, dp_size: int = 1, cp_size: int) -> Path:
        """Go on from a checkpoint, in a directory of its own."""
        directory = tmp_path_factory.mktemp(f"dp_{dp_size}_cp_{cp_size}")
        recipe = recipe_for(directory, cp_size=cp_size, restore_from=checkpoint)
        assert train(directory, recipe, dp_size * cp_size) == 0, log(directory)[-6000:]
        return directory

    return run


def log(directory: Path) -> str:
    return (directory / "log").read_text(errors="replace")


def checkpoint(directory: Path, step: int) -> Path:
    """Return the checkpoint before a step."""
    return directory / f"epoch_0_step_{step - 1}"


@pytest.fixture(scope="module")
def at_four(resume, reference):
    return resume(checkpoint(reference, 2), cp_size=4)


def test_a_checkpoint_of_cp_2_goes_on_at_cp_1(resume, reference):
    assert_goes_on(resume(checkpoint(reference, 2), cp_size=1), reference, step=2)


def test_a_checkpoint_of_cp_2_goes_on_at_cp_4(at_four, reference):
    assert_goes_on(at_four, reference, step=2)


def test_a_checkpoint_of_cp_4_goes_on_at_cp_2(resume, at_four, reference):
    assert_goes_on(resume(checkpoint(at_four, 4), cp_size=2), reference, step=4)


@pytest.fixture(scope="module")
def two_data_ranks(tmp_path_factory):
    """The directory of two steps of two data-parallel ranks, a sample each."""
    directory = tmp_path_factory.mktemp("dp_2_cp_1")
    steps = {"max_steps": STEPS_A_CHECKPOINT}
    recipe = recipe_for(directory, cp_size=1, step_scheduler=steps)
    assert train(directory, recipe, processes=2) == 0, log(directory)[-6000:]
    return directory


def test_two_data_ranks_go_on_as_one_of_cp_2_with_the_next_samples(
    resume, two_data_ranks, reference
):
    assert_goes_on(resume(checkpoint(two_data_ranks, 2), cp_size=2), reference, step=2)


def test_one_data_rank_of_cp_2_goes_on_as_two_of_cp_2(resume, reference):
    assert_goes_on(resume(checkpoint(reference, 2), dp_size=2, cp_size=2), reference, step=2)


def test_all_ranks_refuse_to_guess_which_samples_other_data_ranks_took(two_data_ranks, tmp_path):
    plain = shutil.copytree(checkpoint(two_data_ranks, 2), tmp_path / "plain")
    (plain / f"{KEY}.pt").unlink()  # as AutoModel without this package writes it
    recipe = recipe_for(tmp_path, cp_size=2, restore_from=plain)
    assert train(tmp_path, recipe, processes=2) != 0
    for rank in range(2):
        assert f"[rank{rank}]: ValueError: distributed.cp_size=2 leaves 1 data" in log(tmp_path)
