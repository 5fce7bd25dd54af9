# SPDX-License-Identifier: Apache-2.0
"""Hundreds of steps of drawn lengths, packed and not, and two trainings in one process."""

import json
from pathlib import Path

import pytest

from nemo_dsv4_cp.tools.recipes import compose
from tests.processes import cpu_environment, on_ranks, run_to_log

STEPS, STEPS_A_COUNT = 500, 25
SETTLED = 200
"""Steps after which all that is bounded is full."""
# Of AutoModel itself, which a run without the plugin leaves changed, too.
STATE_OF_AUTOMODEL = {
    "nemo_automodel.components.models.common.utils.IS_FIRST_MICROBATCH",
    "nemo_automodel.components.models.common.utils.IS_OPTIM_STEP",
    "nemo_automodel.components.moe.megatron.moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale",
    "nemo_automodel.shared.te_patches._TE_PATCHES_APPLIED",
}


def recipe_for(directory: Path, *, steps: int):
    """Return the tiny recipe with documents of 5 to 300 tokens, two microbatches of 4 a step."""
    recipe = compose("tiny_cpu").fields
    recipe["dataset"] |= {"seq_length": 300, "shortest": 5}
    recipe["dataloader"]["collate_fn"] = "tests.soak.batches.padded_or_packed"
    recipe["step_scheduler"] |= {
        "max_steps": steps,
        "local_batch_size": 4,
        "global_batch_size": 8,
        "num_epochs": 10,
    }
    recipe["distributed"] |= {"activation_checkpointing": True, "ep_size": 2}
    recipe["model"]["config"]["context_parallel"]["balance"] = "on"
    recipe["checkpoint"]["checkpoint_dir"] = str(directory)
    return recipe


def run(directory: Path, recipe, *program: str) -> None:
    """Run a recipe on two ranks; it must end well."""
    log, command = directory / "log", on_ranks(directory, recipe, 2, *program)
    status = run_to_log(command, log, cwd=directory, env=cpu_environment())
    assert status == 0, log.read_text(errors="replace")[-6000:]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_holds_does_not_grow(soaked, rank):
    every = [json.loads(line) for line in (soaked / f"held_{rank}.jsonl").open()]
    assert [held["step"] for held in every] == list(range(STEPS_A_COUNT, STEPS + 1, STEPS_A_COUNT))
    for held in every:
        print(held)
    settled = [held for held in every if held["step"] >= SETTLED]
    for count in ("top_k_indices", "layouts", "groups", "files", "threads", "patches"):
        assert {held[count] for held in settled[:-1]} == {settled[0][count]}, count
        assert settled[-1][count] <= settled[0][count], count  # AutoModel has closed its log
    assert settled[0]["top_k_indices"] == 0
    half = len(settled) // 2

    def mean(count, of):
        return sum(held[count] for held in of) / len(of)

    # Layouts that are remembered differ in what they hold, and rank 0 keeps its log's last steps.
    for count, spare in (("tensors", 50), ("tensor_bytes", 200_000), ("resident_mib", 20)):
        assert mean(count, settled[half:]) <= mean(count, settled[:half]) + spare, count


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """The directory of a run of many steps whose ranks counted what they held."""
    directory = tmp_path_factory.mktemp("soak")
    recipe = recipe_for(directory, steps=STEPS) | {
        "recipe": "tests.soak.recipes.WatchedRecipe",
        "watch": {"every_steps": STEPS_A_COUNT},
    }
    run(directory, recipe)
    steps = [json.loads(line) for line in (directory / "training.jsonl").open()]
    assert len(steps) == STEPS
    return directory


def test_two_trainings_in_one_process_and_automodel_given_back(tmp_path):
    recipe = recipe_for(tmp_path, steps=6)
    run(tmp_path, recipe, "-m", "tests.soak.twice")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / training / "training.jsonl").open()]
        for training in ("first", "second")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found_{rank}.json").read_text())
        print(found)
        first, second = found["left"]
        for count in ("top_k_indices", "groups", "files", "threads", "patches"):
            assert second[count] == first[count], count
        assert first["groups"] == first["top_k_indices"] == 0
        assert second["tensors"] <= first["tensors"] + 50
        assert set(found["not_given_back"]) <= STATE_OF_AUTOMODEL
        assert set(found["patched"]) > set(found["not_given_back"])
