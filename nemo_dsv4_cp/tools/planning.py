# SPDX-License-Identifier: Apache-2.0
"""What a context-parallel size costs each rank, by arithmetic alone: no GPU, no process group."""

# B batch rows   L local tokens   R CP ranks   E hidden size

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from nemo_dsv4_cp.gpus import GPUS, Gpu
from nemo_dsv4_cp.kernels.reference.workspace import workspace_of
from nemo_dsv4_cp.sequence.layout import SequenceLayout, local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.sequence.schedule import Schedules
from nemo_dsv4_cp.tools import memory, memory_v41
from nemo_dsv4_cp.tools.crossings import (
    AUTOMODEL,
    BOUNDARY,
    PATHS,
    engram_bytes,
    query_cost,
    received_bytes,
)
from nemo_dsv4_cp.tools.inventory import Shape, work_of_ranks
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes, ModelSizesV41
from nemo_dsv4_cp.tools.step_time import StepTime, step_time


@dataclass(frozen=True)
class PathCost:
    """What one of ``crossings.PATHS`` costs a rank.

    Attributes:
        received_bytes: What other ranks send it in a step, all layers, forward and backward.
        attention_bytes: Peak of the worst layer's attention, forward and backward.
        carried_bytes: The part of it that V4.1's other layers handed on.
    """

    path: str
    received_bytes: int
    attention_bytes: int
    carried_bytes: int = 0


@dataclass(frozen=True)
class Sharing:
    """How a setting of ``context_parallel.balance`` distributes the queries, and what follows.

    Attributes:
        moved_layers: The layers whose queries other ranks compute; of V4.1 those where other ranks
            select for them.
        moved_ratios: Their compress ratios.
        last_over_first: Multiply-adds of the last rank, forward and backward of all layers, as a
            multiple of the first's.
        largest_over_mean: Of the busiest rank, as a multiple of the mean.
        moved_bytes: The part of ``received_bytes`` that comes of it.
    """

    balance: str
    moved_layers: tuple[int, ...]
    moved_ratios: tuple[int, ...]
    last_over_first: float
    largest_over_mean: float
    moved_bytes: int
    step: StepTime


@dataclass(frozen=True)
class Row:
    """One context-parallel size.

    Attributes:
        shard_len: L, tokens on each rank.
        padding: Padding tokens as a share of the padded row.
        idle_ranks: Ranks that hold nothing but padding.
        stream_bytes: The checkpointed layer inputs, [L, hc_mult, E] bfloat16 each.
        staying: Where every rank computes its own queries.
        moving: With the requested balance, ``auto`` where that is ``off``.
        step_seconds: A step with the requested balance and overlap.
        tokens_a_second: What the whole job then trains, padding not counted.
        needed_bytes: Attention with the requested transport, layer inputs, and what is reserved.
    """

    cp_size: int
    shard_len: int
    padding: float
    idle_ranks: int
    costs: tuple[PathCost, ...]
    stream_bytes: int
    staying: Sharing
    moving: Sharing
    step_seconds: float
    tokens_a_second: float
    needed_bytes: int
    fits: bool

    def of(self, path: str) -> PathCost:
        """Return what ``path`` costs."""
        return next(cost for cost in self.costs if cost.path == path)

    def sharing(self, balance: str) -> Sharing:
        """Return what a setting of ``context_parallel.balance`` that was planned comes to."""
        return self.staying if balance == "off" else self.moving


@dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
        seq_len: Tokens in a row, before padding.
        ranks: Number of GPUs.
        transport: The plugin's transport whose memory must fit and whose time counts.
        reserved: What weights, optimizer state and experts take of a GPU's memory, in GiB.
        balance: ``context_parallel.balance``, as ``overlap`` is ``context_parallel.overlap``.
    """

    sizes: ModelSizes
    seq_len: int
    ranks: int
    batch: int = 1
    transport: str = BOUNDARY
    gpu: Gpu = GPUS["h100"]
    reserved: float = 40.0
    balance: str = "auto"
    overlap: bool = True


@dataclass(frozen=True)
class Plan:
    """The planned sizes: one ``cp_size``, or ``every`` power of two up to the number of ranks."""

    request: Request
    cp_size: int | None
    every: tuple[Row, ...]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, request: Request, cp_size: int | None = None) -> Plan:
        """Plan one size, or all powers of two."""
        powers = (1 << power for power in range(request.ranks.bit_length()))
        every = tuple(row(request, size) for size in powers)
        return cls(request, cp_size, every, every if cp_size is None else (row(request, cp_size),))

    @cached_property
    def _fitting(self) -> list[Row]:
        """The sizes that fit a GPU and divide the ranks, ascending."""
        return [row for row in self.every if row.fits and self.request.ranks % row.cp_size == 0]

    @property
    def smallest(self) -> int | None:
        """The smallest cp_size that divides the ranks and fits, None if none does."""
        return self._fitting[0].cp_size if self._fitting else None

    @property
    def fastest(self) -> int | None:
        """The one of those that trains most tokens per second, the smaller one of equals."""
        fastest = max(self._fitting, key=lambda row: row.tokens_a_second, default=None)
        return fastest.cp_size if fastest else None

    @property
    def warnings(self) -> list[str]:
        """A line for each kind of poor setting, with the sizes that have it and what is better."""
        return list(_warnings(self))


def row(request: Request, cp_size: int) -> Row:
    """Return what ``cp_size`` ranks per row cost."""
    sizes, batch = request.sizes, request.batch
    multiple = local_seq_multiple(sizes.compress_ratios)
    padded = padded_seq_len(request.seq_len, cp_size=cp_size, pad_multiple=multiple)
    layout = SequenceLayout.of_padded(padded, cp_rank=cp_size - 1, cp_size=cp_size)
    shape, length = Shape(layout, batch), layout.local_len
    staying = _sharing(request, shape, "off")
    moving = _sharing(request, shape, "auto" if request.balance == "off" else request.balance)
    requested = staying if request.balance == "off" else moving
    workspace = workspace_of(round(request.gpu.memory * GIB))
    moved = {sizes.layers[number] for number in requested.moved_layers}
    costs = []
    for path in PATHS:
        received = _received_bytes(sizes, shape, path, moved)
        costs.append(PathCost(path, received, *_attention_bytes(sizes, shape, path, workspace)))
    stream = memory.stream_bytes(sizes, shape)
    attention = next(cost for cost in costs if cost.path == request.transport).attention_bytes
    needed = attention + stream + round(request.reserved * GIB)
    seconds = requested.step.seconds(overlap=request.overlap)
    return Row(
        cp_size=cp_size,
        shard_len=length,
        padding=(padded - request.seq_len) / padded,
        idle_ranks=cp_size - -(-request.seq_len // length),
        costs=tuple(costs),
        stream_bytes=stream,
        staying=staying,
        moving=moving,
        step_seconds=seconds,
        tokens_a_second=request.ranks // cp_size * batch * request.seq_len / seconds,
        needed_bytes=needed,
        fits=needed <= request.gpu.memory * GIB,
    )


def _attention_bytes(sizes: ModelSizes, shape: Shape, path: str, workspace: int) -> tuple[int, int]:
    """Return the peak of the worst layer's attention, and what of it other layers handed on."""
    if not isinstance(sizes, ModelSizesV41):
        of = partial(memory.attention_bytes, sizes, shape, path=path, workspace_bytes=workspace)
        return max(of(layer=layer) for layer in set(sizes.layers)), 0
    peaks = {
        layer: memory_v41.attention_bytes(sizes, shape, layer, path, workspace_bytes=workspace)
        for layer in set(sizes.layers)
    }
    carried = partial(memory_v41.carried_bytes, sizes, shape, path)
    return max(
        (peaks[layer] + carried(number), carried(number))
        for number, layer in enumerate(sizes.layers)
    )


def _sharing(request: Request, shape: Shape, balance: str) -> Sharing:
    sizes, layout = request.sizes, shape.layout
    of_layers = Schedules(layout, balance, request.gpu)
    schedules = {
        layer: of_layers.of(layer.ratio, query_cost(sizes, layer)) for layer in set(sizes.layers)
    }
    moved = frozenset(layer for layer, schedule in schedules.items() if schedule.moves)
    works = work_of_ranks(sizes, schedules, shape)
    received = partial(_received_bytes, sizes, shape, request.transport)
    return Sharing(
        balance=balance,
        moved_layers=tuple(n for n, layer in enumerate(sizes.layers) if layer in moved),
        moved_ratios=tuple(sorted({layer.ratio for layer in moved})),
        last_over_first=works[-1] / works[0],
        largest_over_mean=max(works) * len(works) / sum(works),
        moved_bytes=received(moved) - received(frozenset()),
        step=step_time(sizes, shape, schedules, request.gpu, request.transport),
    )


