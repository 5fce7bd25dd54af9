# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from collections import Counter

import pytest

from nemo_dsv4_cp.tools.sizes import ModelSizes, ModelSizesV41, published_fields, read_model_fields

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))


def test_fields_are_found_at_each_level_and_in_json(tmp_path):
    fields = read_model_fields("v4_flash")
    path = tmp_path / "config.json"
    for tree in (fields, {"config": fields}, {"model": {"config": fields}}):
        path.write_text(json.dumps(tree))
        assert read_model_fields(str(path)) == fields


def test_published_sizes_have_the_published_layers():
    pro = ModelSizes.of_fields(read_model_fields("v4_pro"))
    for sizes, counts in ((FLASH, {0: 2, 4: 21, 128: 20}), (pro, {0: 0, 4: 30, 128: 31})):
        for ratio, count in counts.items():
            assert sizes.compress_ratios.count(ratio) == count


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": None}, "lack head_dim"),
        ({"head_dim": "wide"}, "head_dim='wide' is not a size"),
        ({"compress_ratios": [4, 128]}, "holds 2 ratios for num_hidden_layers=43"),
        ({"compress_ratios": 4}, "not a list"),
        ({"compress_ratios": ["4"]}, "use 0, 4 or 128"),
        ({"compress_ratios": [0, 2]}, "without kv_source_layer_ids"),
    ],
)
def test_fields_that_are_no_model_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        ModelSizes.of_fields(read_model_fields("v4_flash") | changed)


HUB = "deepseek-ai/DeepSeek-V4-Flash"


@pytest.fixture
def warned(monkeypatch):
    """The warnings where nothing is cached."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    return []


@pytest.mark.parametrize("model", ["Flash", "Pro"])
def test_packaged_sizes_stand_in_for_a_config_that_is_not_cached_with_a_warning(model, warned):
    source = f"deepseek-ai/DeepSeek-V4-{model}"
    fields = read_model_fields(source, warned.append)
    packaged = read_model_fields(f"v4_{model.lower()}")
    assert ModelSizes.of_fields(fields) == ModelSizes.of_fields(packaged)
    assert fields["num_nextn_predict_layers"] == 1  # as published
    (line,) = warned
    assert f"sizes of v4_{model.lower()} stand in for it" in line
    assert f"hf download {source} config.json" in line


def test_a_cached_config_comes_before_the_packaged_one(warned, tmp_path, monkeypatch):
    cached = tmp_path / "config.json"
    cached.write_text(json.dumps({"compress_ratios": [0, 4]}))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: str(cached))
    assert read_model_fields(HUB, warned.append) == {"compress_ratios": [0, 4]}
    assert read_model_fields("another/model", warned.append) == {"compress_ratios": [0, 4]}
    assert warned == []


def test_a_recipe_that_only_names_a_model_has_its_sizes_and_its_own_changes(warned, tmp_path):
    path = tmp_path / "recipe.yaml"
    named = {"pretrained_model_name_or_path": HUB, "index_topk": 256}
    for tree in ({"model": {"config": named}}, {"model": named}, named):
        path.write_text(json.dumps(tree))
        fields = read_model_fields(str(path), warned.append)
        assert (fields["index_topk"], fields["hidden_size"]) == (256, 4096)
    assert len(warned) == 3


def test_another_model_that_is_not_cached_is_refused(warned, tmp_path):
    with pytest.raises(ValueError, match=r"hf download deepseek-ai/V3 config.json"):
        published_fields("deepseek-ai/V3", warned.append)
    with pytest.raises(
        ValueError, match=r"cannot be read; use v4_flash, v4_pro, v41_flash, the path"
    ):
        read_model_fields("deepseek-ai/V3", warned.append)


def test_sizes_of_v41_are_read_from_what_is_packaged_published_and_written(warned, tmp_path):
    flash = ModelSizes.of_fields(read_model_fields("v41_flash"))
    assert isinstance(flash, ModelSizesV41)
    hub = "deepseek-ai/DeepSeek-V4.1-Flash"
    assert ModelSizes.of_fields(read_model_fields(hub, warned.append)) == flash
    assert f"hf download {hub} config.json" in warned[0]
    path = tmp_path / "recipe.yaml"
    named = {"pretrained_model_name_or_path": hub, "text_config": {"index_topk": 256}}
    path.write_text(json.dumps({"model": {"config": named}}))
    changed = ModelSizes.of_fields(read_model_fields(str(path), warned.append))
    assert changed == dataclasses.replace(flash, index_topk=256)


def test_layers_of_v41_are_told_apart():
    flash = ModelSizes.of_fields(read_model_fields("v41_flash"))
    assert Counter(layer.name for layer in flash.layers) == {
        "0": 2,
        "2 source": 3,
        "2 reuse": 15,
        "1 source": 1,
        "1 inside": 4,
        "1 reuse": 15,
    }
    assert [number for number, layer in enumerate(flash.layers) if layer.moves] == [2, 8, 14, 20]
    without = dataclasses.replace(flash, candidate_source_layer_id=-1)
    assert Counter(layer.name for layer in without.layers)["1 select"] == 4
