# SPDX-License-Identifier: Apache-2.0
"""LoRA on V4.1: as on V4 in test_lora.py, with its own frozen indexer and grouped projection."""

import logging

import pytest
import torch
from nemo_automodel._transformers import infrastructure
from nemo_automodel.components._peft.lora import PeftConfig

from tests.parity import cpu_backend

pytest.importorskip("nemo_automodel.components.models.deepseek_v41")
from nemo_dsv4_cp.model_v41 import DeepseekV41ContextParallelForCausalLM
from tests.parity_v41 import tiny_config


def adapted(**peft):
    """Return a model of three layers with adapters, through the function that AutoModel calls."""
    config = tiny_config({}, num_hidden_layers=3, engram_layer_ids=[], engram_num_embeddings=[])
    model = DeepseekV41ContextParallelForCausalLM(config, backend=cpu_backend())
    peft_config = PeftConfig(dim=4, use_triton=False, **peft)
    infrastructure.apply_lora_to_linear_modules(model, peft_config)
    return model


def test_the_frozen_indexer_gets_no_adapters_and_all_others_train(caplog):
    with caplog.at_level(logging.INFO, logger="nemo_dsv4_cp.automodel.lora"):
        model = adapted(target_modules=["*wkv", "*wq_b"])
    assert "left out 1 modules of the frozen indexer" in caplog.text
    model(torch.arange(3, 19)[None]).logits.sum().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == {
        *(f"model.layers.{layer}.attn.{name}" for layer in range(3) for name in ("wkv", "wq_b")),
        "model.layers.1.attn.compressor.wkv",
    }
    assert all(weight.grad is not None for weight in trained.values())


@pytest.mark.parametrize(
    "peft", [{"target_modules": ["*"]}, {"match_all_linear": True}, {"exclude_modules": ["*head"]}]
)
def test_a_grouped_linear_is_refused(peft):
    with pytest.raises(ValueError, match=r"selects model\.layers\.0\.attn\.wo_a, a grouped linear"):
        adapted(**peft)


def test_adapters_of_the_indexer_alone_are_refused():
    with pytest.raises(ValueError, match=r"nothing but the indexer .* would never train"):
        adapted(target_modules=["*indexer*"])
