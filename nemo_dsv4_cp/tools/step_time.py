# SPDX-License-Identifier: Apache-2.0
"""How long a layer and a training step take, estimated: computing, and what ranks wait for.

A layer runs forward, forward again (activation checkpointing of whole layers, the index choice
kept), and backward. Computing is the multiply-adds of ``work`` at the rates of ``gpus``;
communication the bytes of ``costs`` over its links. What of it is exposed follows the order in
which ``attention/layer.py`` starts collectives and waits for them.

Left out, on every path alike: what memory bounds (norms, rotary, pooling, top-k,
hyper-connections, the optimizer), traffic of FSDP and of expert parallelism and their uneven
experts, launches, and what a collective takes from the kernels it hides behind. Rows of one
document.
"""

# L local tokens   R CP ranks

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemo_dsv4_cp.gpus import Gpu
from nemo_dsv4_cp.sequence.schedule import Schedule
from nemo_dsv4_cp.tools.costs import Crossing, LayerCrossings, Shape, crossings
from nemo_dsv4_cp.tools.sizes import ModelSizes
from nemo_dsv4_cp.tools.work import (
    Count,
    QueryWork,
    ShardWork,
    head_work,
    query_work,
    shard_work,
)

Pass = Literal["forward", "repeated", "backward"]
"""A pass through a layer, by the name that counts and crossings give it."""
PASSES: tuple[Pass, ...] = ("forward", "repeated", "backward")


@dataclass(frozen=True)
class Time:
    """Seconds of all passes together.

    Attributes:
        computing: What the busiest rank computes.
        communicating: What collectives take, as if they hid behind nothing.
        exposed: What it takes longer than ``computing`` where they overlap with it.
    """

    computing: float
    communicating: float
    exposed: float

    def seconds(self, *, overlap: bool) -> float:
        """Return what it takes with a setting of ``context_parallel.overlap``."""
        return self.computing + (self.exposed if overlap else self.communicating)


@dataclass(frozen=True)
class LayerTime(Time):
    """Seconds of one layer in a step.

    Attributes:
        ratio: The layer's compress ratio.
        layers: How many layers have it.
    """

    ratio: int
    layers: int


@dataclass(frozen=True)
class StepTime(Time):
    """Seconds of a step: its layers, one after another, and the language-model head.

    Attributes:
        layers: One for each compress ratio, ascending.
        head: The language-model head, which computes alone.
    """

    layers: tuple[LayerTime, ...]
    head: float


@dataclass(frozen=True)
class _PartSeconds:
    """One pass of some queries through what hides a collective."""

    index_projection: float
    projection: float
    choice: float
    attending: float

    @property
    def all(self) -> float:
        return self.index_projection + self.projection + self.choice + self.attending


@dataclass(frozen=True)
class _CrossingSeconds:
    """One pass of what crosses for a layer."""

    fetch: float
    index_keys: float
    entries: float
    home: float

    @property
    def all(self) -> float:
        return self.fetch + self.index_keys + self.entries + self.home


class _Rates:
    """Seconds of counts in one pass, of all rows of a batch."""

    def __init__(self, gpu: Gpu, batch: int, step: Pass) -> None:
        self._gpu, self._batch, self._step = gpu, batch, step

    def of_products(self, *counts: Count) -> float:
        return self._flops(counts) / self._gpu.products_a_second

    def of_float32(self, *counts: Count) -> float:
        return self._flops(counts) / self._gpu.float32_a_second

    def of_kernels(self, *counts: Count) -> float:
        return self._flops(counts) / self._gpu.kernels_a_second

    def _flops(self, counts: tuple[Count, ...]) -> int:
        return sum(2 * self._batch * int(getattr(count, self._step)) for count in counts)

    def part(self, work: QueryWork) -> _PartSeconds:
        return _PartSeconds(
            index_projection=self.of_products(work.index_projection),
            projection=self.of_products(work.projection),
            choice=self.of_kernels(work.choice),
            attending=self.of_kernels(work.attention) + self.of_products(work.output),
        )

    def shard(self, work: ShardWork) -> float:
        products = self.of_products(work.projections, work.index_weights, work.experts)
        return products + self.of_float32(work.compression, work.index_compression)


