# SPDX-License-Identifier: Apache-2.0
import json
import types
from dataclasses import asdict

import pytest
import torch
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config
from omegaconf import OmegaConf

from nemo_dsv4_cp import ContextParallelOptions, DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.automodel.legacy import auxiliary_loss
from nemo_dsv4_cp.options import IndexerLoss

AUTOMODEL, OURS = ["DeepseekV4ForCausalLM"], ["DeepseekV4ContextParallelForCausalLM"]


def make(block=None, **fields):
    return DeepseekV4ContextParallelConfig(
        compress_ratios=[0, 4, 128], context_parallel=block, **fields
    )


def test_the_defaults_switch_the_plugin_on():
    config = make()
    assert config.architectures == OURS
    assert config.context_parallel == ContextParallelOptions()
    assert config.context_parallel.resolve_pad_multiple(config.compress_ratios) == 128


def test_disabled_names_automodels_own_model():
    assert make({"enabled": False}).architectures == AUTOMODEL


@pytest.mark.parametrize(("balance", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto")])
def test_balance_means_the_same_quoted_or_not(balance, meant):
    for block in (OmegaConf.create(f"balance: {balance}"), {"balance": balance}):
        assert make(block).context_parallel.balance == meant


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create, types.MappingProxyType])
def test_a_block_may_be_any_mapping(wrap):
    options = make(wrap({"pad_multiple": 256, "transport": "all_gather"})).context_parallel
    assert options.pad_multiple == 256
    assert options.resolve_pad_multiple([4, 128]) == 256


