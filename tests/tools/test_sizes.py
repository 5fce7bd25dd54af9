import json

import pytest

from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields

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
    ],
)
def test_fields_that_are_no_model_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        ModelSizes.of_fields(read_model_fields("v4_flash") | changed)
