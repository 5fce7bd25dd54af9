# SPDX-License-Identifier: Apache-2.0
"""How long a layer and a training step take, estimated: computing, and what ranks wait for.

A layer runs forward, forward again (activation checkpointing of whole layers, with kept top-k
indices), and backward. Computing and communicating are the operations and collectives of
``inventory`` and ``crossings`` at the rates of ``gpus``. What of the collectives is exposed follows
from :func:`order_of`, the order of work in ``attention/layer.py`` and ``layer_v41.py``.

Left out, on every path alike: memory-bound operations (norms, rotary, pooling, top-k,
hyper-connections, the optimizer), traffic of FSDP and of expert parallelism and their uneven
experts, launches, and what a collective takes from the kernels it overlaps with. Rows hold one
document.
"""

# L local tokens   R CP ranks

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nemo_dsv4_cp.gpus import Gpu
from nemo_dsv4_cp.sequence.schedule import Schedule
from nemo_dsv4_cp.tools.crossings import Collective, crossings
from nemo_dsv4_cp.tools.inventory import (
    PASSES,
    Operation,
    Pass,
    Shape,
    engram_operation,
    head_operation,
    operations_of_queries,
    shard_operations,
)
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.sizes import ModelSizes

Event = tuple[str, str]
"""The start of a collective or the wait for it, by name; or whose queries, and their stage."""

WINDOW_ONLY: tuple[Event, ...] = (
    ("start", "fetch"),
    ("local", "project"),
    ("wait", "fetch"),
    ("local", "attend"),
)
ALL_LOCAL: tuple[Event, ...] = (
    ("start", "fetch"),
    ("local", "index_queries"),
    ("wait", "fetch"),
    ("start", "index_keys"),
    ("start", "entries"),
    ("local", "project"),
    ("wait", "index_keys"),
    ("local", "select"),
    ("wait", "entries"),
    ("local", "attend"),
)
SOME_REMOTE: tuple[Event, ...] = (
    ("start", "fetch"),
    ("local", "index_queries"),
    ("local", "project"),
    ("wait", "fetch"),
    ("start", "index_keys"),
    ("start", "entries"),
    ("remote", "index_queries"),
    ("remote", "project"),
    ("wait", "index_keys"),
    ("remote", "select"),
    ("local", "select"),
    ("wait", "entries"),
    ("remote", "attend"),
    ("start", "returned"),
    ("local", "attend"),
    ("wait", "returned"),
)


V41: tuple[Event, ...] = (
    ("start", "fetch"),
    ("start", "index_keys"),
    ("start", "entries"),
    ("local", "index_queries"),
    ("start", "index_queries"),
    ("local", "project"),
    ("wait", "index_keys"),
    ("wait", "index_queries"),
    ("remote", "select"),
    ("start", "returned"),
    ("local", "select"),
    ("wait", "returned"),
    ("wait", "entries"),
    ("wait", "fetch"),
    ("local", "attend"),
)


def order_of(layer: Layer, *, moves: bool) -> tuple[Event, ...]:
    """Return forward's order of collectives and stages in a layer; backward's is the reverse.

    A layer skips what it has not: V4's without an indexer, and most of V4.1's. Tests compare the
    orders with the layers' own.
    """
    if layer.shares:
        return V41
    return SOME_REMOTE if moves else ALL_LOCAL if layer.ratio else WINDOW_ONLY


