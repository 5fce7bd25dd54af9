# SPDX-License-Identifier: Apache-2.0
"""Runs with and without the indexer's loss resume each other's checkpoints, or say why not."""

import pytest

from tests.faults.launches import recipe_for
from tests.recipes.launching import Failed

LOSS = {"indexer_loss": {"coefficient": 0.1}}
WARM_UP = LOSS | {"train_only": "indexer"}
CHECKPOINT = "epoch_0_step_1"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def train(tmp_path_factory, launcher):
    def run(options, *, restore_from=None, processes=1):
        """Train up to step 2, or go on from there to step 4; return the directory."""
        directory = tmp_path_factory.mktemp("run")
        recipe = recipe_for(directory, cp_size=processes, restore_from=restore_from)
        recipe["dataset"]["seq_length"] = 120
        recipe["model"]["config"]["context_parallel"] |= options
        recipe["step_scheduler"]["max_steps"] = 2 if restore_from is None else 4
        return launcher.train(directory, recipe, processes, {})

    return run


@pytest.fixture(scope="module")
def with_loss(train):
    return train(LOSS).directory / CHECKPOINT


@pytest.mark.parametrize(
    ("before", "parameter"),
    [
        ({}, "indexer.wkv.weight"),
        pytest.param(WARM_UP, "embed_tokens.weight", marks=SLOW),
    ],
)
def test_a_checkpoint_without_the_state_of_a_trained_parameter_is_refused_by_its_name(
    train, before, parameter
):
    checkpoint = train(before).directory / CHECKPOINT
    with pytest.raises(Failed, match=rf"ValueError: .*no optimizer state of .*{parameter}, which"):
        train(LOSS, restore_from=checkpoint, processes=2)


@pytest.mark.parametrize("options", [LOSS, *(pytest.param(o, marks=SLOW) for o in (WARM_UP, {}))])
def test_a_run_that_trains_no_more_goes_on(train, with_loss, options):
    assert len(train(options, restore_from=with_loss).losses) == 2
