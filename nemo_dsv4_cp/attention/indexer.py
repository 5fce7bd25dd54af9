"""CSA's choice: which past entries each query attends to, without gradient.

# B batch rows   L local queries   I index heads   D index width   P entries   K chosen entries
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.host.deepseek_v4 import apply_partial_rope, index_scores
from nemo_dsv4_cp.sequence.layout import SequenceLayout

NOTHING = -1
"""Fills the slots of a query that has fewer than K entries to choose from."""


def select_entries(
    indexer: Any,
    hidden_BLE: torch.Tensor,
    q_residual: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    index_keys_BPD: torch.Tensor,
    layout: SequenceLayout,
    *,
    workspace_bytes: int,
) -> torch.Tensor:
    """Score the entries that each query may see and keep the K best.

    Scores are computed for a few rows at a time, so memory never grows with L * P (the formula is
    the host's ``DeepseekV4Indexer.forward``).

    Args:
        indexer: The host's ``DeepseekV4Indexer``.
        hidden_BLE: Local hidden states.
        q_residual: Normalised low-rank queries [B, L, q_lora_rank].
        position_embeddings: Cos and sin of the local positions, each [B, L, rope_head_dim].
        index_keys_BPD: Index keys of all ranks' entries.
        layout: Positions of this rank's tokens.
        workspace_bytes: How much the scores of one chunk of rows may take.

    Returns:
        Int32 [B, L, min(index_topk, P)]: entry indices, :data:`NOTHING` in unused slots.
    """
    batch, length = hidden_BLE.shape[:2]
    ratio, heads = indexer.compress_ratio, indexer.n_heads
    entries = index_keys_BPD.shape[1]
    kept = min(indexer.index_topk, entries)
    chosen = torch.full((batch, length, kept), NOTHING, dtype=torch.int32, device=hidden_BLE.device)
    if not kept:
        return chosen
    cos, sin = (part.unsqueeze(2) for part in position_embeddings)
    q_BLID = indexer.wq_b(q_residual).view(batch, length, heads, indexer.head_dim)
    q_BLID = apply_partial_rope(q_BLID, cos, sin, indexer.rope_head_dim)
    weights_BLI = indexer.weights_proj(hidden_BLE).float() * heads**-0.5

    rows = length
    while (
        rows > 1 and rows * batch * heads * layout.most_entries(rows, ratio) * 4 > workspace_bytes
    ):
        rows = (rows + 1) // 2
    for begin in range(0, length, rows):
        chunk = slice(begin, min(begin + rows, length))
        span = layout.entry_span(chunk, ratio)
        if not len(span):
            continue
        keys = index_keys_BPD[:, span.start : span.stop]
        scores_BCP = index_scores(indexer, q_BLID[:, chunk], keys, weights_BLI[:, chunk])
        first, stop = (
            bound[..., None] - span.start
            for bound in layout.visible_entries(chunk, ratio, scores_BCP.device)
        )
        best = _best(scores_BCP, first, stop, min(kept, len(span)))
        unseen = (best < first) | (best >= stop)
        best = (best + span.start).masked_fill(unseen, NOTHING)
        chosen[:, chunk, : best.shape[-1]] = best.to(torch.int32)
    return chosen


def _best(
    scores_BCP: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, kept: int
) -> torch.Tensor:
    """Return the ``kept`` best entries of each row, the earlier of two equal ones first.

    ``topk`` breaks ties as its algorithm happens to, which depends on more than the row. Ranking
    whole numbers that hold score and place leaves no ties. Entries outside [first, stop)
    come last.
    """
    bits = (scores_BCP + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # in the order of the floats
    entry = torch.arange(scores_BCP.shape[-1], device=scores_BCP.device)
    lowest = torch.iinfo(torch.int32).min + 1  # below -inf, above overflow
    hidden = (entry < first) | (entry >= stop)
    ranked = (ordered.masked_fill_(hidden, lowest) << 32) - entry
    return ranked.topk(kept, dim=-1).indices
