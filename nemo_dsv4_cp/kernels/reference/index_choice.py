# SPDX-License-Identifier: Apache-2.0
"""Which past entries each query attends to: scores, and the best of each row.

Scores are computed for a few rows at a time, so memory never grows with L * P.
"""

# B batch rows   L queries   I index heads   D index width   P entries   K chosen entries
# C queries of a chunk

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_dsv4_cp.sequence.plan import NOTHING
from nemo_dsv4_cp.sequence.queries import Queries

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""``(q [B, C, I, D], keys [B, P, D], weights [B, C, I], first_query) -> float32 [B, C, P]``.

``first_query`` counts from the first token that the first key could pool: a key w that a query may
see has w < (first_query + c + ratio) // ratio. What no query may see may hold anything.
"""

_RANKED = 16
"""Bytes that a score takes while it is ranked: itself, a whole number with its place, a mask."""


def index_scores(
    q_BCID: torch.Tensor, keys_BPD: torch.Tensor, weights_BCI: torch.Tensor, first_query: int
) -> torch.Tensor:
    """Score every query against every index key: sum over heads of weight * relu(q . k).

    The formula is AutoModel's ``indexer_scores_torch``, its scale among the weights.
    ``first_query`` is not read: keys ahead of a query are scored too.

    Returns:
        Float32 [B, C, P].
    """
    scores = torch.matmul(q_BCID.float(), keys_BPD.float().transpose(-1, -2).unsqueeze(1))
    return (scores.relu_() * weights_BCI.float().unsqueeze(-1)).sum(dim=2)


def choose_entries(
    q_BLID: torch.Tensor,
    weights_BLI: torch.Tensor,
    keys_BPD: torch.Tensor,
    *,
    queries: Queries,
    ratio: int,
    topk: int,
    workspace_bytes: int,
    score: Score = index_scores,
    score_bytes: int | None = None,
) -> torch.Tensor:
    """Score the entries that each query may see and keep the K best.

    Args:
        q_BLID: Index queries, after rotary.
        weights_BLI: Weight of each head, with the scale of the scores.
        keys_BPD: Index keys of all ranks' entries.
        queries: Which they are.
        ratio: Compress ratio of the entries.
        topk: How many entries a query may choose.
        workspace_bytes: How much the scores of one chunk of rows may take.
        score: What computes the scores.
        score_bytes: What it takes a score; None for a float32 a head.

    Returns:
        Int32 [B, L, min(topk, P)]: entry indices, the best first, ``NOTHING`` in unused slots.
        Equal scores go to the earlier entry.
    """
    batch, length, heads = weights_BLI.shape
    kept = min(topk, keys_BPD.shape[1])
    chosen = torch.full((batch, length, kept), NOTHING, dtype=torch.int32, device=q_BLID.device)
    if not kept:
        return chosen
    taken = max(4 * heads if score_bytes is None else score_bytes, _RANKED)
    layout, rows = queries.layout, length
    while rows > 1 and rows * batch * taken * layout.most_entries(rows, ratio) > workspace_bytes:
        rows = (rows + 1) // 2
    bounds = queries.visible_entries(ratio, q_BLID.device)
    for chunk in queries.chunks(max(rows, 1)):
        span = queries.entry_span(chunk, ratio)
        if not len(span):
            continue
        keys = keys_BPD[:, span.start : span.stop]
        (places,) = queries.spans(chunk)
        first_query = places.start - span.start * ratio
        scores_BCP = score(q_BLID[:, chunk], keys, weights_BLI[:, chunk], first_query)
        first, stop = (bound[:, chunk, None] - span.start for bound in bounds)
        best = _best(scores_BCP, first, stop, min(kept, len(span)))
        unseen = (best < first) | (best >= stop)
        best = (best + span.start).masked_fill(unseen, NOTHING)
        chosen[:, chunk, : best.shape[-1]] = best.to(torch.int32)
    return chosen


def _best(
    scores_BCP: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, kept: int
) -> torch.Tensor:
    """Return the ``kept`` best entries of each row, the earlier of two equal ones first.

    The scores' memory is written over.

    ``topk`` breaks ties as its algorithm happens to, which depends on more than the row. Ranking
    whole numbers that hold score and place leaves no ties. Entries outside [first, stop)
    come last.
    """
    bits = scores_BCP.add_(0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # in the order of the floats
    entry = torch.arange(scores_BCP.shape[-1], device=scores_BCP.device)
    lowest = torch.iinfo(torch.int32).min + 1  # below -inf, above overflow
    hidden = (entry < first) | (entry >= stop)
    ranked = bits.masked_fill_(hidden, lowest).long()
    ranked <<= 32
    ranked -= entry
    return ranked.topk(kept, dim=-1).indices
