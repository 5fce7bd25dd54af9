# SPDX-License-Identifier: Apache-2.0
"""What of a recipe is run with the shrunk model, and what is named as left out."""

import pytest

from nemo_dsv4_cp.tools import recipes
from nemo_dsv4_cp.tools.shrinking import left_out, model_settings


def test_settings_of_the_gates_and_of_mtp_are_kept_and_sizes_are_not():
    overrides = {"aux_loss_coeff": 1e-4, "n_routed_experts": 256, "dtype": "bfloat16"}
    recipe = {"model": {"moe_overrides": overrides, "mtp_loss_scaling_factor": 0.3}}
    assert model_settings(recipe) == {
        "moe_overrides": {"aux_loss_coeff": 1e-4},
        "mtp_loss_scaling_factor": 0.3,
    }
    assert model_settings({}) == {}


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({}, []),
        ({"peft": {"dim": 8}}, ["LoRA (peft)"]),
        ({"peft": None, "fp8": {"enabled": False}}, []),
        ({"fp8": {"enabled": True}}, ["FP8 (fp8)"]),
        ({"quantization": {"load_in_4bit": True}}, ["quantization (quantization)"]),
        ({"distributed": {"pp_size": 2}}, ["pipeline stages (distributed.pp_size: 2)"]),
        ({"distributed": {"pp_size": 1, "ep_size": None}}, []),
        ({"distributed": {"activation_checkpointing": True}}, []),
        ({"distributed": {"strategy": "megatron_fsdp"}}, ["distributed.strategy: megatron_fsdp"]),
        ({"freeze_config": {"freeze": ["x"]}}, ["frozen parameters (freeze_config)"]),
        ({"model": {"backend": {"attn": "eager", "experts": "torch"}}}, []),
        ({"model": {"backend": {"attn": "tilelang"}}}, ["model.backend.attn: tilelang"]),
    ],
)
def test_what_is_not_run_is_named_with_its_setting(recipe, named):
    assert left_out(recipe) == named


def test_what_is_left_out_of_the_packages_recipes():
    assert left_out(recipes.compose("tiny_cpu").fields) == []
    of_flash = [
        "expert parallelism (distributed.ep_size: 64)",
        "activation checkpointing as with ep_size above 1 (it ran as with ep_size: 1)",
        "model.backend.attn: tilelang",
        "model.backend.experts: torch_mm",
        "model.backend.dispatcher: hybridep",
    ]
    assert left_out(recipes.compose("flash_lora").fields) == ["LoRA (peft)", *of_flash]
    assert (
        left_out(recipes.compose("flash_distillation").fields)[0] == "the teacher (teacher_model)"
    )
