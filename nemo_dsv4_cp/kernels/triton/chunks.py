# SPDX-License-Identifier: Apache-2.0
"""Cuts queries into chunks whose stored numbers fit the workspace.

Backward of attention stores, of each query and head of a chunk, the rotated output gradient, and p
and ds of its keys in whole blocks of ``tiles.ALIGNED``. It may sum the gradient of a block of
entries in parts, each over some of the queries: few blocks would leave most of a GPU idle. The
indexer's loss stores its target and ds of entries, in the same blocks. Top-k selection stores
scores and the maxima of their groups. Operations take chunks as plain integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from nemo_dsv4_cp.kernels.triton import tiles
from nemo_dsv4_cp.sequence.plan import AttentionPlan

GROUP = 32
"""Scores that share a stored maximum: 128 bytes, a line of the cache."""

MOST_GROUPS = 1 << 14
"""Of a row, whose maxima stay in registers: twice as many spill, so groups are twice as large."""

BLOCK_GROUP = 8
"""The same for scores of blocks: thousands of blocks are kept, whose groups stay in registers."""


@dataclass(frozen=True)
class Chunk:
    """Queries [begin, end), the keys that they see between them, and entries one by one.

    The gradients of all entries are summed in ``parts``.
    """

    begin: int
    end: int
    raw_begin: int
    raw_end: int
    entry_begin: int
    entry_end: int
    seen: int
    parts: int = 1

    def __len__(self) -> int:
        return self.end - self.begin

    def entry_slots(self, n_selected: int | None) -> int:
        """Return for how many entries p and ds are stored: K, or None for all that are seen."""
        if n_selected is None:
            return in_blocks(self.entry_begin, self.entry_end)
        return in_blocks(0, n_selected)

    @property
    def group(self) -> int:
        """Return how many scores share a maximum."""
        return GROUP if self.entry_end - self.entry_begin <= GROUP * MOST_GROUPS else 2 * GROUP

    @property
    def n_scores(self) -> int:
        """How many scores are stored of an index query: whole groups."""
        return _whole(self.entry_end - self.entry_begin, self.group)

    @property
    def score_bytes(self) -> int:
        """What scores and maxima take of an index query."""
        return 4 * (self.n_scores + self.n_scores // self.group)

    def n_blocks(self, size: int) -> int:
        """Return how many blocks of ``size`` an index query sees at most, in whole groups."""
        return _whole(-(-(self.entry_end - self.entry_begin) // size), GROUP)

    def n_slots(self, kept: int, size: int) -> int:
        """Return how many scores are stored where a query sees ``kept`` blocks at most."""
        return _whole(min(-(-(self.entry_end - self.entry_begin) // size), kept) * size, GROUP)


_FIELDS = len(fields(Chunk))

_MOST_PARTS = 8
_QUERIES_PER_PART = 16
"""The least: parts then take at most half of what p and ds do."""


def cut(
    plan: AttentionPlan,
    bytes_per_query: Callable[[Chunk], int],
    *,
    batch: int,
    workspace_bytes: int,
    parts: Callable[[Chunk], int] = lambda _: 1,
) -> list[Chunk]:
    """Cut the queries so that what is stored of a chunk fits the workspace, one query at least."""
    chunks: list[Chunk] = []
    length, begin = len(plan.queries), 0
    while begin < length:
        rows = length - begin
        while True:
            queries = slice(begin, begin + rows)
            raw, entries = plan.raw_span(queries), plan.entry_span(queries)
            seen = plan.entries_seen(queries, batch=batch)
            chunk = Chunk(
                begin, begin + rows, raw.start, raw.stop, entries.start, entries.stop, seen
            )
            chunk = replace(chunk, parts=parts(chunk))
            fitting = max(1, workspace_bytes // max(1, batch * bytes_per_query(chunk)))
            if rows <= fitting:
                break
            # Fewer queries may see fewer entries, and then more of them fit.
            rows = max(fitting, rows // 2)
        chunks.append(chunk)
        begin += rows
    return chunks


def backward_chunks(
    plan: AttentionPlan, *,
    batch: int, heads: int, width: int, n_selected: int | None, itemsize: int, in_order: bool,
    workspace_bytes: int, multiprocessors: int,
) -> list[int]:  # fmt: skip
    """Return the chunks of attention's backward, :class:`Chunk` after :class:`Chunk` as integers.

    ``in_order``: whether the contributions to selected entries are stored too, in float32.
    ``multiprocessors``: of the GPU, which as many blocks of entries keep busy.
    """

    def stored(chunk: Chunk) -> int:
        return backward_bytes(chunk, heads, width, plan.window, n_selected, itemsize, in_order)

    def parts(chunk: Chunk) -> int:
        blocks = 0 if n_selected is not None else chunk.entry_slots(None) // tiles.ALIGNED
        most = min(_MOST_PARTS, (chunk.end - chunk.begin) // _QUERIES_PER_PART)
        return max(1, min(most, multiprocessors // (batch * blocks))) if blocks else 1

    return _numbers(cut(plan, stored, batch=batch, workspace_bytes=workspace_bytes, parts=parts))


def backward_bytes(
    chunk: Chunk, heads: int, width: int, window: int, n_selected: int | None, itemsize: int,
    in_order: bool,
) -> int:  # fmt: skip
    """Return what backward stores of a query: do, p, ds, and a share of float32 sums."""
    slots = raw_slots(window) + chunk.entry_slots(n_selected)
    sums = (n_selected or 0) * width * 4 if in_order else 0
    if chunk.parts > 1:
        entries = chunk.parts * chunk.entry_slots(None)
        sums += -(-entries * width * 4 // (chunk.end - chunk.begin))
    return heads * (width + 2 * slots) * itemsize + sums


def loss_chunks(
    plan: AttentionPlan, *,
    batch: int, parts: int, query_bytes: int, width: int, n_selected: int | None, in_order: bool,
    workspace_bytes: int,
) -> list[int]:  # fmt: skip
    """Return the chunks of the indexer's loss; arguments as for :func:`loss_bytes`."""

    def stored(chunk: Chunk) -> int:
        return loss_bytes(chunk, parts, query_bytes, width, n_selected, in_order)

    return _numbers(cut(plan, stored, batch=batch, workspace_bytes=workspace_bytes))


