# SPDX-License-Identifier: Apache-2.0
"""A rank dies, stops or raises: all end, the error says who and why, and no step is lost."""

import os
import re
import signal
from pathlib import Path

from tests.faults.comparing import assert_goes_on
from tests.faults.launches import (
    FAULT_STEP,
    STEPS_A_CHECKPOINT,
    Harmed,
    first_error,
    recipe_for,
    train,
)

TIMEOUT_MINUTES = 1  # less, and ranks that start apart on a busy machine would not meet
# Beside the timeout: failure attribution (10 s), and torchrun, which waits 30 s for a stopped
# process to end.
ALLOWANCE_SECONDS = 180
RANK = 1
RESUMED_STEP = FAULT_STEP // STEPS_A_CHECKPOINT * STEPS_A_CHECKPOINT


def harm(directory: Path, *, place: str = "layer", with_signal: int | None) -> Harmed:
    """Start a run, and send a signal to a rank at its fault; without one, the rank raises there."""
    fault = {"rank": RANK, "step": FAULT_STEP, "place": place, "raises": with_signal is None}
    recipe = recipe_for(
        directory,
        cp_size=2,
        recipe="tests.faults.recipes.FaultyRecipe",
        fault=fault,
        dist_env={"timeout_minutes": TIMEOUT_MINUTES},
    )
    recipe["model"]["config"].setdefault("context_parallel", {})["failure_attribution"] = True
    run = Harmed(directory, recipe, processes=2)
    try:
        run.wait_for_the_fault()
        if with_signal is not None:
            os.kill(run.pids()[RANK], with_signal)
    except BaseException:
        run.end()
        raise
    return run


def assert_ends(run: Harmed, *, says: str) -> None:
    """All ranks ended in time and in error, and the first that is said of one names the cause."""
    try:
        status, seconds = run.status(within=60 * TIMEOUT_MINUTES + ALLOWANCE_SECONDS)
        log = run.log.read_text(errors="replace")
        print(f"ended with {status} after {seconds:.0f} s; first error: {first_error(log)}")
        assert status != 0
        assert run.alive() == []
        assert re.search(says, first_error(log)), log[-6000:]
    finally:
        run.end()


def assert_resumes(directory: Path, reference: Path) -> None:
    """The stock recipe, in the same directory, goes on where the last whole checkpoint is."""
    assert os.readlink(directory / "LATEST") == f"epoch_0_step_{RESUMED_STEP - 1}"
    assert train(directory, recipe_for(directory, cp_size=2), processes=2) == 0
    assert f"epoch_0_step_{RESUMED_STEP - 1}\n" in (directory / "log").read_text(errors="replace")
    assert_goes_on(directory, reference, step=RESUMED_STEP)


# Who comes first: torchrun, which looks at its processes ten times a second, or the other rank.
KILLED = rf"failed \(exitcode: -9\) local_rank: {RANK} |rank {RANK} gave no sign"


def test_a_rank_that_is_killed_in_a_step_ends_all_and_is_named(tmp_path, reference):
    run = harm(tmp_path, with_signal=signal.SIGKILL)
    assert_ends(run, says=KILLED)
    assert_resumes(tmp_path, reference)


def test_a_rank_that_stops_answering_ends_all_at_the_timeout_and_is_named(tmp_path, reference):
    run = harm(tmp_path, with_signal=signal.SIGSTOP)
    assert_ends(run, says=rf"rank {RANK} gave no sign for .* stopped or hanging")
    assert_resumes(tmp_path, reference)


def test_an_error_in_a_layer_of_one_rank_ends_all_and_is_the_first_that_is_said(
    tmp_path, reference
):
    run = harm(tmp_path, with_signal=None)
    assert_ends(run, says=rf"\[rank{RANK}\]: ValueError: a fault in layer 2")
    assert_resumes(tmp_path, reference)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before_to_resume(tmp_path, reference):
    run = harm(tmp_path, place="checkpoint", with_signal=signal.SIGKILL)
    assert_ends(run, says=KILLED)
    broken = tmp_path / f"epoch_0_step_{FAULT_STEP}"
    assert list(broken.glob("model/*.safetensors"))  # the weights were written,
    assert not list(broken.glob("optim/*.distcp"))  # and the optimizer was not
    assert_resumes(tmp_path, reference)