@pytest.mark.parametrize("off", [False, "off"])
def test_kernels_check_off_means_the_same_quoted_or_not(off):
    assert make({"kernels_check": off}).context_parallel.kernels_check == "off"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"transprot": "all_gather"}, r"transprot='all_gather'.*did you mean 'transport'"),
        ({"zzz": 1}, r"zzz=1 is not an option; The options are enabled, transport"),
        (
            {"transport": "ring"},
            r"transport='ring' is not installed; use one of \['all_gather', 'boundary'",
        ),
        (
            {"kernels": "cutlass"},
            r"kernels='cutlass' is not installed; use one of \['auto', 'tilelang', 'torch', 'tri.*",
        ),
        ({"kernels": "Torch"}, r"kernels='Torch' is not installed; .*; did you mean 'torch'\?"),
        ({"kernels": True}, r"kernels=true has the wrong type \(it is a name\)"),
        ({"workspace_mib": 2.5}, r"workspace_mib=2.5 has .* \(it is auto, or an integer"),
        ({"pad_multiple": "256"}, r"pad_multiple='256' has .* integer without quotes\)"),
        ({"batch_function": "zigzag"}, r"batch_function='zigzag'.*contiguous_shard"),
        (
            {"pad_multiple": 96},
            r"pad_multiple=96 .* 128, the LCM .*\[4, 128\].* use 128 or \"auto\"",
        ),
        ({"pad_multiple": 200}, r"use 256"),
        ({"pad_multiple": 0}, r'pad_multiple=0 .*use "auto"'),
        ({"pad_multiple": "all"}, r"pad_multiple='all' .*use \"auto\""),
        ({"enabled": "maybe"}, r"enabled='maybe' .* works is true"),
        ({"workspace_mib": 0}, r'workspace_mib=0 .*use "auto"'),
        (["all_gather"], r"is not a mapping"),
        ({"balance": "always"}, r"balance='always' is none of auto, on and off"),
        ({"balance": [1]}, r"balance=\[1\] has the wrong type"),
        ({"kernels_check": "never"}, r"kernels_check='never' is none of strict, warn and off"),
        ({"kernels_check": True}, r"kernels_check=true is none of strict, warn and off"),
        (
            {"compressor_precision": "tf32"},
            r"compressor_precision='tf32' is none of float32 and bf16x3; use float32",
        ),
        ({"compare_ranks": "once"}, r"compare_ranks='once' is none of first, every and never"),
        (
            {"indexer_loss": {"coeficient": 1.0}},
            r"indexer_loss\.coeficient=1\.0 is not an option; did you mean 'coefficient'",
        ),
        ({"indexer_loss": 0.1}, r"indexer_loss=0\.1 has the wrong type \(it is a block\)"),
        (
            {"indexer_loss": {"coefficient": "0.1"}},
            r"indexer_loss\.coefficient='0\.1' has the wrong type \(it is a number\)",
        ),
        (
            {"indexer_loss": {"coefficient": True}},
            r"indexer_loss\.coefficient=true has .* works is 0\.0",
        ),
        (
            {"indexer_loss": {"coefficient": -0.1}},
            r"indexer_loss\.coefficient=-0\.1 is not a number of 0 or more; use 0\.01",
        ),
        ({"indexer_loss": {"coefficient": float("inf")}}, r"coefficient=inf is not a number of 0"),
        ({"indexer_loss": {"coefficient": float("nan")}}, r"coefficient=nan is not a number of 0"),
        (
            {"indexer_loss": {"mode": "dense"}},
            r"indexer_loss\.mode='dense' is neither sparse nor full",
        ),
        ({"train_only": "router"}, r"train_only='router' is neither all nor indexer; use all"),
        (
            {"enabled": False, "indexer_loss": {"coefficient": 0.1}},
            r"enabled=false with indexer_loss\.coefficient=0\.1: .* freezes the indexer",
        ),
        ({"train_only": "indexer"}, r"train_only=indexer without indexer_loss trains nothing; set"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name_value_and_remedy(block, message):
    with pytest.raises(ValueError, match=message):
        make(block)


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_a_block_within_the_block_may_name_some_of_its_keys(wrap):
    options = make(wrap({"indexer_loss": {"coefficient": 1}})).context_parallel
    assert (options.indexer_loss, options.trains_indexer) == (IndexerLoss(1.0, "sparse"), True)
    assert make({"indexer_loss": IndexerLoss(0.5)}).context_parallel.indexer_loss.coefficient == 0.5
    assert not make({"indexer_loss": {"mode": "full"}}).context_parallel.trains_indexer


def test_the_indexers_loss_needs_a_layer_with_an_indexer():
    block = {"indexer_loss": {"coefficient": 0.1}}
    with pytest.raises(ValueError, match=r"coefficient=0\.1 with compress_ratios \[0, 128\]: only"):
        DeepseekV4ContextParallelConfig(compress_ratios=[0, 128], context_parallel=block)


def test_the_indexers_loss_needs_a_release_that_scales_auxiliary_losses(monkeypatch):
    monkeypatch.setattr(auxiliary_loss, "_is_scaled", lambda: False)
    with pytest.raises(ValueError, match=r"indexer_loss\.coefficient=0\.1 .* divides auxiliary"):
        make({"indexer_loss": {"coefficient": 0.1}})


@pytest.mark.parametrize("key", ["context_paralell", "contextparallel", "context-parallel"])
def test_a_misspelt_block_is_refused(key, tmp_path):
    with pytest.raises(ValueError, match="the block is called context_parallel"):
        make(**{key: {"transport": "all_gather"}})
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the block is called context_parallel"):
        DeepseekV4ContextParallelConfig.from_pretrained(tmp_path, **{key: {}})


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        make().context_parallel.transport = "boundary"


def test_a_saved_config_is_an_automodel_config_and_loads_back(tmp_path):
    make({"pad_multiple": 256}, hidden_size=64).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == AUTOMODEL
    assert not [key for key in saved if "context_parallel" in key]

    plain = DeepseekV4Config.from_pretrained(tmp_path)
    assert (plain.architectures, plain.hidden_size) == (AUTOMODEL, 64)
    back = DeepseekV4ContextParallelConfig.from_pretrained(tmp_path)
    assert (back.architectures, back.hidden_size) == (OURS, 64)


def test_from_pretrained_applies_and_checks_the_block_after_the_other_overrides(tmp_path):
    plain = DeepseekV4Config(compress_ratios=[0, 4, 128], architectures=AUTOMODEL)
    plain.save_pretrained(tmp_path)
    load = DeepseekV4ContextParallelConfig.from_pretrained
    assert load(tmp_path, context_parallel={"enabled": False}).architectures == AUTOMODEL
    small = load(tmp_path, context_parallel={"pad_multiple": 8}, compress_ratios=[0, 4])
    assert small.context_parallel.pad_multiple == 8
    with pytest.raises(ValueError, match="pad_multiple=8"):
        load(tmp_path, context_parallel={"pad_multiple": 8})
    config, unused = load(tmp_path, context_parallel=None, return_unused_kwargs=True, other=1)
    assert config.architectures == OURS
    assert unused == {"other": 1}


def test_dtype_and_automodels_fields_pass_through():
    config = make(torch_dtype="float32", num_hidden_layers=3)
    assert config.dtype in ("float32", torch.float32)
    assert config.num_hidden_layers == 3


def test_every_default_passes_automodels_config_loader():
    """It resolves keys that end in _fn as import paths."""
    defaults = asdict(ContextParallelOptions())
    loaded = ConfigNode({"context_parallel": defaults}).to_dict()["context_parallel"]
    assert ContextParallelOptions.from_block(loaded) == ContextParallelOptions()
    assert loaded == defaults