def _waiting(
    kept: _PartSeconds, taken: _PartSeconds, crossing: _CrossingSeconds, *, ratio: int, moves: bool
) -> float:
    """Return what one pass waits for where collectives overlap with what is computed.

    Forward's order; backward's is the reverse, between the same starts and waits.
    """
    # The exchange, behind what of the kept queries is computed before it is waited for.
    beside = kept.index_projection + (kept.projection if moves or not ratio else 0)
    fetch = max(0, crossing.fetch - beside)
    # Both gathers one after the other, behind projections, that of entries behind the choice, too.
    between = taken.index_projection + taken.projection if moves else kept.projection
    index_keys = max(0, crossing.index_keys - between)
    between += index_keys + kept.choice + taken.choice
    entries = max(0, crossing.index_keys + crossing.entries - between)
    # The way home of what the taken queries yield, behind attention of the kept ones.
    home = max(0, crossing.home - kept.attending)
    return fetch + index_keys + entries + home


def layer_time(
    sizes: ModelSizes, shape: Shape, ratio: int, schedule: Schedule, gpu: Gpu, transport: str
) -> LayerTime:
    """Return the seconds of a layer, whose ranks wait for the one that is done last.

    Args:
        sizes: The model's sizes.
        shape: The batch and how it is cut.
        ratio: The layer's compress ratio.
        schedule: Which rank computes which queries.
        gpu: What computes and what bytes cross.
        transport: One of ``paths.TRANSPORTS``.
    """
    crossed = crossings(sizes, shape, ratio, transport, balanced=schedule.moves)
    shard = shard_work(sizes, ratio, shape.layout.local_len)
    queries = [
        (query_work(sizes, ratio, kept), query_work(sizes, ratio, taken))
        for kept, taken in zip(schedule.local, schedule.remote, strict=True)
    ]
    communicating = own = 0.0
    computing, done = [0.0] * shape.ranks, [0.0] * shape.ranks  # of each rank
    for step in PASSES:
        rates, crossing = _Rates(gpu, shape.batch, step), _of_crossings(crossed, step, gpu, shape)
        communicating += crossing.all
        own += rates.shard(shard)
        for rank, works in enumerate(queries):
            kept, taken = map(rates.part, works)
            computing[rank] += kept.all + taken.all
            waits = _waiting(kept, taken, crossing, ratio=ratio, moves=schedule.moves)
            done[rank] += kept.all + taken.all + waits
    return LayerTime(
        computing=own + max(computing),
        communicating=communicating,
        exposed=max(done) - max(computing),
        ratio=ratio,
        layers=sizes.compress_ratios.count(ratio),
    )


def _of_crossings(layer: LayerCrossings, step: Pass, gpu: Gpu, shape: Shape) -> _CrossingSeconds:
    def seconds(crossing: Crossing) -> float:
        link = gpu.gather_seconds if crossing.from_all else gpu.exchange_seconds
        return link(getattr(crossing, step), shape.ranks)

    return _CrossingSeconds(
        seconds(layer.fetch), seconds(layer.index_keys), seconds(layer.entries), seconds(layer.home)
    )


def step_time(
    sizes: ModelSizes, shape: Shape, schedules: Mapping[int, Schedule], gpu: Gpu, transport: str
) -> StepTime:
    """Return the seconds of a step: forward, recomputation and backward of one batch.

    Args:
        sizes: The model's sizes.
        shape: The batch and how it is cut.
        schedules: Of each compress ratio, which rank computes which queries.
        gpu: What computes and what bytes cross.
        transport: One of ``paths.TRANSPORTS``.
    """
    # The head is not checkpointed, so nothing of it is repeated.
    multiply_adds = shape.batch * head_work(sizes, shape.layout.local_len).total
    head = 2 * multiply_adds / gpu.products_a_second
    layers = tuple(
        layer_time(sizes, shape, ratio, schedules[ratio], gpu, transport)
        for ratio in sorted(schedules)
    )
    return StepTime(
        computing=head + sum(each.layers * each.computing for each in layers),
        communicating=sum(each.layers * each.communicating for each in layers),
        exposed=sum(each.layers * each.exposed for each in layers),
        layers=layers,
        head=head,
    )