def loss_bytes(
    chunk: Chunk, parts: int, query_bytes: int, width: int, n_selected: int | None, in_order: bool
) -> int:
    """Return what the indexer's loss stores of a query: the target in ``parts``, and ds.

    Of selected entries with ``in_order`` also what they give to keys of ``width``; else, with
    ``n_selected`` None, twice the index query of ``query_bytes``.
    """
    stored = 4 * (parts + 1) * chunk.entry_slots(n_selected)
    if n_selected is None:
        return stored + 2 * query_bytes
    return stored + (4 * n_selected * width if in_order else 0)


def score_chunks(
    plan: AttentionPlan,
    *,
    batch: int,
    workspace_bytes: int,
    stored: Callable[[Chunk], int] = lambda chunk: chunk.score_bytes,
) -> list[int]:
    """Return the chunks of top-k selection; queries that see nothing are in none.

    ``stored``: the bytes that scores and maxima take of an index query.
    """
    chunks = cut(plan, stored, batch=batch, workspace_bytes=workspace_bytes)
    return _numbers([chunk for chunk in chunks if chunk.n_scores])


def block_bytes(chunk: Chunk, size: int) -> int:
    """Return what scores of entries and of blocks take of an index query, and their maxima."""
    blocks = chunk.n_blocks(size)
    return chunk.score_bytes + 4 * (blocks + blocks // BLOCK_GROUP)


def slot_bytes(chunk: Chunk, kept: int, size: int) -> int:
    """Return what scores of the entries of ``kept`` blocks take of an index query, and maxima."""
    slots = chunk.n_slots(kept, size)
    return 4 * (slots + slots // GROUP)


def _whole(count: int, group: int) -> int:
    return -(-count // group) * group


def _numbers(chunks: list[Chunk]) -> list[int]:
    return [number for chunk in chunks for number in vars(chunk).values()]


def chunks_of(numbers: list[int]) -> Iterator[Chunk]:
    """Read the integers of :func:`backward_chunks` or :func:`score_chunks`."""
    for i in range(0, len(numbers), _FIELDS):
        yield Chunk(*numbers[i : i + _FIELDS])


def in_blocks(begin: int, end: int) -> int:
    """Return how many keys the blocks hold that [begin, end) touches, be it by its bound alone."""
    first = begin // tiles.ALIGNED * tiles.ALIGNED
    return -(-(end - first) // tiles.ALIGNED) * tiles.ALIGNED


def raw_slots(window: int) -> int:
    """Return for how many raw keys p and ds are stored: a window begins anywhere in a block."""
    return in_blocks(0, window + tiles.ALIGNED - 1)
