# SPDX-License-Identifier: Apache-2.0
"""What a context-parallel size costs each rank, by arithmetic alone: no GPU, no process group."""

# B batch rows   L local tokens   R CP ranks   E hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from nemo_dsv4_cp.gpus import GPUS, Gpu
from nemo_dsv4_cp.sequence.layout import SequenceLayout, local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.sequence.schedule import QueryCost, contiguous, schedule_of
from nemo_dsv4_cp.tools.inventory import (
    AUTOMODEL,
    BOUNDARY,
    PATHS,
    Shape,
    attention_bytes,
    received_bytes,
    stream_bytes,
    work_of_ranks,
)
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes
from nemo_dsv4_cp.tools.step_time import StepTime, step_time


@dataclass(frozen=True)
class PathCost:
    """What one path costs a rank.

    Attributes:
        path: One of ``inventory.PATHS``.
        received_bytes: What other ranks send it in a step, all layers, forward and backward.
        attention_bytes: Peak of the worst layer's attention, forward and backward.
    """

    path: str
    received_bytes: int
    attention_bytes: int


@dataclass(frozen=True)
class Sharing:
    """How a setting of ``context_parallel.balance`` shares out the queries, and what comes of it.

    Attributes:
        balance: The setting.
        moved_ratios: Compress ratios of the layers whose queries are computed elsewhere.
        last_over_first: Multiply-adds of the last rank, forward and backward of all layers, as a
            multiple of the first's.
        largest_over_mean: Of the busiest rank, as a multiple of the mean.
        moved_bytes: What moves for it to a rank in a step, all layers, forward and backward: part
            of ``received_bytes``.
        step: What a step takes.
    """

    balance: str
    moved_ratios: tuple[int, ...]
    last_over_first: float
    largest_over_mean: float
    moved_bytes: int
    step: StepTime


@dataclass(frozen=True)
class Row:
    """One context-parallel size.

    Attributes:
        cp_size: R, number of CP ranks.
        shard_len: L, tokens on each rank.
        padding: Padding tokens as a share of the padded row.
        idle_ranks: Ranks that hold nothing but padding.
        costs: One for each of ``inventory.PATHS``.
        stream_bytes: The checkpointed layer inputs, [L, hc_mult, E] bfloat16 each.
        staying: Where every rank computes its own queries.
        moving: With the balance that was asked for, ``auto`` where that is ``off``.
        step_seconds: A step with the balance and overlap that were asked for.
        tokens_a_second: What the whole job then trains, padding not counted.
        needed_bytes: Attention with the chosen transport, layer inputs, and what is reserved.
        fits: Whether a GPU holds that.
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
        sizes: The model's sizes.
        seq_len: Tokens in a row, before padding.
        ranks: Number of GPUs.
        batch: B, rows.
        transport: The plugin's transport whose memory must fit and whose time counts.
        gpu: What computes, and its memory.
        reserved: What weights, optimizer state and experts take of it, in GiB.
        balance: ``context_parallel.balance``: ``auto``, ``on`` or ``off``.
        overlap: ``context_parallel.overlap``.
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


def powers_of_two(ranks: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``ranks``."""
    return [1 << power for power in range(ranks.bit_length())]


