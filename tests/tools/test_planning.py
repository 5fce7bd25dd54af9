# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from nemo_dsv4_cp.gpus import GPUS
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import balanced, contiguous
from nemo_dsv4_cp.tools import planning
from nemo_dsv4_cp.tools.crossings import received_bytes
from nemo_dsv4_cp.tools.inventory import Shape, work_of_ranks
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.planning import Plan, Request
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields
from nemo_dsv4_cp.tools.step_time import step_time

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))
PRO = ModelSizes.of_fields(read_model_fields("v4_pro"))


def test_without_balance_the_last_rank_works_the_more_the_longer_the_row():
    short, long = (
        planning.row(Request(FLASH, seq_len, 8), 8).staying.last_over_first
        for seq_len in (1 << 14, 1 << 20)
    )
    assert 1 < short < 1.1 < 2 < long < 8
    assert planning.row(Request(FLASH, 1 << 14, 8), 1).staying.last_over_first == 1


@pytest.mark.parametrize("transport", ["boundary", "all_gather"])
def test_balance_is_planned_beside_what_stays(transport):
    request = Request(FLASH, 1 << 20, 64, batch=2, transport=transport)
    row = planning.row(request, 64)
    shape = Shape(SequenceLayout(16384, 63, 64), batch=2)
    stay, half = contiguous(shape.layout), balanced(shape.layout)
    moved = 0
    for sharing, schedule in ((row.staying, stay), (row.moving, half)):
        schedules = {Layer.v4(ratio): schedule if ratio else stay for ratio in (0, 4, 128)}
        works = work_of_ranks(FLASH, schedules, shape)
        assert sharing.last_over_first == pytest.approx(works[-1] / works[0])
        assert sharing.largest_over_mean == pytest.approx(64 * max(works) / sum(works))
        assert sharing.moved_bytes == moved
        assert sharing.step == step_time(FLASH, shape, schedules, request.gpu, transport)
        for layers, ratio in ((21, 4), (20, 128)):
            for balance, sign in ((True, 1), (False, -1)):
                layer = Layer.v4(ratio)
                received = received_bytes(FLASH, shape, layer, transport, balanced=balance)
                moved += sign * layers * sum(received)
    assert (row.staying.moved_ratios, row.moving.moved_ratios) == ((), (4, 128))
    assert row.staying.last_over_first > 2.8 > 1.01 > row.moving.last_over_first
    assert row.staying.largest_over_mean > 1.4 > 1.01 > row.moving.largest_over_mean


def test_the_settings_choose_time_and_bytes():
    def planned(**settings):
        row = planning.row(Request(FLASH, 1 << 20, 64, **settings), 32)
        return row, row.step_seconds, row.of("boundary").received_bytes

    row, seconds, received = planned()
    moved = row.moving.moved_bytes
    assert (row.moving.balance, seconds) == ("auto", row.moving.step.seconds(overlap=True))
    assert row.tokens_a_second == pytest.approx(2 * (1 << 20) / seconds)
    _, waited, _ = planned(overlap=False)
    assert waited == row.moving.step.seconds(overlap=False) > seconds
    off, stayed, less = planned(balance="off")
    assert stayed == row.staying.step.seconds(overlap=True) > seconds
    assert less == received - moved < received
    assert off.moving == row.moving  # is shown all the same


def test_auto_may_leave_layers_as_they_are_and_on_may_not():
    request = Request(FLASH, 1 << 13, 8)
    assert planning.row(request, 8).moving.moved_ratios == ()
    always = dataclasses.replace(request, balance="on")
    assert planning.row(always, 8).moving.moved_ratios == (4, 128)
    # At ratio 128 a query's cost grows enough to move it to another node, at ratio 4 not yet.
    assert planning.row(Request(PRO, 1 << 16, 16), 16).moving.moved_ratios == (128,)


