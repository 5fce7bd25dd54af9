# SPDX-License-Identifier: Apache-2.0
"""What layers of V4.1 compute, receive and hold, by arithmetic and as they are profiled."""

import dataclasses

import pytest
import torch

pytest.importorskip("nemo_automodel.components.models.deepseek_v41")

from nemo_dsv4_cp.attention.layer_v41 import ContextParallelAttentionV41, SharedState
from nemo_dsv4_cp.bench.layer_v41 import build, cases
from nemo_dsv4_cp.bench.profiling import Profiler, count_flops, fake_rank, profile
from nemo_dsv4_cp.exchange.collectives import InFlight
from nemo_dsv4_cp.gpus import ASSUMED, GPUS
from nemo_dsv4_cp.kernels.reference.torch_kernels import TorchKernels
from nemo_dsv4_cp.kernels.reference.workspace import workspace_of
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import balanced, contiguous
from nemo_dsv4_cp.tools import planning
from nemo_dsv4_cp.tools.crossings import AUTOMODEL, PATHS, crossings, engram_bytes, received_bytes
from nemo_dsv4_cp.tools.inventory import (
    Shape,
    engram_operation,
    operations_of_queries,
    query_operations,
    shard_operations,
    work_of_ranks,
)
from nemo_dsv4_cp.tools.memory_v41 import attention_bytes, carried_bytes
from nemo_dsv4_cp.tools.planning import Request
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes, read_model_fields
from nemo_dsv4_cp.tools.step_time import order_of

FLASH = ModelSizes.of_fields(read_model_fields("v41_flash"))
KINDS = (0, 2, 3, 20, 24, 25)
"""Layers: window; source of ratio 2; reuse; source of ratio 1 and of candidates; inside; reuse."""
MOVED = (2, 20)
AT_1M = (1 << 20, 64)


def shape_of(seq_len, cp_size, batch=1):
    layout = SequenceLayout.of_padded(seq_len, cp_rank=cp_size - 1, cp_size=cp_size)
    return Shape(layout, batch)


def profiled(path, layer, seq_len, cp_size, rank, **options):
    (case,) = cases([path], [layer], seq_len, cp_size, rank, **options)
    return profile(case)


def peak_of(shape, layer, path):
    """Plan the peak on the GPU whose memory profiles assume."""
    workspace = workspace_of(int(ASSUMED.memory) << 30)
    return attention_bytes(FLASH, shape, FLASH.layers[layer], path, workspace_bytes=workspace)


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize(
    ("path", "seq_len", "cp_size", "batch"),
    [
        ("boundary", 16384, 8, 2),
        pytest.param("all_gather", 16384, 8, 1, marks=pytest.mark.slow),
        (AUTOMODEL, 32768, 8, 2),
        (AUTOMODEL, *AT_1M, 1),
    ],
)
def test_memory_and_bytes_are_what_is_profiled(path, seq_len, cp_size, batch, layer):
    options = {"batch": batch, "kernels": "torch", "balance": "off"}
    found = profiled(path, layer, seq_len, cp_size, cp_size - 1, **options)
    shape = shape_of(seq_len, cp_size, batch)
    assert peak_of(shape, layer, path) == pytest.approx(found.peak_bytes, rel=0.01)
    # The last rank gets no halo's gradient back: only a rank in the middle has both neighbors.
    assert received_bytes(FLASH, shape, FLASH.layers[layer], path)[0] == found.received_forward


@pytest.mark.parametrize(
    ("layer", "peak"), [(0, 6.64), (2, 9.06), (3, 8.19), (20, 10.14), (24, 10.07)]
)
def test_memory_at_a_million_tokens_is_what_the_documentation_reports(layer, peak):
    planned = peak_of(shape_of(*AT_1M), layer, "boundary")
    assert planned / GIB == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize(("path", "balance"), [("boundary", "on"), ("all_gather", "on")])
def test_bytes_of_a_rank_with_two_neighbors_are_what_is_profiled(path, balance, layer):
    found = profiled(path, layer, 16384, 4, 2, balance=balance, kernels="triton", batch=2)
    received = (found.received_forward, found.received_backward)
    shape = shape_of(16384, 4, batch=2)
    planned = received_bytes(FLASH, shape, FLASH.layers[layer], path, balanced=True)
    assert planned == received
    off = received_bytes(FLASH, shape, FLASH.layers[layer], path)
    assert (planned > off) == (layer in MOVED)


