# SPDX-License-Identifier: Apache-2.0
"""``compose`` through its installed entry point."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nemo_dsv4_cp.cli import compose as module
from nemo_dsv4_cp.cli.app import app

COMMAND = str(Path(sys.executable).with_name("nemo-dsv4-cp"))


def run(*arguments):
    return CliRunner().invoke(app, ["compose", *arguments])


@pytest.mark.slow  # tests/test_recipe.py trains the same recipe
def test_the_composed_tiny_recipe_trains_through_automodels_cli(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    overrides = ["step_scheduler.max_steps=2", f"checkpoint.checkpoint_dir={tmp_path}"]
    done = subprocess.run(
        [COMMAND, "compose", "tiny_cpu", *overrides, "-o", str(recipe), "--launch"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=1800,  # a loaded machine takes minutes
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 2
    head = recipe.read_text().splitlines()[:2]
    assert head[0] == f"# nemo-dsv4-cp compose tiny_cpu {' '.join(overrides)}"
    assert "torchrun --standalone --nproc-per-node 2 -m nemo_automodel.cli.app" in head[1]


def test_a_recipe_for_many_nodes_says_how_slurm_and_skypilot_launch_it():
    done = run("flash_sft_128k", "data=packed", "distributed.cp_size=16")
    assert done.exit_code == 0, done.output
    assert "sbatch --nodes=16 --gpus-per-node=8 slurm.sub" in done.stdout
    assert "SkyPilot: add a skypilot: section with num_nodes: 16" in done.stdout
    fields = yaml.safe_load(done.stdout)
    assert fields["distributed"]["cp_size"] == 16
    assert fields["packed_sequence"]["packed_sequence_size"] == 131072


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        (["distributed.cp_size=1"], 1),
        (["distributed.pp_size=2", "+distributed.pipeline.pp_schedule=1f1b"], 4),
    ],
)
def test_the_launch_line_starts_a_process_for_each_rank_and_stage(overrides, processes):
    done = run("tiny_cpu", *overrides)
    assert done.exit_code == 0, done.output
    assert f"--nproc-per-node {processes} " in done.stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flash_sft"], "none of the recipes flash_distillation, flash_indexer_warmup"),
        (["tiny_cpu", "data=tulu"], "Could not find 'data/tulu'"),
        (["tiny_cpu", "distributed.cp_sise=2"], "Could not override 'distributed.cp_sise'"),
        (["tiny_cpu", "a=b=="], "mismatched input"),
        (
            ["flash_packed", "distributed.cp_size=7"],
            "does not divide the 128 ranks; what works is distributed.cp_size: 1, 2, 4, 8, 16",
        ),
        (
            ["v41_packed", "distributed.ep_size=256"],
            "text_config.n_routed_experts=384; use 1, 2, 4",
        ),
        (
            ["tiny_cpu", "+context_parallel.overlap=false"],
            "nothing reads it there; context_parallel belongs under model.config: use "
            "++model.config.context_parallel.overlap=false",
        ),
        (["tiny_cpu", "+model.context_parallel.balance=on"], "++model.config.context_parallel.bal"),
        (["tiny_cpu", "+model.config.context_parallel.kernels=cuda"], "kernels='cuda'"),
        (["tiny_cpu", "+model.config.context_parallel.kernel=triton"], "did you mean 'kernels'"),
        (
            ["tiny_cpu", "model.config.context_parallel.pad_multiple=96"],
            "pad_multiple=96 is not a multiple of 128",
        ),
        (["tiny_cpu", "distributed.cp_size=0"], "distributed.cp_size=0 is not a size"),
        (["tiny_cpu", "--launch"], "name one with --output"),
        (["flash_sft_1m", "--launch", "-o", "x.yaml"], "is made for 16"),
        (["tiny_cpu", "-o", "nowhere/x.yaml"], "there is no directory nowhere"),
    ],
)
def test_a_mistake_ends_with_a_line_that_says_what_works(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


def test_names_and_overrides_are_completed():
    assert module._complete_name("flash_sft_1") == [
        "flash_sft_128k",
        "flash_sft_128k_indexer",
        "flash_sft_16k",
        "flash_sft_1m",
    ]
    assert module._complete_override("cp=") == ["cp=all_gather", "cp=boundary", "cp=off"]
