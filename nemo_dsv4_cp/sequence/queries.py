# SPDX-License-Identifier: Apache-2.0
"""The queries that a rank computes: runs of neighboring positions, its own shard's or others'."""

# B batch rows   C queries

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from nemo_dsv4_cp.sequence.layout import SequenceLayout, entries_from

T = TypeVar("T")
Runs = tuple[range, ...]
"""Ranges of positions, in the order in which a tensor holds the tokens' rows."""


@dataclass(frozen=True)
class Queries:
    """Queries in the order of their rows.

    Attributes:
        layout: Where documents and entries are; its rank does not matter.
        runs: Positions of the queries, ascending.
    """

    layout: SequenceLayout
    runs: Runs
    _made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def own(cls, layout: SequenceLayout) -> Queries:
        """Return those of the layout's own shard."""
        return cls(layout, (layout.own,))

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` returns, called once for all layers with these queries."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the positions of the queries, int64 [C]."""
        return self.once(("positions", device), lambda: concatenated(self.runs, device))

    def document_starts(self, device: torch.device | None = None) -> torch.Tensor:
        """Return where the documents of the queries start, int64 [B or 1, C]."""
        return self.once(
            ("document starts", device), lambda: self.layout.documents_at(self.positions(device))[0]
        )

    def visible_entries(
        self, ratio: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first entry that each query sees and the one after its last.

        Int64 [B or 1, C] each, as :meth:`SequenceLayout.visible_entries` counts them.
        """
        return self.once(
            ("visible entries", ratio, device),
            lambda: entries_from(self.document_starts(device), self.positions(device), ratio),
        )

    def run_at(self, row: int) -> int:
        """Return which run holds a row."""
        end = 0
        for place, run in enumerate(self.runs):
            end += len(run)
            if row < end:
                return place
        raise IndexError(f"row {row} of {end} queries")

    def chunks(self, rows: int) -> Iterator[slice]:
        """Yield chunks of at most ``rows`` neighboring queries, none across the end of a run."""
        end = 0
        for run in self.runs:
            begin, end = end, end + len(run)
            for first in range(begin, end, rows):
                yield slice(first, min(first + rows, end))

    def spans(self, rows: slice) -> Iterator[range]:
        """Yield the positions of ``rows``, one range for each run that they touch."""
        begin = 0
        for run in self.runs:
            span = run[max(rows.start - begin, 0) : max(rows.stop - begin, 0)]
            if span:
                yield span
            begin += len(run)

    def entry_span(self, rows: slice, ratio: int) -> range:
        """Return which entries the queries in ``rows`` see between them."""
        spans = [self.layout.entry_span(span, ratio) for span in self.spans(rows)]
        return range(spans[0].start, spans[-1].stop) if spans else range(0)

    def entries_seen(self, rows: slice, ratio: int, *, batch: int) -> int:
        """Return how many entries the queries in ``rows`` of a batch see, query by query."""
        seen = sum(self.layout.entries_seen(span, ratio) for span in self.spans(rows))
        return seen * batch // self.layout.rows


def concatenated(runs: Runs, device: torch.device | None = None) -> torch.Tensor:
    """Return the numbers of ranges one after another, int64."""
    every = [torch.arange(run.start, run.stop, device=device) for run in runs]
    if len(every) == 1:
        return every[0]
    return torch.cat(every) if every else torch.arange(0, device=device)