def _received_bytes(sizes: ModelSizes, shape: Shape, path: str, moved: Collection[Layer]) -> int:
    """Return what a rank receives in a step where the queries of some kinds of layers move."""
    return engram_bytes(sizes, shape, path) + sum(
        layers * sum(received_bytes(sizes, shape, layer, path, balanced=layer in moved))
        for layer, layers in Counter(sizes.layers).items()
    )


def _warnings(plan: Plan) -> Iterator[str]:
    request, rows = plan.request, plan.rows
    sizes, capacity, balance = request.sizes, request.gpu.memory, request.balance
    multiple = local_seq_multiple(sizes.compress_ratios)

    dense = "its scores are" if isinstance(sizes, ModelSizesV41) else "its mask is"

    def longer(row: Row) -> float:
        """A step's seconds as a multiple of those without balance."""
        return row.step_seconds / row.staying.step.seconds(overlap=request.overlap)

    def busier(row: Row) -> float:
        return row.sharing(balance).last_over_first

    def automodel(row: Row) -> float:
        return row.of(AUTOMODEL).attention_bytes / GIB

    def having(troubled: Sequence[Row]) -> str:
        return "cp_size " + ", ".join(str(each.cp_size) for each in troubled)

    if request.seq_len > sizes.max_position_embeddings:
        yield (
            f"--seq-len {request.seq_len} is more than max_position_embeddings="
            f"{sizes.max_position_embeddings}, the longest row the model knows positions for"
        )
    if short := [each for each in rows if each.shard_len < sizes.sliding_window]:
        yield (
            f"{having(short)}: a shard is shorter than sliding_window={sizes.sliding_window}, so "
            "keys come from several ranks before; use a smaller cp_size or longer rows"
        )
    if wasteful := [each for each in rows if each.padding > 0.05]:
        yield (
            f"{having(wasteful)}: up to {max(each.padding for each in wasteful):.0%} of the row is "
            f"padding (shards hold a multiple of {multiple} tokens); use a smaller cp_size, or "
            f"rows of a multiple of cp_size * {multiple} tokens"
        )
    if idle := [each for each in rows if each.idle_ranks > 0]:
        useful = -(-request.seq_len // max(multiple, 2))
        yield (
            f"{having(idle)}: some ranks hold padding only; {request.seq_len} tokens fill "
            f"{useful} ranks at most"
        )
    if unequal := [each for each in rows if busier(each) > 1.5]:
        better = "balance: auto shares the work out, and a" if balance == "off" else "a"
        yield (
            f"{having(unequal)}: the last rank works up to {max(map(busier, unequal)):.1f} times "
            f"as much as the first, which waits for it; {better} smaller cp_size wastes less"
        )
    if slower := [each for each in rows if longer(each) > 1.005]:
        yield (
            f"{having(slower)}: by these rates, balance: {balance} costs more time than it saves, "
            f"and a step takes up to {max(map(longer, slower)) - 1:.0%} longer than with balance: "
            "off"
        )
    if uneven := [each for each in rows if request.ranks % each.cp_size]:
        yield (
            f"{having(uneven)}: --ranks {request.ranks} is not divisible by it, which leaves a "
            "fraction of a data-parallel group; use a divisor"
        )
    too_large = plan.smallest is not None and (plan.cp_size or 0) > plan.smallest
    if too_large and plan.cp_size != plan.fastest:
        yield (
            f"--cp-size {plan.cp_size} is larger than the memory needs: {plan.smallest} fits, and "
            "the other ranks could work on other rows"
        )
    if masked := [each for each in rows if automodel(each) > capacity]:
        yield (
            f"{having(masked)}: AutoModel's own path needs up to "
            f"{max(map(automodel, masked)):,.0f} GiB for attention ({dense} "
            f"dense), more than the {capacity:g} GiB of one {request.gpu.name}"
        )
