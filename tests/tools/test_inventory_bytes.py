# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_dsv4_cp.bench.layer import Case
from nemo_dsv4_cp.bench.profiling import profile
from nemo_dsv4_cp.gpus import ASSUMED
from nemo_dsv4_cp.kernels.reference.workspace import workspace_of
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.tools.crossings import AUTOMODEL, PATHS, received_bytes
from nemo_dsv4_cp.tools.inventory import Shape
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.memory import attention_bytes
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes, read_model_fields

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))


def peak_of(shape, ratio, path):
    """Plan the peak on the GPU whose memory profiles assume."""
    workspace = workspace_of(int(ASSUMED.memory) << 30)
    return attention_bytes(FLASH, shape, Layer.v4(ratio), path, workspace_bytes=workspace)


def last_rank(seq_len, cp_size, batch=1):
    layout = SequenceLayout.of_padded(seq_len, cp_rank=cp_size - 1, cp_size=cp_size)
    return Shape(layout, batch)


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize(
    ("path", "seq_len", "cp_size", "batch"),
    [
        ("boundary", 8192, 4, 1),
        pytest.param("boundary", 16384, 8, 2, marks=pytest.mark.slow),
        ("all_gather", 16384, 8, 1),
    ],
)
def test_memory_and_bytes_are_what_is_profiled(path, seq_len, cp_size, batch, ratio):
    found = profile(Case(path, ratio, seq_len, cp_size, cp_size - 1, batch, balance="off"))
    shape = last_rank(seq_len, cp_size, batch)
    peak = peak_of(shape, ratio, path)
    assert peak == pytest.approx(found.peak_bytes, rel=0.03)
    # The last rank gets no halo's gradient back: only a rank in the middle has both neighbors.
    assert received_bytes(FLASH, shape, Layer.v4(ratio), path)[0] == found.received_forward


@pytest.mark.parametrize(
    ("path", "ratio"),
    [
        pytest.param("boundary", 0, marks=pytest.mark.slow),
        ("boundary", 128),
        (AUTOMODEL, 4),
    ],
)
def test_a_longer_shard_peaks_elsewhere_and_is_planned_too(path, ratio):
    middle, last = (profile(Case(path, ratio, 131072, 8, rank, balance="off")) for rank in (4, 7))
    shape, found = last_rank(131072, 8), middle
    peak = peak_of(shape, ratio, path)
    assert peak == pytest.approx(last.peak_bytes, rel=0.03)
    received = (found.received_forward, found.received_backward)
    assert received_bytes(FLASH, shape, Layer.v4(ratio), path) == received


@pytest.mark.parametrize(
    ("path", "balance"), [("boundary", "off"), ("boundary", "on"), ("all_gather", "off")]
)
def test_the_indexers_loss_is_planned(path, balance):
    case = Case(path, 4, 8192, 4, 2, balance=balance, kernels="torch", indexer_loss="sparse")
    found, shape, layer = profile(case), last_rank(8192, 4), Layer.v4(4, "sparse")
    received = (found.received_forward, found.received_backward)
    assert received_bytes(FLASH, shape, layer, path, balanced=balance == "on") == received
    workspace = workspace_of(int(ASSUMED.memory) << 30)
    peak = attention_bytes(FLASH, shape, layer, path, workspace_bytes=workspace)
    assert found.peak_bytes <= 1.03 * peak
    assert peak > peak_of(shape, 4, path)


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(("path", "batch"), [("boundary", 2), ("all_gather", 1)])
def test_bytes_of_balanced_queries_are_what_is_profiled_and_memory_no_more(path, batch, ratio):
    found = profile(Case(path, ratio, 8192, 4, 2, batch, balance="on"))
    shape = last_rank(8192, 4, batch)
    received = (found.received_forward, found.received_backward)
    assert received_bytes(FLASH, shape, Layer.v4(ratio), path, balanced=True) == received
    # Halves of several rows are copied; those of one are not.
    assert found.peak_bytes <= 1.06 * peak_of(shape, ratio, path)


@pytest.mark.parametrize(
    ("path", "seq_len", "cp_size", "peaks"),
    [
        ("boundary", 1 << 20, 64, (7.30, 8.52, 7.54)),
        ("boundary", 1 << 19, 32, (7.30, 8.15, 7.60)),
        ("all_gather", 1 << 20, 64, (7.30, 8.52, 7.54)),
        (AUTOMODEL, 1 << 20, 64, (160.01, 160.01, 160.01)),
    ],
)
def test_memory_is_what_the_benchmarks_report(path, seq_len, cp_size, peaks):
    for ratio, peak in zip((0, 4, 128), peaks, strict=True):
        planned = peak_of(last_rank(seq_len, cp_size), ratio, path)
        assert planned / GIB == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(
    ("path", "ratio", "forward", "backward"),
    [
        (AUTOMODEL, 4, 11584, 9472),
        (AUTOMODEL, 128, 1032, 1032),
        (AUTOMODEL, 0, 1024, 1024),
        ("all_gather", 4, 6464, 5376),
        ("all_gather", 128, 1032, 1032),
        ("boundary", 4, 321.3, 257.3),
        ("boundary", 128, 9.1, 9.1),
        ("boundary", 0, 1.1, 1.1),
    ],
)
def test_bytes_are_what_the_benchmarks_report(path, ratio, forward, backward):
    planned = received_bytes(FLASH, last_rank(131072, 8), Layer.v4(ratio), path)
    per_token = [received / 16384 / 7 for received in planned]
    assert per_token == pytest.approx([forward, backward], abs=0.05)


def test_a_single_rank_receives_nothing():
    for path in PATHS:
        assert received_bytes(FLASH, last_rank(4096, 1), Layer.v4(4), path) == (0, 0)