@dataclass(frozen=True)
class Time:
    """Seconds of all passes together.

    Attributes:
        computing: What the busiest rank computes.
        communicating: What collectives take without overlap.
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
    """Seconds of one layer in a step, of all ``layers`` of its kind, which has a ``name``."""

    name: str
    ratio: int
    layers: int


@dataclass(frozen=True)
class StepTime(Time):
    """Seconds of a step: its layers by ascending ratio, and what computes alone.

    Attributes:
        head: The language-model head.
        engram: V4.1's Engram layers, all together.
    """

    layers: tuple[LayerTime, ...]
    head: float
    engram: float


def _seconds(operations: Iterable[Operation], gpu: Gpu, batch: int, step: Pass) -> float:
    return sum(
        2 * batch * int(getattr(each, step)) / float(getattr(gpu, f"{each.rate}_per_second"))
        for each in operations
    )


def waiting(
    order: Iterable[Event], computing: Mapping[Event, float], crossing: Mapping[str, float]
) -> float:
    """Return what a rank waits for in one pass, whose collectives follow one after the other.

    ``computing`` holds the seconds of each stage, ``crossing`` those of each collective.
    """
    now = free = waited = 0.0  # free: when the link is
    arrives: dict[str, float] = {}
    for event in order:
        what, name = event
        if what == "start" and name in crossing:
            arrives[name] = free = max(now, free) + crossing[name]
        elif what == "wait" and name in crossing:
            late = max(0.0, arrives[name] - now)
            now, waited = now + late, waited + late
        else:
            now += computing.get(event, 0.0)
    return waited


def crossing_seconds(collective: Collective, step: Pass, gpu: Gpu, ranks: int) -> float:
    """Return the seconds of a collective in one pass."""
    received = int(getattr(collective, step))
    if not collective.from_all:
        return gpu.exchange_seconds(received, ranks)
    if step != "backward":
        return gpu.gather_seconds(received, ranks)
    reduced = collective.reduced
    return gpu.gather_seconds(reduced, ranks) + gpu.scatter_seconds(received - reduced, ranks)


def layer_time(
    sizes: ModelSizes, shape: Shape, layer: Layer, schedule: Schedule, gpu: Gpu, transport: str
) -> LayerTime:
    """Return the seconds of a layer, whose ranks wait for the last one.

    ``transport`` is one of ``crossings.TRANSPORTS``.
    """
    collectives = crossings(sizes, shape, layer, transport, balanced=schedule.moves)
    order = order_of(layer, moves=schedule.moves)
    shard = shard_operations(sizes, layer, shape.layout.local_len)
    queries = [
        operations_of_queries(sizes, layer, schedule, shape, rank) for rank in range(shape.ranks)
    ]
    communicating = of_shard = 0.0
    computing, done = [0.0] * shape.ranks, [0.0] * shape.ranks  # of each rank
    for step in PASSES:
        crossing = {
            each.name: crossing_seconds(each, step, gpu, shape.ranks) for each in collectives
        }
        communicating += sum(crossing.values())
        of_shard += _seconds(shard, gpu, shape.batch, step)
        for rank, operations in enumerate(queries):
            stages: dict[Event, float] = {}
            for whose, of_queries in operations.items():
                for each in of_queries:
                    seconds = _seconds([each], gpu, shape.batch, step)
                    stages[whose, each.stage] = stages.get((whose, each.stage), 0.0) + seconds
            computing[rank] += sum(stages.values())
            done[rank] += sum(stages.values()) + waiting(order, stages, crossing)
    return LayerTime(
        computing=of_shard + max(computing),
        communicating=communicating,
        exposed=max(done) - max(computing),
        name=layer.name,
        ratio=layer.ratio,
        layers=sizes.layers.count(layer),
    )


def step_time(
    sizes: ModelSizes, shape: Shape, schedules: Mapping[Layer, Schedule], gpu: Gpu, transport: str
) -> StepTime:
    """Return the seconds of a step: forward, recomputation and backward of one batch.

    ``schedules`` are those of each kind of layer.
    """
    tokens = shape.layout.local_len

    def alone(operation: Operation, passes: Iterable[Pass]) -> float:
        return sum(_seconds([operation], gpu, shape.batch, step) for step in passes)

    # The head is not checkpointed, so nothing of it is repeated.
    head = alone(head_operation(sizes, tokens), ("forward", "backward"))
    engram = alone(engram_operation(sizes, tokens), PASSES)
    layers = tuple(
        layer_time(sizes, shape, layer, schedules[layer], gpu, transport)
        for layer in sorted(schedules, key=lambda layer: layer.order)
    )
    return StepTime(
        computing=head + engram + sum(each.layers * each.computing for each in layers),
        communicating=sum(each.layers * each.communicating for each in layers),
        exposed=sum(each.layers * each.exposed for each in layers),
        layers=layers,
        head=head,
        engram=engram,
    )
