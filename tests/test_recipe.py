"""Recipes launched through the host's own CLI, as a user launches them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_dsv4_cp.recipes import compose


def tiny():
    return compose("tiny_cpu").fields


PACKED = {
    "dataset": {"seq_length": 300, "shortest": 5, "num_samples": 120},
    "packed_sequence": {"packed_sequence_size": 1000},
    "step_scheduler": {"max_steps": 2},
}


class Failed(AssertionError):
    """A launch that exited with an error; the message is the end of its output."""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    def run(name: str, processes: int, **changes) -> tuple[list[float], Path]:
        """Train the tiny recipe with sections changed; return its losses and directory."""
        directory = tmp_path_factory.mktemp(name)
        recipe = tiny()
        for section, values in changes.items():
            known = recipe.get(section)
            recipe[section] = (known or {}) | values if isinstance(values, dict) else values
        recipe["checkpoint"]["checkpoint_dir"] = str(directory)
        path = directory / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "nemo_automodel.cli.app", str(path)]
        done = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise Failed((done.stdout + done.stderr)[-6000:])
        lines = (directory / "training.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], directory

    return run


@pytest.fixture(scope="module")
def trained(launch):
    """Four steps at CP=2, with a checkpoint at the end."""
    return launch(
        "trained",
        2,
        step_scheduler={"max_steps": 4, "ckpt_every_steps": 4},
        checkpoint={
            "enabled": True,
            "model_save_format": "safetensors",
            "save_consolidated": True,
        },
    )


def test_the_cli_trains_at_cp_2_and_the_loss_falls(trained):
    losses, _ = trained
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2


def test_expert_parallelism_and_checkpointing_change_no_loss(trained, launch):
    losses, _ = launch(
        "expert_parallel",
        2,
        step_scheduler={"max_steps": 4},
        distributed={"ep_size": 2, "activation_checkpointing": True},
    )
    assert losses == pytest.approx(trained[0], abs=1e-4)
    assert losses[0] == pytest.approx(trained[0][0], abs=1e-5)


def test_packed_rows_mtp_and_gradient_accumulation_at_cp_2_equal_one_rank(launch):
    config = tiny()["model"]["config"]
    changes = PACKED | {
        "model": {"config": config | {"num_nextn_predict_layers": 2}},
        "step_scheduler": {"max_steps": 2, "global_batch_size": 4, "local_batch_size": 2},
    }
    cut, _ = launch("packed_cp_2", 2, **changes)
    whole, _ = launch("packed_cp_1", 1, **changes | {"distributed": {"cp_size": 1}})
    assert cut == pytest.approx(whole, abs=1e-4)
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)


def test_distillation_into_lora_on_packed_rows_at_cp_2_equals_one_rank(launch):
    teacher = tiny()["model"]
    teacher["config"] |= {"num_hidden_layers": 2, "compress_ratios": [4, 128]}
    changes = PACKED | {
        "recipe": "tests.tokenizerless.TokenizerlessDistillationRecipe",
        "teacher_model": teacher,
        "peft": {
            "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
            "target_modules": ["*wq_a", "*wq_b", "*wkv", "*wo_b"],
            "dim": 8,
            "alpha": 16,
        },
        "kd_ratio": 0.5,
        "kd_loss_fn": {"_target_": "nemo_automodel.components.loss.kd_loss.KDLoss"},
    }
    cut, _ = launch("distilled_cp_2", 2, **changes)
    whole, _ = launch("distilled_cp_1", 1, distributed={"cp_size": 1}, **changes)
    assert cut == pytest.approx(whole, abs=1e-4)
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)


def test_a_checkpoint_loads_without_the_plugin_and_back(trained, launch):
    _, directory = trained
    (saved,) = directory.glob("epoch_*/model/consolidated")
    assert json.loads((saved / "config.json").read_text())["architectures"] == [
        "DeepseekV4ForCausalLM"
    ]
    # The same two samples a step: one on each data-parallel rank, or both cut in two.
    changes = {
        "step_scheduler": {"max_steps": 1, "global_batch_size": 2},
        "dataset": {"tokenizer": None},
    }
    plain_model = {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
        "load_base_model": True,
        "config": {
            "_target_": "nemo_automodel.components.models.deepseek_v4.config."
            "DeepseekV4Config.from_pretrained",
            "pretrained_model_name_or_path": str(saved),
            "name_or_path": str(saved),
        },
    }
    plain, _ = launch("plain", 2, distributed={"cp_size": 1}, model=plain_model, **changes)
    target = "nemo_dsv4_cp.DeepseekV4ContextParallelConfig.from_pretrained"
    our_model = plain_model | {"config": plain_model["config"] | {"_target_": target}}
    ours, _ = launch("ours", 2, model=our_model, **changes)
    assert ours[0] == pytest.approx(plain[0], abs=1e-5)
    assert ours[0] < trained[0][0]  # trained weights, not random ones


def test_a_mistake_in_the_block_ends_the_run_before_the_model_is_built(launch):
    config = tiny()["model"]["config"] | {"context_parallel": {"pad_multiple": 96}}
    with pytest.raises(Failed, match=r"pad_multiple=96 is not a multiple of 128"):
        launch("mistaken", 1, distributed={"cp_size": 1}, model={"config": config})
