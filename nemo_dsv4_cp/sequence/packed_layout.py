# SPDX-License-Identifier: Apache-2.0
"""Where tokens and windows live when rows hold several documents, cut anywhere.

Windows restart with each document. A rank pools the windows whose last token it owns, which may
begin before its shard. In C slots, slot c is for the window that contains the token c * r after the
rank's first: windows do not overlap, so no two share one, whatever the documents. C depends on the
shard length alone, which keeps shapes static; slots without a window hold one that nobody looks at.
"""

# B batch rows   D documents a row   S global tokens   L local tokens   r compress ratio

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from nemo_dsv4_cp.sequence.layout import SequenceLayout, Windows, entries_before


@dataclass(frozen=True, eq=False)
class PackedLayout(SequenceLayout):
    """One rank's view of packed rows. Two are equal if they are one.

    Attributes:
        document_starts: Int64 [B, D]: where each document starts, ascending from 0; S fills up
            rows of fewer documents. Padding at a row's end is a document of its own.
        bounds: The same numbers for Python, S appended.
    """

    document_starts: torch.Tensor = None  # type: ignore[assignment]
    bounds: tuple[tuple[int, ...], ...] = ()

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def of_documents(
        cls, document_starts: torch.Tensor, local_len: int, *, cp_rank: int, cp_size: int
    ) -> PackedLayout:
        """Lay documents out over shards of ``local_len`` tokens; copies the starts to the CPU."""
        seq_len = local_len * cp_size
        bounds = tuple((*row, seq_len) for row in document_starts.tolist())
        return cls(local_len, cp_rank, cp_size, document_starts, bounds)

    def _documents_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the start and end of the document that holds each position [..], int64 [B, ..]."""
        starts = self.document_starts
        ends = torch.cat((starts[:, 1:], starts.new_full((len(starts), 1), self.seq_len)), dim=1)
        asked = positions.expand(len(starts), -1).contiguous()
        document = torch.searchsorted(starts.contiguous(), asked, right=True) - 1
        return starts.gather(1, document), ends.gather(1, document)

    def document_positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the position of each local token in its document, int64 [B, L]."""
        positions = self.positions(device)
        return positions - self._documents_at(positions)[0]

    def windows(self, ratio: int, device: torch.device | None = None) -> Windows:
        """Return C = (L - 1) // r + 1 windows, whatever the documents.

        Slots without a window hold the shard's last r tokens as if they began a document.
        """
        inside = torch.arange(self.start, self.end, ratio, device=device)
        begin, end = self._documents_at(inside)
        places = (inside - begin) // ratio * ratio
        starts = begin + places
        complete = starts + ratio <= end.clamp(max=self.end)
        return Windows(
            ratio,
            torch.where(complete, starts, self.end - ratio),
            torch.where(complete, places, 0),
            gapless_from=None,
        )

    def straddling(self, ratio: int) -> int:
        """Return r - 1: a window that ends with the shard's first token."""
        return ratio - 1

    def first_keys(self, positions: torch.Tensor) -> torch.Tensor:
        """Return where the document of each of ``positions`` [C] starts, int64 [B, C]."""
        return self._documents_at(positions)[0]

    def entry_order(self, ratio: int, capacity: int, device: torch.device) -> torch.Tensor | None:
        """Return entry g as the one whose window contains token g * r: [B, ceil(S / r)].

        A document that starts at s then has its windows at ceil(s / r), ceil(s / r) + 1, ...
        """
        if self.local_len % ratio == 0:  # every rank's slots are in this order already
            return None
        inside = torch.arange(0, self.seq_len, ratio, device=device)
        begin, _ = self._documents_at(inside)
        last = begin + (inside - begin) // ratio * ratio + ratio - 1
        owner = (last // self.local_len).clamp(max=self.cp_size - 1)
        slot = owner * capacity + (last - owner * self.local_len) // ratio
        return slot.clamp(max=capacity * self.cp_size - 1)  # an incomplete window's: nobody looks

    def entry_span(self, span: range, ratio: int) -> range:
        """Return which entries the queries at the positions in ``span`` see between them."""
        first, last = span.start, span.stop - 1
        spans = []
        for bounds in self.bounds:
            begin = bounds[bisect_right(bounds, first) - 1]
            latest = bounds[bisect_right(bounds, last) - 1]
            spans.append((-(-begin // ratio), -(-latest // ratio) + (last - latest + 1) // ratio))
        return range(min(start for start, _ in spans), max(stop for _, stop in spans))

    def most_entries(self, rows: int, ratio: int) -> int:
        """Return how many entries ``rows`` neighbouring queries may see between them at most."""
        longest = max(b - a for row in self.bounds for a, b in pairwise(row))
        return min(-(-self.seq_len // ratio), (longest + rows) // ratio + 1)

    def visible_entries(
        self, positions: torch.Tensor, ratio: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first entry that each query sees and the one after its last."""
        begin, _ = self._documents_at(positions)
        first = (begin + ratio - 1) // ratio
        return first, first + (positions - begin + 1) // ratio

    @property
    def rows(self) -> int:
        """How many rows of the batch it tells apart."""
        return len(self.bounds)

    def entries_before(self, cuts: Sequence[int], ratio: int) -> list[int]:
        """Return how many entries the queries before each of the ascending ``cuts`` see.

        Query by query, in all ``rows``, from the first cut's document on.
        """
        rows = [self._entries_before(bounds, cuts, ratio) for bounds in self.bounds]
        return rows[0] if len(rows) == 1 else list(map(sum, zip(*rows, strict=True)))

    def _entries_before(self, bounds: Sequence[int], cuts: Sequence[int], ratio: int) -> list[int]:
        """Return what the queries of one row see, document by document."""
        before: list[int] = []
        seen, place = 0, bisect_right(bounds, cuts[0], hi=len(bounds) - 1) - 1
        for begin, end in pairwise(bounds[place:]):
            ends = (*cuts[len(before) : bisect_right(cuts, end, lo=len(before))], end)
            *inside, whole = entries_before(ends, ratio, begin)
            before += [seen + count for count in inside]
            seen += whole
            if len(before) == len(cuts):
                break
        return before
