# SPDX-License-Identifier: Apache-2.0
"""How backward of attention cuts the queries: into chunks whose stored numbers fit.

Stored are, of each query and head of a chunk, the turned output gradient, and p and ds of its keys
in whole blocks of ``tiles.ALIGNED``. Chunks are plain integers: an operation takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from nemo_dsv4_cp.kernels.triton import tiles
from nemo_dsv4_cp.sequence.plan import AttentionPlan


@dataclass(frozen=True)
class Chunk:
    """Queries [begin, end) and the keys that they see: between them, and entries one by one."""

    begin: int
    end: int
    raw_begin: int
    raw_end: int
    entry_begin: int
    entry_end: int
    seen: int

    def entry_slots(self, n_chosen: int | None) -> int:
        """Return for how many entries p and ds are stored: K, or None for all that are seen."""
        if n_chosen is None:
            return in_blocks(self.entry_begin, self.entry_end)
        return in_blocks(0, n_chosen)


_FIELDS = len(fields(Chunk))


def in_blocks(begin: int, end: int) -> int:
    """Return how many keys the blocks hold that [begin, end) touches, be it by its bound alone."""
    first = begin // tiles.ALIGNED * tiles.ALIGNED
    return -(-(end - first) // tiles.ALIGNED) * tiles.ALIGNED


def raw_slots(window: int) -> int:
    """Return for how many raw keys p and ds are stored: a window begins anywhere in a block."""
    return in_blocks(0, window + tiles.ALIGNED - 1)


def bytes_per_query(
    heads: int, width: int, window: int, slots: int, n_chosen: int, itemsize: int, in_order: bool
) -> int:
    """Return what backward stores of a query: do, p, ds, and each choice's part if in order."""
    stored = heads * (width + 2 * (raw_slots(window) + slots)) * itemsize
    return stored + (n_chosen * width * 4 if in_order else 0)


def backward_chunks(
    plan: AttentionPlan,
    *,
    batch: int,
    heads: int,
    width: int,
    n_chosen: int | None,
    itemsize: int,
    in_order: bool,
    workspace_bytes: int,
) -> list[int]:
    """Cut the queries so that what backward stores of a chunk fits the workspace.

    Args:
        plan: Which keys each query sees.
        batch: B.
        heads: N.
        width: D.
        n_chosen: K, None where queries see all past entries.
        itemsize: Bytes of a stored number.
        in_order: Whether the contributions to chosen entries are stored too, in float32.
        workspace_bytes: How much a chunk may take; one query is the least.

    Returns:
        The fields of :class:`Chunk` for each.
    """
    chunks: list[int] = []
    length, begin = len(plan.queries), 0
    while begin < length:
        rows = length - begin
        while True:
            queries = slice(begin, begin + rows)
            raw, entries = plan.raw_span(queries), plan.entry_span(queries)
            chunk = Chunk(
                begin, begin + rows, raw.start, raw.stop, entries.start, entries.stop,
                plan.entries_seen(queries, batch=batch),
            )  # fmt: skip
            per_query = batch * bytes_per_query(
                heads, width, plan.window, chunk.entry_slots(n_chosen), n_chosen or 0, itemsize,
                in_order,
            )  # fmt: skip
            fitting = max(1, workspace_bytes // per_query)
            if rows <= fitting:
                break
            # Fewer queries may see fewer entries, and then more of them fit.
            rows = max(fitting, rows // 2)
        chunks += [*vars(chunk).values()]
        begin += rows
    return chunks


def chunks_of(numbers: list[int]) -> Iterator[Chunk]:
    """Read the numbers of :func:`backward_chunks`."""
    for i in range(0, len(numbers), _FIELDS):
        yield Chunk(*numbers[i : i + _FIELDS])
