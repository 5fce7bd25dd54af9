# SPDX-License-Identifier: Apache-2.0
"""What of a recipe is run with the shrunk model, and what is named as left out."""

from types import SimpleNamespace

import pytest

from nemo_dsv4_cp.tools import recipes
from nemo_dsv4_cp.tools.shrinking import left_out, left_out_v41, model_settings, shrink_v41


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
        (
            {"model": {"config": {"context_parallel": {"compressor_precision": "bf16x3"}}}},
            ["context_parallel.compressor_precision: bf16x3"],
        ),
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


def schedule(ratios, sources, selecting, candidates, engrams=()):
    """What of a ``DeepseekV41TextConfig`` layers are chosen by."""
    return SimpleNamespace(
        num_hidden_layers=len(ratios),
        compress_ratios=ratios,
        kv_source_layer_ids=sources,
        index_source_layer_ids=selecting,
        candidate_source_layer_id=candidates,
        candidate_block_size=8,
        engram_layer_ids=engrams,
        engram_max_ngram_size=4,
        sliding_window=128,
        hc_mult=4,
        routed_scaling_factor=1.5,
    )


FLASH_V41 = schedule(
    [0, 0] + [2] * 18 + [1] * 20,
    [2, 8, 14, 20],
    [2, 8, 14, 20, 24, 28, 32, 36],
    20,
    [1, 14],
)


@pytest.mark.parametrize(
    ("text", "ratios", "sources", "selecting", "candidates"),
    [
        (FLASH_V41, [0, 2, 2, 2, 1, 1, 1], [1, 3, 4], [1, 3, 4, 6], 4),
        (schedule([0, 0], [], [], -1), [0], [], [], -1),
        # The last layer of all is the first one that reuses, and 4 is the source it needs.
        (
            schedule([2, 1, 2, 1, 2, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], -1),
            [2, 1, 2, 1, 2, 2],
            [0, 1, 2, 3, 4],
            [0, 1, 2, 3, 4],
            -1,
        ),
    ],
)
def test_a_small_v41_has_every_kind_of_layer(text, ratios, sources, selecting, candidates):
    small = shrink_v41(text, None)["text_config"]
    assert small["compress_ratios"] == ratios
    assert small["num_hidden_layers"] == len(ratios)
    assert small["kv_source_layer_ids"] == sources
    assert small["index_source_layer_ids"] == selecting
    assert small["candidate_source_layer_id"] == candidates
    assert len(small["engram_num_embeddings"]) == len(text.engram_layer_ids)


def test_images_of_v41_are_named_as_left_out():
    assert left_out_v41({"vision_config": {"num_hidden_layers": 0}}) == ["quantization of keys"]
    assert "images (model.config.vision_config)" in left_out_v41({})
