# SPDX-License-Identifier: Apache-2.0
"""Seconds by hand, and what hides what, in the order that the layer itself runs in."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.attention.indexer import Indexer
from nemo_dsv4_cp.bench.layer import Case, build
from nemo_dsv4_cp.bench.profiling import let_fake_tensors_through_collectives
from nemo_dsv4_cp.exchange.collectives import InFlight, process_group
from nemo_dsv4_cp.gpus import GPUS, Gpu
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import balanced, contiguous
from nemo_dsv4_cp.tools import inventory, step_time
from nemo_dsv4_cp.tools.crossings import crossings
from nemo_dsv4_cp.tools.inventory import Shape
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields
from nemo_dsv4_cp.tools.step_time import order_of, waiting

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))
GPU = Gpu("none", 80, 1000, 10, kernel_share=0.1, nvlink_gbs=100, network_gbs=10)
STAGES = ("index_queries", "project", "select", "attend")
SECONDS = {
    (whose, stage): 2.0 ** (4 * (whose == "remote") + place)
    for whose in ("local", "remote")
    for place, stage in enumerate(STAGES)
}


def shape_and_schedule(cp_size, *, moves, batch=1, local_len=1024):
    shape = Shape(SequenceLayout(local_len, cp_size - 1, cp_size), batch)
    return shape, balanced(shape.layout) if moves else contiguous(shape.layout)


class Recorder:
    """What one rank's layer starts, waits for and computes, in its order.

    Attributes:
        forward: As an order of ``step_time`` has it.
        backward: The same of the gradients.
    """

    def __init__(self, monkeypatch, own, collectives):
        self.forward, self.backward = [], []
        self.events = self.forward
        self._own, self._flights, self._patch = own, [], monkeypatch.setattr
        begin, end = InFlight.begin, InFlight.end

        def name(flight):
            if not any(flight is known for known in self._flights):
                self._flights.append(flight)
            return next(n for n, f in zip(collectives, self._flights, strict=False) if f is flight)

        def on_begin(flight, *arguments):
            self.events.append(("start", name(flight)))
            begin(flight, *arguments)

        def on_end(flight):
            self.events.append(("wait", name(flight)))
            return end(flight)

        self._patch(InFlight, "begin", on_begin)
        self._patch(InFlight, "end", on_end)
        self._whose = {}  # by low-rank queries
        for stage in ("project", "select", "attend"):
            self._watch(stage)
        index_queries = Indexer.queries

        def on_index_queries(indexer, low):
            self.forward.append((low, "index_queries"))
            return index_queries(indexer, low)

        self._patch(Indexer, "queries", on_index_queries)

    def resolve(self):
        """Name whose index queries were made: their low-rank queries are projected later."""
        self.forward[:] = [
            (first if isinstance(first, str) else self._whose[first], name)
            for first, name in self.forward
        ]

    def _watch(self, stage):
        original = getattr(ContextParallelAttention, f"_{stage}")

        def run(module, queries, *others):
            first = queries.plan.queries.runs[0].start
            event = ("local" if first in self._own else "remote", stage)
            self._whose[queries.low_BCA] = event[0]
            result = original(module, queries, *others)
            self.forward.append(event)
            if result.requires_grad:
                result.register_hook(lambda _: self.backward.append(event))
            return result

        self._patch(ContextParallelAttention, f"_{stage}", run)


def between(events, collective):
    """What is computed while a collective is under way."""
    begun, ended = events.index(("start", collective)), events.index(("wait", collective))
    return {event for event in events[begun:ended] if event in SECONDS}


@pytest.mark.parametrize(
    ("ratio", "moves"), [(0, False), (4, False), (4, True), (128, False), (128, True)]
)
def test_the_orders_are_those_of_the_layer(ratio, moves, monkeypatch):
    case = Case("boundary", ratio, 1024, 4, 1, kernels="torch", balance="on" if moves else "off")
    shape = Shape(case.layout)
    names = [
        each.name for each in crossings(FLASH, shape, Layer.v4(ratio), "boundary", balanced=moves)
    ]
    recorder = Recorder(monkeypatch, case.layout.own, names)
    let_fake_tensors_through_collectives()
    with process_group("fake", rank=1, size=4) as group, FakeTensorMode():
        out = build(case, group, dtype=torch.bfloat16, device=torch.device("cpu"))()
        recorder.events = recorder.backward
        out.backward()
    recorder.resolve()

    of_indexer = {"index_queries", "index_keys", "select"}
    order = [
        event
        for event in order_of(Layer.v4(ratio), moves=moves)
        if ratio == 4 or event[1] not in of_indexer
    ]
    assert recorder.forward == order
    stages = {
        operation.stage for operation in inventory.query_operations(FLASH, Layer.v4(ratio), ())
    }
    assert {event[1] for event in order if event in SECONDS} == stages
    # Between the same starts and waits, and nothing of the indexer.
    for name in names:
        if name != "index_keys":
            hidden = {event for event in between(order, name) if event[1] not in of_indexer}
            assert between(recorder.backward, name) == hidden, name
    assert not of_indexer & {name for _, name in recorder.backward}


@pytest.mark.parametrize(
    ("ratio", "moves", "hidden"),
    [
        (0, False, {"fetch": 2}),
        (4, False, {"fetch": 1, "index_keys": 2, "entries": 2 + 4}),
        (4, True, {"fetch": 1 + 2, "index_keys": 16 + 32, "entries": 48 + 64 + 4, "returned": 8}),
    ],
)
def test_a_collective_is_waited_for_less_what_is_computed_meanwhile(ratio, moves, hidden):
    for name, seconds in hidden.items():
        order = order_of(Layer.v4(ratio), moves=moves)
        assert waiting(order, SECONDS, {name: 1000}) == 1000 - seconds


def test_the_second_gather_starts_when_the_first_is_done():
    both = {"index_keys": 50, "entries": 10}
    # 48 projecting; 2 until index keys are here; 68 choosing, while entries arrive.
    order = order_of(Layer.v4(4), moves=True)
    assert waiting(order, SECONDS, both) == 2
    quick = SECONDS | {("local", "select"): 1, ("remote", "select"): 3}
    assert waiting(order, quick, both) == 2 + 10 - 4


def test_what_is_short_is_not_waited_for():
    short = dict.fromkeys(("fetch", "index_keys", "entries", "returned"), 1)
    assert waiting(order_of(Layer.v4(4), moves=True), SECONDS, short) == 0


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("moves", [False, True])
def test_a_layer_computes_as_long_as_its_busiest_rank(ratio, moves):
    shape, schedule = shape_and_schedule(16, moves=moves and ratio > 0, batch=2)
    found = step_time.layer_time(FLASH, shape, Layer.v4(ratio), schedule, GPU, "boundary")
    in_float32 = {"compressor", "indexer.compressor"}
    in_kernels = {"attention", "index scores"}
    ranks = []
    for local, remote in zip(schedule.local, schedule.remote, strict=True):
        seconds = 0
        for operation in (
            *inventory.query_operations(FLASH, Layer.v4(ratio), local),
            *inventory.query_operations(FLASH, Layer.v4(ratio), remote),
            *inventory.shard_operations(FLASH, Layer.v4(ratio), 1024),
        ):
            # Forward twice but for top-k selection; two rows, two operations each.
            repeats = 1 + (operation.backward > 0)
            flops = 4 * (repeats * operation.forward + operation.backward)
            name = operation.name
            rate = 7e12 if name in in_float32 else 100e12 if name in in_kernels else 700e12
            seconds += flops / rate
        ranks.append(seconds)
    assert found.computing == pytest.approx(max(ranks))
    assert found.layers == {0: 2, 4: 21, 128: 20}[ratio]


@pytest.mark.parametrize("transport", ["boundary", "all_gather"])
def test_a_layer_communicates_forward_again_and_backward(transport):
    shape, schedule = shape_and_schedule(16, moves=True)
    found = step_time.layer_time(FLASH, shape, Layer.v4(4), schedule, GPU, transport)
    fetch, index_keys, entries, returned = crossings(
        FLASH, shape, Layer.v4(4), transport, balanced=True
    )
    if transport == "boundary":
        sent = (fetch.forward, fetch.repeated, fetch.backward)
        expected = sum(GPU.exchange_seconds(received, 16) for received in sent)
    else:  # features are summed on their way back, and other rows where they arrive
        expected = sum(GPU.gather_seconds(each, 16) for each in (fetch.forward, fetch.repeated))
        features = 15 * 1024 * 2 * 512 * 4
        expected += GPU.gather_seconds(features, 16)
        expected += GPU.scatter_seconds(fetch.backward - features, 16)
    expected += GPU.gather_seconds(index_keys.forward, 16)
    expected += 2 * GPU.gather_seconds(entries.forward, 16)
    expected += GPU.scatter_seconds(entries.backward, 16)
    expected += 3 * GPU.exchange_seconds(returned.forward, 16)
    assert found.communicating == pytest.approx(expected)
    assert fetch.forward > fetch.repeated > fetch.backward


def test_a_layer_is_done_when_its_last_rank_is():
    # Of compute without end nothing is hidden, and of links without end nothing waited for.
    shape, schedule = shape_and_schedule(16, moves=True)
    at_once = dataclasses.replace(GPU, tflops=1e12, float32_tflops=1e12)
    found = step_time.layer_time(FLASH, shape, Layer.v4(4), schedule, at_once, "boundary")
    assert found.exposed == pytest.approx(found.communicating, rel=1e-6)
    assert found.seconds(overlap=True) == pytest.approx(found.seconds(overlap=False), rel=1e-6)
    slow = dataclasses.replace(GPU, tflops=1, float32_tflops=1)
    found = step_time.layer_time(FLASH, shape, Layer.v4(4), schedule, slow, "boundary")
    assert 0 == found.exposed < found.communicating
    assert found.seconds(overlap=False) == found.computing + found.communicating


def test_a_step_is_its_layers_and_the_head():
    shape, schedule = shape_and_schedule(4, moves=True, batch=2)
    stay = contiguous(shape.layout)
    schedules = {Layer.v4(ratio): schedule if ratio else stay for ratio in (0, 4, 128)}
    step = step_time.step_time(FLASH, shape, schedules, GPU, "boundary")
    assert [(layer.ratio, layer.layers) for layer in step.layers] == [(0, 2), (4, 21), (128, 20)]
    assert step.head == pytest.approx(2 * 2 * 3 * 1024 * 4096 * 129280 / 700e12)
    for overlap in (True, False):
        seconds = [layer.seconds(overlap=overlap) for layer in step.layers]
        total = 2 * seconds[0] + 21 * seconds[1] + 20 * seconds[2] + step.head
        assert step.seconds(overlap=overlap) == pytest.approx(total)
    assert step.exposed < step.communicating


def test_one_rank_waits_for_nobody():
    shape, schedule = shape_and_schedule(1, moves=False)
    for ratio in (0, 4, 128):
        found = step_time.layer_time(
            FLASH, shape, Layer.v4(ratio), schedule, GPUS["b200"], "boundary"
        )
        assert found.communicating == found.exposed == 0
