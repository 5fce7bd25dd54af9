import pytest

from nemo_dsv4_cp.tools import recipes
from nemo_dsv4_cp.tools.verification import left_out


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({}, []),
        ({"peft": {"dim": 8}}, ["LoRA (peft)"]),
        ({"peft": None, "fp8": {"enabled": False}}, []),
        ({"fp8": {"enabled": True}}, ["FP8 (fp8)"]),
        ({"quantization": {"load_in_4bit": True}}, ["quantisation (quantization)"]),
        ({"distributed": {"pp_size": 2}}, ["pipeline stages (distributed.pp_size: 2)"]),
        ({"distributed": {"pp_size": 1, "ep_size": None}}, []),
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
        "recomputation (distributed.activation_checkpointing)",
        "model.backend.attn: tilelang",
        "model.backend.experts: torch_mm",
        "model.backend.dispatcher: hybridep",
    ]
    assert left_out(recipes.compose("flash_lora").fields) == ["LoRA (peft)", *of_flash]
    assert (
        left_out(recipes.compose("flash_distillation").fields)[0] == "the teacher (teacher_model)"
    )
