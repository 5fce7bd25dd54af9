# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees: its window of raw keys, and all or some of the entries before it."""

# B batch rows   C queries   W sliding window

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from nemo_dsv4_cp.sequence.queries import Queries, Runs, concatenated

NOTHING = -1
"""Fills the slots of a query that sees fewer than K entries."""


def halo(window: int) -> int:
    """Return how many raw keys a run of queries sees before the key of its first query: W - 1."""
    return window - 1


def raw_tokens(runs: Runs, window: int) -> Runs:
    """Return the tokens whose raw keys queries need, in the order of attention's raw keys.

    For each run of queries its own tokens and the W - 1 before it. Tokens before the row's first
    stand for keys that no query sees.
    """
    return tuple([range(run.start - halo(window), run.stop) for run in runs])


@dataclass(frozen=True)
class AttentionPlan:
    """Which keys each query sees. Raw keys are in the order of :func:`raw_tokens`.

    Attributes:
        queries: The queries.
        window: W, sliding window in tokens, the query's own included.
        ratio: Compress ratio of the entries, 0 without entries.
    """

    queries: Queries
    window: int
    ratio: int

    def raw_span(self, rows: slice) -> slice:
        """Return the raw keys that the queries in ``rows`` see between them."""
        before, run_at = halo(self.window), self.queries.run_at
        end = rows.stop + before * (1 + run_at(rows.stop - 1))
        return slice(rows.start + before * run_at(rows.start), end)

    def entry_span(self, rows: slice) -> range:
        """Return the entries that the queries in ``rows`` see between them."""
        return self.queries.entry_span(rows, self.ratio) if self.ratio else range(0)

    def entries_seen(self, rows: slice, *, batch: int) -> int:
        """Return how many entries the queries in ``rows`` of a batch see, query by query."""
        return self.queries.entries_seen(rows, self.ratio, batch=batch) if self.ratio else 0

    def visible_ranges(self, device: torch.device) -> torch.Tensor:
        """Return which rows of raw keys and of entries each query sees; computed once.

        Returns:
            Int32 [B or 1, C, 4], ascending in every column: the first raw key and the last, which
            is the query's own; the first entry that it may see and the one after the last.
        """
        key = ("visible ranges", self.window, self.ratio, device)
        return self.queries.once(key, lambda: self._ranges(device))

    def _ranges(self, device: torch.device) -> torch.Tensor:
        positions = self.queries.positions(device)
        inside = positions - self.queries.document_starts(device)
        runs, before = self.queries.runs, halo(self.window)
        ends = accumulate(len(run) + before for run in runs)
        rows = [range(end - len(run), end) for run, end in zip(runs, ends, strict=True)]
        own = concatenated(tuple(rows), device)  # raw keys of the queries themselves
        begin = own - inside.clamp(max=before)
        if self.ratio:
            entries = self.queries.visible_entries(self.ratio, device)
        else:
            entries = (torch.zeros_like(begin),) * 2
        ranges = (begin, own.expand_as(begin), *entries)
        return torch.stack(ranges, dim=-1).to(torch.int32)