def row(request: Request, cp_size: int) -> Row:
    """Return what ``cp_size`` ranks a row cost.

    Args:
        request: What the plan is made for.
        cp_size: R, number of CP ranks.
    """
    sizes, batch = request.sizes, request.batch
    multiple = local_seq_multiple(sizes.compress_ratios)
    padded = padded_seq_len(request.seq_len, cp_size=cp_size, pad_multiple=multiple)
    layout = SequenceLayout.of_padded(padded, cp_rank=cp_size - 1, cp_size=cp_size)
    shape, length = Shape(layout, batch), layout.local_len
    staying = _sharing(request, shape, "off")
    moving = _sharing(request, shape, "auto" if request.balance == "off" else request.balance)
    chosen = staying if request.balance == "off" else moving
    costs = tuple(
        PathCost(
            path,
            _received_bytes(sizes, shape, path, chosen.moved_ratios),
            max(attention_bytes(sizes, shape, ratio, path) for ratio in sizes.compress_ratios),
        )
        for path in PATHS
    )
    stream = stream_bytes(sizes, shape)
    attention = next(cost for cost in costs if cost.path == request.transport).attention_bytes
    needed = attention + stream + round(request.reserved * GIB)
    seconds = chosen.step.seconds(overlap=request.overlap)
    return Row(
        cp_size=cp_size,
        shard_len=length,
        padding=(padded - request.seq_len) / padded,
        idle_ranks=cp_size - -(-request.seq_len // length),
        costs=costs,
        stream_bytes=stream,
        staying=staying,
        moving=moving,
        step_seconds=seconds,
        tokens_a_second=request.ranks // cp_size * batch * request.seq_len / seconds,
        needed_bytes=needed,
        fits=needed <= request.gpu.memory * GIB,
    )


def _sharing(request: Request, shape: Shape, balance: str) -> Sharing:
    """Return how a setting shares out the queries of a batch."""
    sizes, layout = request.sizes, shape.layout
    schedules = {
        ratio: schedule_of(layout, ratio, balance, QueryCost.of(sizes, ratio), request.gpu)
        if ratio
        else contiguous(layout)
        for ratio in sizes.compress_ratios
    }
    moved = tuple(sorted(ratio for ratio, schedule in schedules.items() if schedule.moves))
    works = work_of_ranks(sizes, schedules, layout.local_len)
    received = partial(_received_bytes, sizes, shape, request.transport)
    return Sharing(
        balance=balance,
        moved_ratios=moved,
        last_over_first=works[-1] / works[0],
        largest_over_mean=max(works) * len(works) / sum(works),
        moved_bytes=received(moved) - received(()),
        step=step_time(sizes, shape, schedules, request.gpu, request.transport),
    )


def _received_bytes(sizes: ModelSizes, shape: Shape, path: str, moved: Sequence[int]) -> int:
    """Return what a rank receives in a step where the queries of some ratios' layers move."""
    return sum(
        sum(received_bytes(sizes, shape, ratio, path, balanced=ratio in moved))
        for ratio in sizes.compress_ratios
    )


def that_fit(request: Request, rows: Sequence[Row]) -> list[Row]:
    """Return the sizes that fit a GPU and divide the ranks."""
    return [row for row in rows if row.fits and request.ranks % row.cp_size == 0]


def smallest_that_fits(request: Request, rows: Sequence[Row]) -> int | None:
    """Return the smallest cp_size that divides the ranks and fits, None if none does."""
    return min((row.cp_size for row in that_fit(request, rows)), default=None)


def fastest_that_fits(request: Request, rows: Sequence[Row]) -> int | None:
    """Return the cp_size that trains most tokens a second of those, the smaller one of equals."""
    fitting = sorted(that_fit(request, rows), key=lambda row: row.cp_size)
    fastest = max(fitting, key=lambda row: row.tokens_a_second, default=None)
    return fastest.cp_size if fastest else None


def _longer(request: Request, row: Row) -> float:
    """Return a step's seconds as a multiple of what they are without balance."""
    return row.step_seconds / row.staying.step.seconds(overlap=request.overlap)


def warnings(
    request: Request, rows: Sequence[Row], every: Sequence[Row], *, chosen: int | None
) -> list[str]:
    """Say which settings are poor, and what is better.

    Args:
        request: What the plan is made for.
        rows: The sizes that are planned.
        every: All sizes that could be.
        chosen: The user's own choice of cp_size, None for a table of all.

    Returns:
        A line for each kind of trouble, with the sizes that have it.
    """
    sizes, memory = request.sizes, request.gpu.memory
    multiple = local_seq_multiple(sizes.compress_ratios)

    def having(troubled: Sequence[Row]) -> str:
        return "cp_size " + ", ".join(str(each.cp_size) for each in troubled)

    lines = []
    if request.seq_len > sizes.max_position_embeddings:
        lines.append(
            f"--seq-len {request.seq_len} is more than max_position_embeddings="
            f"{sizes.max_position_embeddings}, the longest row the model knows positions for"
        )
    if short := [each for each in rows if each.shard_len < sizes.sliding_window]:
        lines.append(
            f"{having(short)}: a shard is shorter than sliding_window={sizes.sliding_window}, so "
            "keys come from several ranks before; use a smaller cp_size or longer rows"
        )
    if wasteful := [each for each in rows if each.padding > 0.05]:
        most = max(each.padding for each in wasteful)
        lines.append(
            f"{having(wasteful)}: up to {most:.0%} of the row is padding (shards hold a multiple "
            f"of {multiple} tokens); use a smaller cp_size, or rows of a multiple of cp_size * "
            f"{multiple} tokens"
        )
    if idle := [each for each in rows if each.idle_ranks > 0]:
        useful = -(-request.seq_len // max(multiple, 2))
        lines.append(
            f"{having(idle)}: some ranks hold padding only; {request.seq_len} tokens fill "
            f"{useful} ranks at most"
        )
    balance = request.balance
    unequal = [each for each in rows if each.sharing(balance).last_over_first > 1.5]
    if unequal:
        most = max(each.sharing(balance).last_over_first for each in unequal)
        better = "balance: auto shares the work out, and a" if balance == "off" else "a"
        lines.append(
            f"{having(unequal)}: the last rank works up to {most:.1f} times as much as the first, "
            f"which waits for it; {better} smaller cp_size wastes less"
        )
    slower = [each for each in rows if _longer(request, each) > 1.005]
    if slower:
        most = max(_longer(request, each) for each in slower) - 1
        lines.append(
            f"{having(slower)}: by these rates, balance: {balance} moves more than it spares, and "
            f"a step takes up to {most:.0%} longer than with balance: off"
        )
    if uneven := [each for each in rows if request.ranks % each.cp_size]:
        lines.append(
            f"{having(uneven)}: --ranks {request.ranks} is not divisible by it, and no whole "
            "number of data-parallel groups is left; use a divisor"
        )
    smallest, fastest = smallest_that_fits(request, every), fastest_that_fits(request, every)
    if chosen not in (None, fastest) and smallest is not None and chosen > smallest:
        lines.append(
            f"--cp-size {chosen} is larger than the memory needs: {smallest} fits, and the other "
            "ranks could work on other rows"
        )
    if masked := [each for each in rows if each.of(AUTOMODEL).attention_bytes > memory * GIB]:
        most = max(each.of(AUTOMODEL).attention_bytes for each in masked) / GIB
        lines.append(
            f"{having(masked)}: AutoModel's own path needs up to {most:,.0f} GiB for attention "
            f"(its mask is dense), more than --gpu-memory {memory:g}"
        )
    return lines