@pytest.mark.parametrize("path", PATHS)
def test_what_layers_hand_on_is_what_is_profiled(path):
    at, last = (65536, 4), FLASH.num_hidden_layers - 1
    ratio_2, ratio_1 = (
        profiled(path, layer, *at, 3, kernels="triton").carried_bytes for layer in (2, 20)
    )
    shape, selected = shape_of(*at), 16384 * 512 * (8 if path == AUTOMODEL else 4)
    held = carried_bytes(FLASH, shape, path, last)
    of_entries = 65536 * 1024  # which our peak of a layer that reads them contains
    mine = 0 if path == AUTOMODEL else of_entries
    # Layers 24, 28, 32 and 36 selected, too.
    assert held == 3 * ratio_2 + ratio_1 + 4 * selected - mine
    # Of layer 25 nothing of three later selections; AutoModel's gradient of entries from layer 26.
    later = of_entries - mine
    assert carried_bytes(FLASH, shape, path, 25) == held - 3 * selected + later
    assert carried_bytes(FLASH, shape, path, 2) == 0


def test_a_step_receives_what_the_documentation_says():
    def per_token(path):
        shape = shape_of(*AT_1M)
        passes = [received_bytes(FLASH, shape, layer, path) for layer in FLASH.layers]
        return [sum(received) / 16384 / 63 for received in zip(*passes, strict=True)]

    forward, backward = per_token("boundary")
    halos = 40 * 127 * 1024 / 16384 / 63
    assert forward == pytest.approx(890 + halos)
    assert backward == pytest.approx(2560 + halos)
    assert per_token(AUTOMODEL)[0] == pytest.approx(44000, rel=0.01)


def test_token_ids_of_n_grams_are_what_is_profiled():
    (case,) = cases(["boundary"], [0], 8192, 4, 2)
    with fake_rank(case) as group, Profiler(case) as profiler:
        state = SharedState.start(
            2048, ContextParallelOptions(), group=group, documents_BL=None, alignment=2
        )
        ids = torch.zeros(1, 2048, dtype=torch.long)
        state.step.with_halo({"ids": ids, "real": ids.bool()}, FLASH.engram_max_ngram_size - 1)
        assert engram_bytes(FLASH, shape_of(8192, 4), "boundary") == profiler.received
    assert engram_bytes(FLASH, shape_of(8192, 4), AUTOMODEL) == 3 * 2048 * 9
    assert engram_bytes(FLASH, shape_of(8192, 1), AUTOMODEL) == 0


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("balance", ["off", "on"])
def test_operations_are_those_that_the_layer_computes(layer, balance):
    (case,) = cases(["boundary"], [layer], 65536, 4, 2, kernels="triton", balance=balance)
    kind, shape = FLASH.layers[layer], Shape(case.layout)
    moves = balance == "on" and kind.moves
    schedule = (balanced if moves else contiguous)(case.layout)
    of_queries = operations_of_queries(FLASH, kind, schedule, shape, 2)
    operations = [
        *of_queries["local"],
        *of_queries["remote"],
        *(o for o in shard_operations(FLASH, kind, 16384) if o.name != "experts"),
    ]
    expected = [
        2 * sum(getattr(operation, step) for operation in operations)
        for step in ("forward", "backward")
    ]
    assert count_flops(case) == pytest.approx(expected, rel=0.005)


def test_only_what_all_visible_entries_need_grows_with_the_position():
    early, late = (range(start, start + 512) for start in (65536, 131072))
    for number in KINDS:
        layer = FLASH.layers[number]
        first, second = (query_operations(FLASH, layer, (run,)) for run in (early, late))
        grown = {a.name for a, b in zip(first, second, strict=True) if b.total > a.total}
        assert grown == ({"index scores"} if layer.moves else set())


def test_balance_moves_scores_alone_and_makes_no_work():
    shape = shape_of(65536, 4)
    stay, move = contiguous(shape.layout), balanced(shape.layout)
    off, on = (
        work_of_ranks(
            FLASH,
            {layer: schedule if layer.moves else stay for layer in FLASH.layers},
            shape,
        )
        for schedule in (stay, move)
    )
    assert sum(off) == sum(on)
    assert max(on) < max(off)
    for layer in FLASH.layers:
        if layer.moves:
            remote = operations_of_queries(FLASH, layer, move, shape, 0)["remote"]
            assert [operation.name for operation in remote] == ["index scores"]


