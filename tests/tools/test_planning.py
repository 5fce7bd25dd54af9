import pytest

from nemo_dsv4_cp.tools import planning
from nemo_dsv4_cp.tools.planning import Request
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))


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
