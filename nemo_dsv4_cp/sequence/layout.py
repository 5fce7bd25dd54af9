# SPDX-License-Identifier: Apache-2.0
"""Where every token, document and compressed entry is: positions only, no communication.

Rank k of R owns the contiguous tokens [k * L, (k + 1) * L) of every row, and the compressed entries
of the windows that end there. This file defines which rank holds which position.
"""

# B batch rows   D documents per row   S global tokens   L local tokens (S / R)   R CP ranks
# C queries   P compressed entries (S / ratio)   r compress ratio

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

OVERLAP_RATIO = 4
"""The compress ratio whose windows also pool the window before (CSA).

AutoModel's ``_pool_windows``.
"""


def local_seq_multiple(compress_ratios: Iterable[int] | None) -> int:
    """Return the number that a shard length must be a multiple of.

    A window may not straddle a cut, so each shard holds whole windows of every ratio; overlapping
    windows count twice (AutoModel's ``dsv4_cp_local_seq_multiple``).

    Args:
        compress_ratios: One ratio per layer; ratios of 0 or less need nothing.

    Returns:
        The LCM over the layers, 1 when no layer compresses.
    """
    ratios = [int(ratio) for ratio in compress_ratios or ()]
    needs = [2 * r if r == OVERLAP_RATIO else r for r in ratios if r > 0]
    return math.lcm(*needs)