def test_engram_is_counted_for_the_layers_that_the_model_has():
    per_layer = 100 * 6144 * 5120 * 5
    assert engram_operation(FLASH, 100).forward == 2 * per_layer
    assert engram_operation(dataclasses.replace(FLASH, num_hidden_layers=14), 100).forward == (
        per_layer
    )


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("balance", ["off", "on"])
def test_the_order_of_overlap_is_that_of_the_layer(layer, balance, monkeypatch):
    (case,) = cases(["boundary"], [layer], 8192, 4, 1, kernels="torch", balance=balance)
    kind, found = FLASH.layers[layer], []
    moves = balance == "on" and kind.moves
    planned = crossings(FLASH, Shape(case.layout), kind, "boundary", balanced=moves)
    names = [each.name for each in planned]
    if moves and layer == 20:
        names.append("returned")  # indices and candidates, one after the other
    watch(monkeypatch, found, names, case.layout.own)
    with fake_rank(case) as group:
        build(case, group, dtype=torch.bfloat16, device=torch.device("cpu"))()
    stages = {"project", "attend"} | ({"index_queries", "select"} if kind.selects else set())
    expected = [
        event
        for event in order_of(kind, moves=moves)
        if event[1] in names or (event[1] in stages and (event[0] == "local" or moves))
    ]
    assert list(dict.fromkeys(found)) == expected


def watch(monkeypatch, found, names, own):
    """Note what one rank's layer starts, waits for and computes, as an order of plan has it."""
    flights = []

    def name(flight):
        if not any(flight is known for known in flights):
            flights.append(flight)
        return next(n for n, f in zip(names, flights, strict=False) if f is flight)

    def noted(owner, function, event):
        original = getattr(owner, function)

        def run(*args, **kwargs):
            found.append(event(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, function, run)

    noted(InFlight, "begin", lambda flight, *_: ("start", name(flight)))
    noted(InFlight, "end", lambda flight: ("wait", name(flight)))
    noted(ContextParallelAttentionV41, "_index_queries", lambda *_: ("local", "index_queries"))

    def selects(_, queries, *__):
        first = queries.plan.queries.runs[0].start
        return "local" if first in own else "remote", "select"

    noted(ContextParallelAttentionV41, "_select_for", selects)
    noted(TorchKernels, "attend", lambda *_: ("local", "attend"))
    linear = torch.nn.Linear.forward

    def projects(module, rows):
        if module.out_features == FLASH.num_attention_heads * FLASH.head_dim:
            found.append(("local", "project"))
        return linear(module, rows)

    monkeypatch.setattr(torch.nn.Linear, "forward", projects)


@pytest.mark.parametrize("transport", ["boundary", "all_gather"])
def test_a_plan_shares_out_the_selection(transport):
    request = Request(FLASH, 1 << 20, 64, transport=transport)
    row = planning.row(request, 64)
    assert (row.staying.moved_layers, row.moving.moved_layers) == ((), (2, 8, 14, 20))
    assert row.moving.moved_ratios == (1, 2)
    assert row.staying.last_over_first > 1.15 > 1.01 > row.moving.last_over_first
    assert row.moving.step.seconds(overlap=True) < row.staying.step.seconds(overlap=True)
    shape = shape_of(*AT_1M)
    moved = sum(
        sum(received_bytes(FLASH, shape, layer, transport, balanced=True))
        - sum(received_bytes(FLASH, shape, layer, transport))
        for layer in FLASH.layers
    )
    assert row.moving.moved_bytes == moved > 0
    assert [(time.name, time.layers) for time in row.moving.step.layers] == [
        ("0", 2),
        ("1 source", 1),
        ("1 inside", 4),
        ("1 reuse", 15),
        ("2 source", 3),
        ("2 reuse", 15),
    ]
    cost = row.of(transport)
    assert 0 < cost.carried_bytes < cost.attention_bytes < row.of(AUTOMODEL).attention_bytes


def test_auto_may_leave_the_selection_as_it_is():
    for gpu in (GPUS["h100"], GPUS["b200"]):
        row = planning.row(Request(FLASH, 1 << 13, 8, gpu=gpu), 8)
        assert row.moving.moved_layers == ()
        assert planning.row(
            Request(FLASH, 1 << 13, 8, gpu=gpu, balance="on"), 8
        ).moving.moved_layers
