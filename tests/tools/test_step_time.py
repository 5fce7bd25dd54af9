# SPDX-License-Identifier: Apache-2.0
"""Seconds by hand, and what hides what, in the order that the layer itself runs in."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.bench.layer import Case, build
from nemo_dsv4_cp.bench.profiling import let_fake_tensors_through_collectives
from nemo_dsv4_cp.exchange.collectives import InFlight, process_group
from nemo_dsv4_cp.gpus import GPUS, Gpu
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import balanced, contiguous
from nemo_dsv4_cp.tools import step_time, work
from nemo_dsv4_cp.tools.costs import Shape, crossings
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields
from nemo_dsv4_cp.tools.step_time import _CrossingSeconds, _PartSeconds, _waiting

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))
GPU = Gpu("none", 80, 1000, 10, kernel_share=0.1, nvlink_gbs=100, network_gbs=10)
NOTHING = _PartSeconds(0, 0, 0, 0)
KEPT, TAKEN = _PartSeconds(1, 2, 4, 8), _PartSeconds(16, 32, 64, 128)
COLLECTIVES = ("fetch", "index_keys", "entries", "home")


def shape_and_schedule(cp_size, *, moves, batch=1, local_len=1024):
    shape = Shape(SequenceLayout(local_len, cp_size - 1, cp_size), batch)
    return shape, balanced(shape.layout, 4) if moves else contiguous(shape.layout)


class Recorder:
    """What one rank's layer starts, ends and computes, in its order, forward and backward.

    Attributes:
        events: ("start" or "end", number of the collective, pass), and (whose queries, field of
            their seconds, pass).
    """

    def __init__(self, monkeypatch, own):
        self.events, self.step = [], "forward"
        self._own, self._flights, self._patch = own, [], monkeypatch.setattr
        begin, end = InFlight.begin, InFlight.end

        def on_begin(flight, *arguments):
            if flight not in self._flights:
                self._flights.append(flight)
            self.events.append(("start", self._flights.index(flight), self.step))
            begin(flight, *arguments)

        def on_end(flight):
            self.events.append(("end", self._flights.index(flight), self.step))
            return end(flight)

        self._patch(InFlight, "begin", on_begin)
        self._patch(InFlight, "end", on_end)
        self._watch("_project_index", "index_projection")
        self._watch("_project", "projection")
        self._watch("_choose", "choice")
        self._watch("_attend", "attending")

    def _watch(self, method, field):
        original = getattr(ContextParallelAttention, method)

        def run(layer, queries, *others):
            first = queries.rows.attention.queries.runs[0].start
            whose = "kept" if first in self._own else "taken"
            result = original(layer, queries, *others)
            self.events.append((whose, field, "forward"))
            if result.requires_grad:
                result.register_hook(lambda _: self.events.append((whose, field, "backward")))
            return result

        self._patch(ContextParallelAttention, method, run)

    def between(self, collective, step):
        """What is computed while a collective is under way; None if it never is."""
        start, end = ("start", collective, step), ("end", collective, step)
        if start not in self.events:
            return None
        begun, ended = self.events.index(start), self.events.index(end)
        return [(whose, field) for whose, field, _ in self.events[begun + 1 : ended]]


@pytest.mark.parametrize(
    ("ratio", "moves", "crossing"),
    [
        (0, False, ["fetch"]),
        (4, False, ["fetch", "index_keys", "entries"]),
        (4, True, ["fetch", "index_keys", "entries", "home"]),
        (128, False, ["fetch", "entries"]),
        (128, True, ["fetch", "entries", "home"]),
    ],
)
def test_collectives_hide_behind_what_the_layer_computes_meanwhile(
    ratio, moves, crossing, monkeypatch
):
    case = Case("boundary", ratio, 1024, 4, 1, kernels="torch", balance="on" if moves else "off")
    recorder = Recorder(monkeypatch, case.layout.own)
    let_fake_tensors_through_collectives()
    with process_group("fake", rank=1, size=4) as group, FakeTensorMode():
        out = build(case, group, dtype=torch.bfloat16, device=torch.device("cpu"))()
        recorder.step = "backward"
        out.backward(torch.empty_like(out))

    def part(seconds, step):
        chooses = ratio == 4 and step == "forward"
        return seconds if chooses else dataclasses.replace(seconds, index_projection=0, choice=0)

    for step in ("forward", "backward"):
        parts = {"kept": part(KEPT, step), "taken": part(TAKEN if moves else NOTHING, step)}
        for place, name in enumerate(crossing):
            between = recorder.between(place, step)
            if between is None:
                assert (name, step) == ("index_keys", "backward")
                continue
            # Another collective may start or end meanwhile.
            hidden = sum(getattr(parts[w], field) for w, field in between if w in parts)
            alone = _CrossingSeconds(**{each: 1000 * (each == name) for each in COLLECTIVES})
            waits = _waiting(parts["kept"], parts["taken"], alone, ratio=ratio, moves=moves)
            assert waits == 1000 - hidden, (name, step)
            assert hidden or (name == "fetch" and not moves)


def test_the_second_gather_starts_when_the_first_is_done():
    both = _CrossingSeconds(fetch=0, index_keys=50, entries=10, home=0)
    # 48 projecting; 2 until index keys are here; 68 choosing, while entries arrive.
    assert _waiting(KEPT, TAKEN, both, ratio=4, moves=True) == 2
    quick = dataclasses.replace(KEPT, choice=1), dataclasses.replace(TAKEN, choice=3)
    assert _waiting(*quick, both, ratio=4, moves=True) == 2 + 10 - 4


def test_what_is_short_is_not_waited_for():
    short = _CrossingSeconds(1, 1, 1, 1)
    assert _waiting(KEPT, TAKEN, short, ratio=4, moves=True) == 0


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("moves", [False, True])
def test_a_layer_computes_as_long_as_its_busiest_rank(ratio, moves):
    shape, schedule = shape_and_schedule(16, moves=moves and ratio > 0, batch=2)
    found = step_time.layer_time(FLASH, shape, ratio, schedule, GPU, "boundary")
    in_float32 = {"compression", "index_compression"}
    in_kernels = {"attention", "choice"}
    ranks = []
    for rank in range(16):
        layer, seconds = work.layer_work(FLASH, ratio, schedule, rank, 1024), 0
        for part in (layer.kept, layer.taken, layer.shard):
            for name, count in vars(part).items():
                # Twice forward but for the index choice; two rows, two operations each.
                flops = 4 * ((1 + (count.backward > 0)) * count.forward + count.backward)
                rate = 7e12 if name in in_float32 else 100e12 if name in in_kernels else 700e12
                seconds += flops / rate
        ranks.append(seconds)
    assert found.computing == pytest.approx(max(ranks))
    assert found.layers == {0: 2, 4: 21, 128: 20}[ratio]


@pytest.mark.parametrize("transport", ["boundary", "all_gather"])
def test_a_layer_communicates_forward_again_and_backward(transport):
    shape, schedule = shape_and_schedule(16, moves=True)
    found = step_time.layer_time(FLASH, shape, 4, schedule, GPU, transport)
    layer = crossings(FLASH, shape, 4, transport, balanced=True)
    fetch = GPU.exchange_seconds if transport == "boundary" else GPU.gather_seconds
    sent = (layer.fetch.forward, layer.fetch.repeated, layer.fetch.backward)
    expected = sum(fetch(received, 16) for received in sent)
    expected += GPU.gather_seconds(layer.index_keys.forward, 16)
    expected += 3 * GPU.gather_seconds(layer.entries.forward, 16)
    expected += 3 * GPU.exchange_seconds(layer.home.forward, 16)
    assert found.communicating == pytest.approx(expected)
    assert layer.fetch.forward > layer.fetch.repeated > layer.fetch.backward


def test_a_layer_is_done_when_its_last_rank_is():
    # Of compute without end nothing is hidden, and of links without end nothing waited for.
    shape, schedule = shape_and_schedule(16, moves=True)
    at_once = dataclasses.replace(GPU, tflops=1e12, float32_tflops=1e12)
    layer = step_time.layer_time(FLASH, shape, 4, schedule, at_once, "boundary")
    assert layer.exposed == pytest.approx(layer.communicating, rel=1e-6)
    assert layer.seconds(overlap=True) == pytest.approx(layer.seconds(overlap=False), rel=1e-6)
    slow = dataclasses.replace(GPU, tflops=1, float32_tflops=1)
    layer = step_time.layer_time(FLASH, shape, 4, schedule, slow, "boundary")
    assert 0 == layer.exposed < layer.communicating
    assert layer.seconds(overlap=False) == layer.computing + layer.communicating


def test_a_step_is_its_layers_and_the_head():
    shape, schedule = shape_and_schedule(4, moves=True, batch=2)
    schedules = {0: contiguous(shape.layout), 4: schedule, 128: schedule}
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
        layer = step_time.layer_time(FLASH, shape, ratio, schedule, GPUS["b200"], "boundary")
        assert layer.communicating == layer.exposed == 0
