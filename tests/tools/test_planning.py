import json

import pytest

from nemo_dsv4_cp.config import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.tools import planning
from nemo_dsv4_cp.tools.layer import Case
from nemo_dsv4_cp.tools.planning import (
    GIB,
    HOST,
    ModelSizes,
    Request,
    Shape,
    attention_bytes,
    read_model_fields,
    received_bytes,
)
from nemo_dsv4_cp.tools.weighing import weigh

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))


def last_rank(seq_len, cp_size, batch=1):
    layout = SequenceLayout.of_padded(seq_len, cp_rank=cp_size - 1, cp_size=cp_size)
    return Shape(layout, batch)


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize(
    ("path", "seq_len", "cp_size", "batch"),
    [("boundary", 8192, 4, 1), ("boundary", 16384, 8, 2), ("all_gather", 16384, 8, 1)],
)
def test_memory_and_bytes_are_what_is_weighed(path, seq_len, cp_size, batch, ratio):
    weight = weigh(Case(path, ratio, seq_len, cp_size, cp_size - 1, batch))
    shape = last_rank(seq_len, cp_size, batch)
    peak = attention_bytes(FLASH, shape, ratio, path)
    assert peak == pytest.approx(weight.peak_bytes, rel=0.03)
    # The last rank gets no halo's gradient back: only a rank in the middle has both neighbours.
    assert received_bytes(FLASH, shape, ratio, path)[0] == weight.received_forward


@pytest.mark.parametrize(
    ("path", "ratio"),
    [("boundary", 0), ("boundary", 128), (HOST, 4)],
)
def test_a_longer_shard_peaks_elsewhere_and_is_planned_too(path, ratio):
    weight = weigh(Case(path, ratio, 131072, 8, 4))
    shape = last_rank(131072, 8)
    peak = attention_bytes(FLASH, shape, ratio, path)
    assert peak == pytest.approx(weight.peak_bytes, rel=0.03)
    received = (weight.received_forward, weight.received_backward)
    assert received_bytes(FLASH, shape, ratio, path) == received


@pytest.mark.parametrize(
    ("path", "seq_len", "cp_size", "peaks"),
    [
        ("boundary", 1 << 20, 64, (5.07, 6.32, 5.50)),
        ("boundary", 1 << 19, 32, (5.07, 5.82, 5.42)),
        ("all_gather", 1 << 20, 64, (8.82, 12.31, 9.24)),
        (HOST, 1 << 20, 64, (160.01, 160.01, 160.01)),
    ],
)
def test_memory_is_what_the_benchmarks_report(path, seq_len, cp_size, peaks):
    for ratio, peak in zip((0, 4, 128), peaks, strict=True):
        planned = attention_bytes(FLASH, last_rank(seq_len, cp_size), ratio, path)
        assert planned / GIB == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(
    ("path", "ratio", "forward", "backward"),
    [
        (HOST, 4, 11584, 9472),
        (HOST, 128, 1032, 1032),
        (HOST, 0, 1024, 1024),
        ("all_gather", 4, 6464, 5376),
        ("all_gather", 128, 1032, 1032),
        ("boundary", 4, 321.3, 257.3),
        ("boundary", 128, 9.1, 9.1),
        ("boundary", 0, 1.1, 1.1),
    ],
)
def test_bytes_are_what_the_benchmarks_report(path, ratio, forward, backward):
    planned = received_bytes(FLASH, last_rank(131072, 8), ratio, path)
    per_token = [received / 16384 / 7 for received in planned]
    assert per_token == pytest.approx([forward, backward], abs=0.05)


def test_a_single_rank_receives_nothing():
    for path in planning.PATHS:
        assert received_bytes(FLASH, last_rank(4096, 1), 4, path) == (0, 0)


def test_work_counts_what_each_query_sees():
    def seen(layout, ratio, limit):
        return sum(min((i + 1) // ratio, limit) for i in range(layout.start, layout.end))

    for start_rank in range(4):
        layout = SequenceLayout(4096, start_rank, 4)
        entries = planning._windows_complete(layout.end, 4)
        entries -= planning._windows_complete(layout.start, 4)
        assert entries == seen(layout, 4, 1 << 30)
        for ratio, limit in ((1, 128), (4, 512), (4, 3000)):
            counted = planning._at_most(layout.end, ratio, limit)
            counted -= planning._at_most(layout.start, ratio, limit)
            assert counted == seen(layout, ratio, limit)


def test_the_last_rank_works_the_more_the_longer_the_row():
    ratios = [
        planning.row(Request(FLASH, seq_len, 8), 8).imbalance for seq_len in (1 << 14, 1 << 20)
    ]
    assert 1 < ratios[0] < 1.1 < 2 < ratios[1] < 8
    assert planning.row(Request(FLASH, 1 << 14, 8), 1).imbalance == 1


def test_the_smallest_size_that_fits_divides_the_ranks():
    assert planning.smallest_that_fits(Request(FLASH, 1 << 20, 64)) == 64
    assert planning.smallest_that_fits(Request(FLASH, 1 << 20, 96)) is None
    assert planning.smallest_that_fits(Request(FLASH, 4096, 8)) == 1


def warned(request, cp_size):
    return " ".join(planning.warnings(request, [planning.row(request, cp_size)], chosen=cp_size))


@pytest.mark.parametrize(
    ("seq_len", "ranks", "cp_size", "message"),
    [
        (800, 8, 8, "some ranks hold padding only; 800 tokens fill 7 ranks"),
        (1100, 8, 8, "46% of the row is padding"),
        (1 << 20, 64, 64, "works up to 2.9 times"),
        (1 << 20, 64, 64, "AutoModel's own path needs up to 160 GiB"),
        (16384, 12, 8, "--ranks 12 is not divisible"),
        (4096, 8, 4, "1 fits"),
        (1 << 21, 8, 8, "max_position_embeddings=1048576"),
    ],
)
def test_poor_settings_are_named(seq_len, ranks, cp_size, message):
    assert message in warned(Request(FLASH, seq_len, ranks), cp_size)


def test_shards_shorter_than_the_window_are_named():
    fields = read_model_fields("v4_flash") | {"sliding_window": 512}
    request = Request(ModelSizes.of_fields(fields), 2048, 8)
    assert "shorter than sliding_window=512" in warned(request, 8)


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


def test_the_workspace_is_the_packages_own():
    assert ContextParallelOptions().workspace_mib << 20 == planning._WORKSPACE_BYTES