def padded_seq_len(seq_len: int, *, cp_size: int, pad_multiple: int) -> int:
    """Return the smallest length >= ``seq_len`` whose ``cp_size`` shards are all multiples.

    Args:
        seq_len: Tokens in a row before padding.
        cp_size: Number of CP ranks.
        pad_multiple: What each shard length must be a multiple of; less than 2 counts as 2, as in
            AutoModel's ``shard_batch_contiguous``.
    """
    divisor = cp_size * max(pad_multiple, 2)
    return -(-seq_len // divisor) * divisor


def validate_cp_size(cp_size: int, *, pad_multiple: int, max_seq_len: int) -> None:
    """Refuse more ranks than the longest row has shards for.

    Args:
        cp_size: Number of CP ranks.
        pad_multiple: What each shard length is a multiple of.
        max_seq_len: Longest row that the model knows positions for.

    Raises:
        ValueError: If even a row of ``max_seq_len`` tokens leaves a rank nothing but padding.
    """
    useful = max(max_seq_len // max(pad_multiple, 2), 1)
    if cp_size > useful:
        raise ValueError(
            f"distributed.cp_size={cp_size} cannot work: shards hold a multiple of {pad_multiple} "
            f"tokens (context_parallel.pad_multiple), so max_position_embeddings={max_seq_len} "
            f"tokens fill {useful} of them and the other ranks would hold padding only; use "
            f"{useful} or fewer"
        )


@dataclass(frozen=True)
class SequenceLayout:
    """One rank's tokens, and what its queries see. Rows hold one document each, unless packed.

    Attributes:
        local_len: L, tokens on each rank.
        cp_rank: This rank's index.
        cp_size: R, number of CP ranks.
        bounds: Of each packed row, where its documents start, ascending from 0, then S. Padding at
            a row's end is a document of its own. Empty if each row is one document.
        starts: The same starts on the device, int64 [B, D]; S fills up rows of fewer documents.
            None if each row is one document.
    """

    local_len: int
    cp_rank: int = 0
    cp_size: int = 1
    bounds: tuple[tuple[int, ...], ...] = ()
    starts: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_padded(cls, seq_len: int, *, cp_rank: int, cp_size: int) -> SequenceLayout:
        """Cut a padded row of ``seq_len`` tokens into ``cp_size`` equal shards.

        Raises:
            ValueError: If the shards would not be equal.
        """
        if seq_len % cp_size:
            raise ValueError(
                f"a row of {seq_len} tokens cannot be cut into distributed.cp_size={cp_size} equal "
                f"shards; pad it to {padded_seq_len(seq_len, cp_size=cp_size, pad_multiple=1)}"
            )
        return cls(local_len=seq_len // cp_size, cp_rank=cp_rank, cp_size=cp_size)

    @classmethod
    def of_documents(
        cls, starts: torch.Tensor, local_len: int, *, cp_rank: int, cp_size: int
    ) -> SequenceLayout:
        """Cut packed rows into shards of ``local_len`` tokens; copies ``starts`` to the CPU.

        Args:
            starts: Int64 [B, D]: where documents start, S filling up rows of fewer documents.
            local_len: L.
            cp_rank: This rank's index.
            cp_size: R.
        """
        bounds = tuple((*row, local_len * cp_size) for row in starts.tolist())
        return cls(local_len, cp_rank, cp_size, bounds, starts.contiguous())

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, cut anywhere."""
        return self.starts is not None

    @property
    def start(self) -> int:
        """Global position of this rank's first token."""
        return self.cp_rank * self.local_len

    @property
    def end(self) -> int:
        """Global position after this rank's last token."""
        return self.start + self.local_len

    @property
    def seq_len(self) -> int:
        """S, tokens in the whole row."""
        return self.local_len * self.cp_size

    @property
    def own(self) -> range:
        """Positions of this rank's tokens."""
        return range(self.start, self.end)

    @property
    def shard_starts(self) -> range:
        """Positions of the ranks' first tokens."""
        return range(0, self.seq_len, self.local_len)

    @property
    def rows(self) -> int:
        """How many rows of the batch differ in their documents; 1 where all are alike."""
        return len(self.bounds) or 1

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document in any row."""
        if not self.packed:
            return self.seq_len
        return max(b - a for row in self.bounds for a, b in pairwise(row))

    def shard(self, rank: int, *, before: int = 0) -> range:
        """Return the positions of ``rank``'s tokens, and of as many before them.

        Before the row's first token they are negative.
        """
        return range(rank * self.local_len - before, (rank + 1) * self.local_len)

    def positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the global position of each local token, int64 [L]."""
        return torch.arange(self.start, self.end, device=device)

    def document_positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the position of each local token in its document, int64 [B or 1, L]."""
        positions = self.positions(device)
        return positions - self.documents_at(positions)[0]

    def documents_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the documents of ``positions`` [C] start and end, int64 [B or 1, C] each."""
        if self.starts is None:
            start = torch.zeros_like(positions)[None]
            return start, torch.full_like(start, self.seq_len)
        ends = torch.cat(
            (self.starts[:, 1:], self.starts.new_full((len(self.starts), 1), self.seq_len)), dim=1
        )
        of_rows = positions.expand(len(self.starts), -1).contiguous()
        document = torch.searchsorted(self.starts, of_rows, right=True) - 1
        return self.starts.gather(1, document), ends.gather(1, document)

    def visible_entries(
        self, positions: torch.Tensor, ratio: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first entry that each query sees and the one after its last.

        Entry w of a document covers its tokens [w * ratio, (w + 1) * ratio) and is seen once
        complete: w < (i + 1) // ratio for the query at document position i (DeepSeek-V4 report;
        AutoModel's ``DeepseekV4Attention.forward``). A document that starts at s has its entries
        at ceil(s / ratio), ceil(s / ratio) + 1, ...

        Args:
            positions: Of the queries, int64 [C].
            ratio: Compress ratio.

        Returns:
            Int64 [B or 1, C] each.
        """
        return entries_from(self.documents_at(positions)[0], positions, ratio)

    def entry_order(self, ratio: int, capacity: int, device: torch.device) -> torch.Tensor | None:
        """Return where the entries of all ranks are among those gathered in rank order.

        Entry g is the one whose window contains token g * ratio.

        Args:
            ratio: Compress ratio.
            capacity: Entries that each rank has.
            device: Where the result lives.

        Returns:
            Int64 [B, ceil(S / ratio)]; None where they are in order already.
        """
        if not self.packed or self.local_len % ratio == 0:
            return None
        inside = torch.arange(0, self.seq_len, ratio, device=device)
        begin, _ = self.documents_at(inside)
        last = begin + (inside - begin) // ratio * ratio + ratio - 1
        owner = (last // self.local_len).clamp(max=self.cp_size - 1)
        slot = owner * capacity + (last - owner * self.local_len) // ratio
        return slot.clamp(max=capacity * self.cp_size - 1)  # no query sees incomplete windows

    def entry_span(self, span: range, ratio: int) -> range:
        """Return which entries the queries at the positions in ``span`` see between them."""
        if not self.packed:  # also what torch.compile can trace
            return range(span.stop // ratio)
        first, last = span.start, span.stop - 1
        spans = []
        for bounds in self.bounds:
            begin = bounds[bisect_right(bounds, first) - 1]
            latest = bounds[bisect_right(bounds, last) - 1]
            spans.append((-(-begin // ratio), -(-latest // ratio) + (last - latest + 1) // ratio))
        return range(min(start for start, _ in spans), max(stop for _, stop in spans))

    def most_entries(self, rows: int, ratio: int) -> int:
        """Return how many entries ``rows`` neighboring queries may see between them at most."""
        if not self.packed:
            return self.seq_len // ratio
        return min(-(-self.seq_len // ratio), (self.longest_document + rows) // ratio + 1)

    def entries_before(self, cuts: Sequence[int], ratio: int) -> list[int]:
        """Return how many entries the queries before each of the ascending ``cuts`` see.

        Summed over the queries of all ``rows``, from the first cut's document on.
        """
        if not self.packed:
            return entries_before(cuts, ratio)
        rows = [_entries_before(bounds, cuts, ratio) for bounds in self.bounds]
        return rows[0] if len(rows) == 1 else list(map(sum, zip(*rows, strict=True)))

    def entries_seen(self, span: range, ratio: int) -> int:
        """Return how many entries the queries at ``span`` see, summed over all ``rows``."""
        before, after = self.entries_before((span.start, span.stop), ratio)
        return after - before


def entries_from(
    begin: torch.Tensor, positions: torch.Tensor, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what :meth:`SequenceLayout.visible_entries` does, of documents that begin there."""
    first = (begin + ratio - 1) // ratio
    return first, first + (positions - begin + 1) // ratio


def entries_seen(span: range, ratio: int) -> int:
    """Return the sum of (i + 1) // ratio over the document positions i in ``span``."""
    before, after = entries_before((span.start, span.stop), ratio)
    return after - before


def entries_before(ends: Iterable[int], ratio: int) -> list[int]:
    """Return the sum of (i + 1) // ratio over a document's positions i before each end.

    With f = end // ratio, each w < f is seen by end - (w + 1) * ratio + 1 queries.
    """
    return [end // ratio * (2 * end + 2 - ratio * (end // ratio + 1)) // 2 for end in ends]


def _entries_before(bounds: Sequence[int], cuts: Sequence[int], ratio: int) -> list[int]:
    """Return what the queries of one row before each cut see, document by document."""
    before: list[int] = []
    seen, place = 0, bisect_right(bounds, cuts[0], hi=len(bounds) - 1) - 1
    for begin, end in pairwise(bounds[place:]):
        inside = cuts[len(before) : bisect_right(cuts, end, lo=len(before))]
        *of_cuts, whole = entries_before([cut - begin for cut in (*inside, end)], ratio)
        before += [seen + count for count in of_cuts]
        seen += whole
        if len(before) == len(cuts):
            break
    return before
