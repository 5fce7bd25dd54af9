# SPDX-License-Identifier: Apache-2.0
"""Every recipe of the Hydra tree: what AutoModel makes of it, and whether its sizes fit."""

import json

import pytest
import yaml
from nemo_automodel.cli.utils import resolve_recipe_name
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.recipes._typed_config import RecipeConfig
from omegaconf import OmegaConf

from nemo_dsv4_cp.cli.compose import recipe_text
from nemo_dsv4_cp.config import ContextParallelOptions
from nemo_dsv4_cp.tools import recipes

FLASH = [0, 0, 4] + [128, 4] * 20 + [0]


def text_of(config):
    """The fields of a model for text; V4.1's stand below the config."""
    return config.get("text_config", config)


def test_all_recipes_are_there():
    assert set(recipes.names()) == {
        "flash_distillation",
        "flash_indexer_warmup",
        "flash_lora",
        "flash_packed",
        "flash_sft_128k",
        "flash_sft_128k_indexer",
        "flash_sft_16k",
        "flash_sft_1m",
        "pro_sft",
        "tiny_cpu",
        "tiny_v41_cpu",
        "v41_flash_sft_1m",
        "v41_flash_sft_32k",
        "v41_packed",
    }


@pytest.mark.parametrize("name", recipes.names())
def test_automodels_loader_accepts_the_recipe(name, tmp_path):
    if "v41" in name:
        pytest.importorskip("nemo_automodel.components.models.deepseek_v41")
    recipe = recipes.compose(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(recipe, [name], path))
    assert yaml.safe_load(path.read_text()) == recipe.fields
    loaded = load_yaml_config(path)
    typed = RecipeConfig(loaded)
    assert typed.step_scheduler is not None
    assert typed.checkpoint is not None
    assert typed.optimizer is not None
    assert resolve_recipe_name(recipe.fields["recipe"]).count(".") > 2
    # Every _target_ of AutoModel is a name that AutoModel has: its loader resolved them all.
    assert callable(loaded.model._target_)
    assert callable(loaded.dataset._target_)
    assert callable(loaded.model.config._target_)


@pytest.mark.parametrize("name", recipes.names())
def test_the_parallel_sizes_multiply_out(name):
    recipe = recipes.compose(name)
    fields, distributed = recipe.fields, recipe.fields["distributed"]
    other = distributed["cp_size"] * distributed.get("pp_size", 1) * distributed.get("tp_size", 1)
    assert recipe.world_size % other == 0
    data_ranks = recipe.world_size // other
    experts = distributed.get("ep_size", 1)
    assert data_ranks * distributed["cp_size"] % experts == 0
    for section in ("model", "teacher_model"):
        if section in fields:
            config = fields[section]["config"]
            assert text_of(config)["n_routed_experts"] % experts == 0
            block = ContextParallelOptions.from_block(config["context_parallel"])
            assert block.pad_multiple == (2 if "text_config" in config else 128)
    steps = fields["step_scheduler"]
    assert steps["global_batch_size"] % (steps["local_batch_size"] * data_ranks) == 0
    limit = text_of(fields["model"]["config"])["max_position_embeddings"]
    assert fields["dataset"]["seq_length"] <= limit


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g, os in recipes.choices().items() for o in os]
)
def test_every_option_of_every_group_composes(group, option):
    base = "tiny_cpu" if group == "model" else "flash_distillation"  # a teacher, a tokenizer
    fields = recipes.compose(base, [f"{group}={option}"]).fields
    assert "vars" not in fields


def test_published_sizes():
    flash = recipes.compose("flash_sft_16k").fields["model"]["config"]
    pro = recipes.compose("pro_sft").fields["model"]["config"]
    assert flash["compress_ratios"] == FLASH
    assert pro["compress_ratios"] == [128] + [128, 4] * 30 + [0]
    assert (flash["hidden_size"], pro["hidden_size"]) == (4096, 7168)
    assert (flash["index_topk"], pro["index_topk"]) == (512, 1024)


def test_the_sizes_of_v41_are_automodels_defaults():
    config = pytest.importorskip("nemo_automodel.components.models.deepseek_v41.config")
    text = recipes.compose("v41_packed").fields["model"]["config"]["text_config"]
    default = config.DeepseekV41TextConfig()
    assert {name: getattr(default, name) for name in text if name != "_target_"} == {
        name: value for name, value in text.items() if name != "_target_"
    }


def test_overrides_and_what_follows_from_them():
    block = recipes.compose("tiny_cpu", ["model.config.compress_ratios=[0,4,4,4]"]).fields["model"]
    assert block["config"]["context_parallel"]["pad_multiple"] == 8
    off = recipes.compose("flash_sft_128k", ["cp=off"]).fields
    assert off["distributed"]["cp_size"] == 1
    assert off["model"]["config"]["context_parallel"] == {"enabled": False}


def test_compress_ratios_come_from_a_config_on_disk_or_in_the_hubs_cache(tmp_path, monkeypatch):
    recipes.register_resolvers()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"compress_ratios": [0, 4]}))
    model = {"model": {"config": {"pretrained_model_name_or_path": str(tmp_path)}}}
    for expression in (str(config), str(tmp_path), ""):
        node = OmegaConf.create(model | {"ratios": f"${{dsv4_cp.compress_ratios:{expression}}}"})
        assert node.ratios == [0, 4]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: str(config))
    assert recipes.compress_ratios("deepseek-ai/DeepSeek-V4-Flash") == [0, 4]


def test_a_config_that_is_nowhere_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"hf download nowhere/at-all config.json"):
        recipes.compress_ratios("nowhere/at-all")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no compress_ratios"):
        recipes.compress_ratios(str(tmp_path))


def test_recipes_of_the_indexer_differ_from_the_one_without_by_its_loss():
    plain, trained = (
        recipes.compose(name).fields for name in ("flash_sft_128k", "flash_sft_128k_indexer")
    )
    block = trained["model"]["config"]["context_parallel"]
    assert block.pop("indexer_loss") == {"coefficient": 0.01, "mode": "sparse"}
    assert trained == plain
    warmup = recipes.compose("flash_indexer_warmup").fields
    options = ContextParallelOptions.from_block(warmup["model"]["config"]["context_parallel"])
    assert (options.train_only, options.indexer_loss.mode) == ("indexer", "full")
