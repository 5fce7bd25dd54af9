# SPDX-License-Identifier: Apache-2.0
from importlib.metadata import distribution, entry_points

import pytest
from nemo_automodel._transformers.registry import ModelRegistry

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.batch import contiguous_shard
from nemo_dsv4_cp.exchange.all_gather import AllGatherTransport
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM

NAME = "DeepseekV4ContextParallelForCausalLM"


def test_the_installed_distribution_declares_the_architecture():
    declared = {point.name: point.value for point in distribution("nemo-dsv4-cp").entry_points}
    assert declared[NAME] == f"nemo_dsv4_cp.model:{NAME}"
    assert entry_points(group="nemo_automodel.architectures", name=NAME)


def test_automodels_registry_finds_our_class():
    found = ModelRegistry.get_model_cls_from_model_arch(NAME)
    assert found is DeepseekV4ContextParallelForCausalLM


def test_yaml_names_resolve_through_entry_points():
    assert plugins.load(plugins.TRANSPORTS, "all_gather") is AllGatherTransport
    assert plugins.load(plugins.BATCH_FNS, "contiguous_shard") is contiguous_shard
    assert plugins.names(plugins.TRANSPORTS) == sorted(plugins.names(plugins.TRANSPORTS))
    with pytest.raises(ValueError, match="'ring' is not installed"):
        plugins.load(plugins.TRANSPORTS, "ring")
