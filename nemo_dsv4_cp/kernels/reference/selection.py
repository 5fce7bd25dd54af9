# SPDX-License-Identifier: Apache-2.0
"""Parts of top-k selection in torch: index scores in chunks of queries, and their ranking."""

# B batch rows   C queries of a chunk   P entries

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan

_SUMMED = 4
"""Bytes of a score."""

RANKED = 16
"""Bytes that a score takes while it is ranked: itself, an integer with its place, a mask."""


@dataclass(frozen=True, eq=False)
class Scoring:
    """Scores of queries against the entries that they see, for a chunk of queries at a time.

    Attributes:
        plan: The queries, and which entries each sees.
        score: Scores the queries in a slice against the entries in a range, [B, C, P]. What a
            query does not see may hold anything.
        batch: B.
        score_bytes: Scratch that ``score`` takes per score of all rows of the batch.
        workspace_bytes: Scratch for a chunk.
        ranked_bytes: Scratch that the ranking takes per score.
        query_bytes: Scratch that the ranking takes per query besides.
    """

    plan: AttentionPlan
    score: Callable[[slice, range], torch.Tensor]
    batch: int
    score_bytes: int
    workspace_bytes: int
    ranked_bytes: int = RANKED
    query_bytes: int = 0

    def chunks(self) -> Iterator[slice]:
        """Yield chunks of queries that see any entry between them."""
        plan = self.plan
        rows = self._fitting(
            len(plan.queries), self.batch * self.ranked_bytes, self.batch * self.query_bytes
        )
        for chunk in plan.queries.chunks(rows):
            if len(plan.entry_span(chunk)):
                yield chunk

    def scores(self, chunk: slice) -> torch.Tensor:
        """Score a chunk of queries against the entries that they see between them, [B, C, P].

        In parts: scores of all heads take more memory than ranking their sums, which takes more
        launches. What a query does not see may hold anything.
        """
        plan, count = self.plan, chunk.stop - chunk.start
        span = plan.entry_span(chunk)
        # The sums of the whole chunk are there too.
        sums = self.workspace_bytes * _SUMMED // self.ranked_bytes
        rows = self._fitting(count, self.score_bytes, taken=sums)
        scores_BCP = None
        for begin in range(chunk.start, chunk.stop, rows):
            part = slice(begin, min(begin + rows, chunk.stop))
            seen = plan.entry_span(part)
            if not len(seen):
                continue
            scores = self.score(part, seen)
            if part == chunk:
                return scores
            if scores_BCP is None:
                scores_BCP = scores.new_empty(self.batch, count, len(span))
            at = slice(seen.start - span.start, seen.stop - span.start)
            scores_BCP[:, begin - chunk.start : part.stop - chunk.start, at] = scores
            del scores  # not there too while the next are computed
        assert scores_BCP is not None, "a chunk that sees no entry was scored"
        return scores_BCP

    def _fitting(self, rows: int, score_bytes: int, query_bytes: int = 0, *, taken: int = 0) -> int:
        """Return how many of ``rows`` neighboring queries go together, one at least."""
        most_entries = self.plan.queries.layout.most_entries
        while True:
            row_bytes = score_bytes * max(most_entries(rows, self.plan.ratio), 1) + query_bytes
            fitting = max(1, (self.workspace_bytes - taken) // row_bytes)
            if rows <= fitting:
                return max(rows, 1)
            # Fewer queries may see fewer entries, and then more of them fit.
            rows = max(fitting, rows // 2)


def outside(count: int, first: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """Return which of ``count`` entries are not in [first, stop) of [B, C, 1]: bool [B, C, P]."""
    entry = torch.arange(count, device=first.device)
    return (entry < first) | (entry >= stop)


def best_entries(scores_BCP: torch.Tensor, hidden: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ``count`` best entries of each row, the earlier of two equal ones first.

    ``topk`` breaks ties as its algorithm happens to, which depends on more than the row. Ranking
    integers that hold score and place leaves no ties.

    Args:
        scores_BCP: Float32 scores, whose memory is written over.
        hidden: Bool [B or 1, C, P]: which entries a row does not have.
        count: At most P.

    Returns:
        Int64 [B, C, count], ``NOTHING`` last in rows of fewer entries.
    """
    bits = scores_BCP.add_(0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # in the order of the floats
    lowest = torch.iinfo(torch.int32).min + 1  # below -inf, above overflow
    ranked = bits.masked_fill_(hidden, lowest).long()
    ranked <<= 32
    ranked -= torch.arange(scores_BCP.shape[-1], device=scores_BCP.device)
    best = ranked.topk(count, dim=-1)
    return best.indices.masked_fill_(best.values <= lowest << 32, NOTHING)
