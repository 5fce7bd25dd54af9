"""What a context-parallel size costs each rank, by arithmetic alone: no GPU, no process group."""

# B batch rows   L local tokens   R CP ranks   E hidden size

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_dsv4_cp.sequence.layout import SequenceLayout, local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.tools.costs import Shape, attention_bytes, received_bytes, stream_bytes
from nemo_dsv4_cp.tools.paths import BOUNDARY, HOST, PATHS
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes
from nemo_dsv4_cp.tools.work import work


@dataclass(frozen=True)
class PathCost:
    """What one path costs a rank.

    Attributes:
        path: One of ``paths.PATHS``.
        received_bytes: What other ranks send it in a step, all layers, forward and backward.
        attention_bytes: Peak of the worst layer's attention, forward and backward.
    """

    path: str
    received_bytes: int
    attention_bytes: int


@dataclass(frozen=True)
class Row:
    """One context-parallel size.

    Attributes:
        cp_size: R, number of CP ranks.
        shard_len: L, tokens on each rank.
        padding: Padding tokens as a share of the padded row.
        idle_ranks: Ranks that hold nothing but padding.
        costs: One for each of ``paths.PATHS``.
        stream_bytes: The checkpointed layer inputs, [L, hc_mult, E] bfloat16 each.
        imbalance: Work of the last rank, as a multiple of the first's.
        needed_bytes: Attention with the chosen transport, layer inputs, and what is reserved.
        fits: Whether a GPU holds that.
    """

    cp_size: int
    shard_len: int
    padding: float
    idle_ranks: int
    costs: tuple[PathCost, ...]
    stream_bytes: int
    imbalance: float
    needed_bytes: int
    fits: bool

    def of(self, path: str) -> PathCost:
        """Return what ``path`` costs."""
        return next(cost for cost in self.costs if cost.path == path)


@dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
        sizes: The model's sizes.
        seq_len: Tokens in a row, before padding.
        ranks: Number of GPUs.
        batch: B, rows.
        transport: The plugin's transport whose memory must fit.
        gpu_memory: Memory of a GPU, in GiB.
        reserved: What weights, optimizer state and experts take of it, in GiB.
    """

    sizes: ModelSizes
    seq_len: int
    ranks: int
    batch: int = 1
    transport: str = BOUNDARY
    gpu_memory: float = 80.0
    reserved: float = 40.0


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
    first, last = (
        SequenceLayout.of_padded(padded, cp_rank=rank, cp_size=cp_size) for rank in (0, cp_size - 1)
    )
    shape, ratios = Shape(last, batch), Counter(sizes.compress_ratios)
    costs = tuple(
        PathCost(
            path,
            sum(n * sum(received_bytes(sizes, shape, ratio, path)) for ratio, n in ratios.items()),
            max(attention_bytes(sizes, shape, ratio, path) for ratio in ratios),
        )
        for path in PATHS
    )
    length = last.local_len
    stream = stream_bytes(sizes, shape)
    attention = next(cost for cost in costs if cost.path == request.transport).attention_bytes
    needed = attention + stream + round(request.reserved * GIB)
    return Row(
        cp_size=cp_size,
        shard_len=length,
        padding=(padded - request.seq_len) / padded,
        idle_ranks=cp_size - -(-request.seq_len // length),
        costs=costs,
        stream_bytes=stream,
        imbalance=work(sizes, last) / work(sizes, first),
        needed_bytes=needed,
        fits=needed <= request.gpu_memory * GIB,
    )


def smallest_that_fits(request: Request) -> int | None:
    """Return the smallest power of two that divides the ranks and fits, None if none does."""
    sizes = (size for size in powers_of_two(request.ranks) if request.ranks % size == 0)
    return next((size for size in sizes if row(request, size).fits), None)


def warnings(request: Request, rows: Sequence[Row], *, chosen: int | None) -> list[str]:
    """Say which settings are poor, and what is better.

    Args:
        request: What the plan is made for.
        rows: The sizes that are planned.
        chosen: The user's own choice of cp_size, None for a table of all.

    Returns:
        A line for each kind of trouble, with the sizes that have it.
    """
    sizes, memory = request.sizes, request.gpu_memory
    smallest = smallest_that_fits(request)
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
    if unequal := [each for each in rows if each.imbalance > 1.5]:
        most = max(each.imbalance for each in unequal)
        lines.append(
            f"{having(unequal)}: the last rank works up to {most:.1f} times as much as the first, "
            "which waits for it; a smaller cp_size wastes less"
        )
    if uneven := [each for each in rows if request.ranks % each.cp_size]:
        lines.append(
            f"{having(uneven)}: --ranks {request.ranks} is not divisible by it, and no whole "
            "number of data-parallel groups is left; use a divisor"
        )
    if chosen is not None and smallest is not None and chosen > smallest:
        lines.append(
            f"--cp-size {chosen} is larger than the memory needs: {smallest} fits, and the other "
            "ranks could work on other rows"
        )
    if masked := [each for each in rows if each.of(HOST).attention_bytes > memory * GIB]:
        most = max(each.of(HOST).attention_bytes for each in masked) / GIB
        lines.append(
            f"{having(masked)}: AutoModel's own path needs up to {most:,.0f} GiB for attention "
            f"(its mask is dense), more than --gpu-memory {memory:g}"
        )
    return lines