@pytest.mark.parametrize("sizes", [FLASH, PRO], ids=["v4_flash", "v4_pro"])
@pytest.mark.parametrize("gpu", [GPUS["h100"], GPUS["b200"]], ids=lambda gpu: gpu.name)
def test_neither_overlap_nor_automatic_balance_makes_a_step_longer(sizes, gpu):
    for power in range(11, 21):
        for cp_size in (2, 8, 16, 64):
            row = planning.row(Request(sizes, 1 << power, 64, gpu=gpu), cp_size)
            for sharing in (row.staying, row.moving):
                step = sharing.step
                assert step.seconds(overlap=True) <= step.seconds(overlap=False)
            assert row.step_seconds <= row.staying.step.seconds(overlap=True)


@pytest.mark.parametrize(
    ("field", "cp_size"),
    [("tflops", 8), ("float32_tflops", 8), ("nvlink_gbs", 8), ("network_gbs", 64)],
)
def test_a_faster_gpu_or_link_makes_a_step_shorter(field, cp_size):
    request = Request(PRO, 1 << 17, 64, overlap=False)
    gpu = dataclasses.replace(request.gpu, **{field: 2 * getattr(request.gpu, field)})
    before, after = (
        planning.row(each, cp_size).step_seconds
        for each in (request, dataclasses.replace(request, gpu=gpu))
    )
    assert after < before


def test_the_sizes_that_fit_divide_the_ranks():
    for seq_len, ranks, smallest in ((1 << 20, 64, 64), (1 << 20, 96, None), (4096, 8, 1)):
        assert Plan.of(Request(FLASH, seq_len, ranks)).smallest == smallest


def test_the_fastest_size_is_of_those_that_fit_and_not_always_the_smallest():
    plan = Plan.of(Request(PRO, 1 << 14, 64))
    # One rank would be faster still, but does not fit.
    assert max(plan.rows, key=lambda row: row.tokens_a_second).cp_size == 1
    assert (plan.smallest, plan.fastest) == (2, 4)
    speeds = {row.cp_size: row.tokens_a_second for row in plan.rows if row.fits}
    assert speeds[plan.fastest] == max(speeds.values())
    assert Plan.of(Request(FLASH, 1 << 20, 8)).fastest is None


def warned(request, cp_size):
    return " ".join(Plan.of(request, cp_size).warnings)


@pytest.mark.parametrize(
    ("seq_len", "ranks", "cp_size", "message"),
    [
        (800, 8, 8, "some ranks hold padding only; 800 tokens fill 7 ranks"),
        (1100, 8, 8, "46% of the row is padding"),
        (1 << 20, 64, 64, "AutoModel's own path needs up to 160 GiB"),
        (16384, 12, 8, "--ranks 12 is not divisible"),
        (4096, 8, 4, "1 fits"),
        (1 << 21, 8, 8, "max_position_embeddings=1048576"),
    ],
)
def test_poor_settings_are_named(seq_len, ranks, cp_size, message):
    assert message in warned(Request(FLASH, seq_len, ranks), cp_size)


def test_ranks_that_wait_are_named_only_where_they_do():
    request = Request(FLASH, 1 << 20, 64)
    assert "the last rank" not in warned(request, 64)
    off = warned(dataclasses.replace(request, balance="off"), 64)
    assert "cp_size 64: the last rank works up to 2.9 times as much as the first" in off
    assert "balance: auto shares the work out" in off


def test_balance_that_costs_more_than_it_spares_is_named():
    request = Request(PRO, 24576, 64, gpu=GPUS["b200"], overlap=False, balance="on")
    assert "cp_size 32: by these rates, balance: on costs more time" in warned(request, 32)
    assert "a step takes up to 11% longer" in warned(request, 32)
    assert "costs more time" not in warned(dataclasses.replace(request, overlap=True), 32)
    for balance in ("off", "auto"):  # auto decides by the same rates
        assert "costs more time" not in warned(dataclasses.replace(request, balance=balance), 32)


def test_a_size_that_is_fastest_is_not_called_too_large():
    request = Request(PRO, 1 << 14, 64)
    assert "larger than the memory needs" not in warned(request, 4)
    assert "larger than the memory needs: 2 fits" in warned(request, 8)


def test_shards_shorter_than_the_window_are_named():
    fields = read_model_fields("v4_flash") | {"sliding_window": 512}
    request = Request(ModelSizes.of_fields(fields), 2048, 8)
    assert "shorter than sliding_window=512" in warned(request, 8)
