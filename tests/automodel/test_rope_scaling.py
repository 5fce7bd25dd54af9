# SPDX-License-Identifier: Apache-2.0
"""YaRN is read however it is spelled, and what AutoModel's V4 would drop is refused."""

import pytest
import torch

from nemo_dsv4_cp import DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.automodel.rope_scaling import resolve_rope_scaling
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.parity import SIZES, cpu_backend

YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
NESTED = {
    "main": {"rope_type": "default", "rope_theta": 10000.0},
    "compress": YARN | {"rope_type": "yarn", "rope_theta": 160000.0},
}


def frequencies(rope_scaling):
    layers = {"num_hidden_layers": 1, "compress_ratios": [4]}
    config = DeepseekV4ContextParallelConfig(**SIZES | layers, rope_scaling=rope_scaling)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    return model.model.rotary_emb_compress.inv_freq


@pytest.mark.parametrize(
    "spelled", [YARN | {"rope_type": "yarn"}, YARN | {"rope_type": "YaRN", "type": "yarn"}, NESTED]
)
def test_every_spelling_of_yarn_scales_the_compressed_layers(spelled):
    scaled = frequencies(spelled)
    assert torch.equal(scaled, frequencies(YARN | {"type": "yarn"}))
    assert not torch.equal(scaled, frequencies(None))


@pytest.mark.parametrize("none", [None, {}, {"rope_type": "default"}, {"rope_theta": 10000.0}])
def test_no_scaling_stays_none(none):
    assert torch.equal(frequencies(none), frequencies(None))


def test_an_override_of_a_saved_config_is_read_the_same(tmp_path):
    DeepseekV4ContextParallelConfig(**SIZES, compress_ratios=[4]).save_pretrained(tmp_path)
    loaded = DeepseekV4ContextParallelConfig.from_pretrained(
        tmp_path, rope_scaling=YARN | {"rope_type": "yarn"}
    )
    assert loaded.rope_scaling["type"] == "yarn"
    loaded.save_pretrained(tmp_path)
    assert DeepseekV4ContextParallelConfig.from_pretrained(tmp_path).rope_scaling["type"] == "yarn"


def test_an_override_without_the_type_is_refused(tmp_path):
    saved = DeepseekV4ContextParallelConfig(
        **SIZES, compress_ratios=[4], rope_scaling=YARN | {"type": "yarn"}
    )
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sets factor and names no scaling"):
        DeepseekV4ContextParallelConfig.from_pretrained(tmp_path, rope_scaling={"factor": 8})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "linear", "factor": 2}, "knows yarn only"),
        ({"type": "yarn", "rope_type": "linear"} | YARN, "names two scalings"),
        ({"type": "yarn", "factor": 4}, r"original_max_position_embeddings=None is not a positive"),
        ({"type": "yarn", "factor": 0, "original_max_position_embeddings": 8}, "factor=0 is not"),
        ("yarn", "is not a mapping"),
        (YARN, "sets factor and names no scaling"),
        ({"factor": 4, "rope_type": "default"}, "sets factor and names no scaling"),
        (YARN | {"type": "yarn", "factor": float("nan")}, "factor=nan is not"),
        (YARN | {"type": "yarn", "original_max_position_embeddings": 0.5}, "=0.5 is not"),
        (YARN | {"type": "yarn", "beta_slow": 0}, "beta_slow=0 is not"),
        ({"main": YARN | {"rope_type": "yarn"}}, "both must be mappings"),
        (NESTED | {"compress": "yarn"}, "both must be mappings"),
        (NESTED | {"main": {"rope_type": "yarn"}}, "compressed layers only"),
    ],
)
def test_a_scaling_that_would_be_left_out_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve_rope_scaling(settings)
