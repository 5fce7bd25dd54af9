"""Which keys a query sees: its window of raw keys and, of the entries before it, all or some."""

# B batch rows   L local queries   W sliding window   C queries of a chunk

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_dsv4_cp.sequence.layout import SequenceLayout

NOTHING = -1
"""Fills the slots of a query that has fewer than K entries to choose from."""


@dataclass(frozen=True)
class AttentionPlan:
    """Which keys each local query sees; positions only.

    Attributes:
        layout: Positions of this rank's queries.
        raw_first: Global position of raw key 0.
        window: W, sliding window in tokens, the query's own included.
        ratio: Compress ratio of the entries, 0 without entries.
    """

    layout: SequenceLayout
    raw_first: int
    window: int
    ratio: int

    def raw_span(self, chunk: slice) -> slice:
        """Return the raw keys that the queries of ``chunk`` see between them."""
        begin = self.layout.start + chunk.start - self.window + 1
        end = self.layout.start + chunk.stop
        return slice(max(begin, 0) - self.raw_first, end - self.raw_first)

    def raw_hidden(self, chunk: slice, device: torch.device) -> torch.Tensor:
        """Return which of :meth:`raw_span` each query must not see, bool [B, C, keys]."""
        span = self.raw_span(chunk)
        queries = self.layout.positions(device)[chunk, None] - self.raw_first
        keys = torch.arange(span.start, span.stop, device=device)
        hidden = ((keys > queries) | (keys <= queries - self.window))[None]
        first = self.layout.first_keys(chunk, device)
        return hidden if first is None else hidden | (keys < first[..., None] - self.raw_first)

    def entry_span(self, chunk: slice) -> range:
        """Return the entries that the queries of ``chunk`` see between them."""
        return self.layout.entry_span(chunk, self.ratio) if self.ratio else range(0)

    def entries_hidden(self, chunk: slice, device: torch.device) -> torch.Tensor:
        """Return which of :meth:`entry_span` each query must not see, bool [B, C, entries]."""
        span = self.entry_span(chunk)
        if not len(span):
            return torch.zeros(1, 1, 0, dtype=torch.bool, device=device)
        first, stop = self.layout.visible_entries(chunk, self.ratio, device)
        entries = torch.arange(span.start, span.stop, device=device)
        return (entries < first[..., None]) | (entries >= stop[..., None])

    def sight(self, device: torch.device) -> torch.Tensor:
        """Return each query's keys as rows of both storages, without a position in them.

        Returns:
            Int32 [B or 1, L, 4]: its first raw key and its last, which is its own; the first entry
            that it may see and the one after the last.
        """
        whole = slice(0, self.layout.local_len)
        own = self.layout.positions(device)
        first = self.layout.first_keys(whole, device)
        begin = (own - self.window + 1).clamp(min=0)[None]
        if first is not None:
            begin = torch.maximum(begin, first)
        if self.ratio:
            entries = self.layout.visible_entries(whole, self.ratio, device)
        else:
            entries = (torch.zeros_like(begin),) * 2
        rows = (begin - self.raw_first, (own - self.raw_first).expand_as(begin), *entries)
        return torch.stack(rows, dim=-1).to(torch.int32)
