# SPDX-License-Identifier: Apache-2.0
"""LoRA changes what it can train, leaves the frozen indexer out, and refuses grouped linears."""

import logging

import pytest
from nemo_automodel._transformers import infrastructure
from nemo_automodel.components._peft.lora import PeftConfig

from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.parity import cpu_backend, tiny_config


def adapted(options=None, **peft):
    """Return the modules that get adapters, through the function that AutoModel calls."""
    settings = tiny_config([0, 4], context_parallel=options)
    model = DeepseekV4ContextParallelForCausalLM(settings, backend=cpu_backend())
    config = PeftConfig(dim=4, use_triton=False, **peft)
    infrastructure.apply_lora_to_linear_modules(model, config, skip_freeze=True)
    return {name.removesuffix(".lora_A") for name, _ in model.named_modules() if "lora_A" in name}


def test_the_frozen_indexer_gets_no_adapters_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="nemo_dsv4_cp.automodel.lora"):
        names = adapted(target_modules=["*wkv", "*wq_b"])
    assert names == {
        "model.layers.0.self_attn.wkv",
        "model.layers.0.self_attn.wq_b",
        "model.layers.1.self_attn.wkv",
        "model.layers.1.self_attn.wq_b",
        "model.layers.1.self_attn.compressor.wkv",
    }
    assert "left out 2 modules of the frozen indexer" in caplog.text


def test_names_that_leave_the_indexer_alone_are_passed_on_as_they_are():
    model = DeepseekV4ContextParallelForCausalLM(tiny_config([0, 4]), backend=cpu_backend())
    config = PeftConfig(target_modules=["*wq_a"])
    assert model.resolve_lora_targets(config) is config


def test_all_but_some_modules_leaves_the_indexer_out_too():
    names = adapted(exclude_modules=["*wo_a", "*lm_head"])
    assert "model.layers.1.self_attn.wo_b" in names
    assert not [name for name in names if "indexer" in name or "wo_a" in name]


@pytest.mark.parametrize(
    ("peft", "setting"),
    [
        ({"target_modules": ["*"]}, r"peft\.target_modules=\['\*'\]"),
        ({"target_modules": ["*wo_a"]}, r"peft\.target_modules"),
        ({"match_all_linear": True}, r"peft\.match_all_linear=True"),
        ({"exclude_modules": ["*lm_head"]}, r"peft\.exclude_modules"),
    ],
)
def test_a_grouped_linear_is_refused_by_setting_and_name(peft, setting):
    with pytest.raises(ValueError, match=setting + r".* selects model\.layers\.0\.self_attn\.wo_a"):
        adapted(**peft)


def test_adapters_of_the_indexer_alone_are_refused():
    with pytest.raises(ValueError, match=r"nothing but the indexer .* would never train"):
        adapted(target_modules=["*indexer*"])


@pytest.mark.parametrize("target", ["*wq_b", "*indexer*", "*"])
def test_adapters_beside_a_loss_of_the_indexer_are_refused(target):
    options = {"indexer_loss": {"coefficient": 0.1}}
    with pytest.raises(ValueError, match=r"target_modules.* LoRA freezes the indexer that"):
        adapted(options, target_modules=[target])
