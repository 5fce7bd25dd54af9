# SPDX-License-Identifier: Apache-2.0
"""Top-k selection of DeepSeek-V4.1 in torch: blocks of entries, then entries inside them.

One layer selects among all that a query sees, and keeps the blocks with the best entries as
candidates; later layers select inside the candidates. All scores of a chunk are computed: those of
selected blocks alone would take a copy of the blocks' keys for each query.
"""

# B batch rows   L queries   C queries of a chunk   I index heads   F index width
# P entries, in a chunk those that a query may see, the document's first one first
# K selected entries   M candidate blocks

from __future__ import annotations

import torch
from torch.nn.functional import pad

from nemo_dsv4_cp.kernels.protocol import CandidateBlocks, RotatedIndexQueries
from nemo_dsv4_cp.kernels.reference.selection import RANKED, Scoring, best_entries
from nemo_dsv4_cp.sequence.plan import NOTHING

_SLOT = 40
"""Bytes of a selected entry: its rank and its number, the latter three times."""


@torch.no_grad()
def select_shared(
    queries: RotatedIndexQueries,
    keys_BPF: torch.Tensor,
    topk: int,
    blocks: CandidateBlocks | None,
    candidates_BLM: torch.Tensor | None,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do what :meth:`nemo_dsv4_cp.kernels.protocol.Kernels.select_shared` does, in chunks."""
    plan, (batch, length, _) = queries.plan, queries.weights_BLI.shape
    layout, device = plan.queries.layout, keys_BPF.device
    longest = min(layout.longest_document // plan.ratio, keys_BPF.shape[1])

    def nothing(slots: int) -> torch.Tensor:
        return torch.full((batch, length, slots), NOTHING, dtype=torch.int32, device=device)

    selected_BLK, made_BLM = nothing(min(topk, keys_BPF.shape[1])), None
    if blocks is not None and candidates_BLM is None:
        made_BLM = nothing(min(blocks.keep, blocks.count(longest)))
    scoring = _scoring(queries, keys_BPF, min(topk, longest), blocks, workspace_bytes)
    bounds = plan.queries.visible_entries(plan.ratio, device)
    for chunk in scoring.chunks():
        span = plan.entry_span(chunk)
        first, stop = (bound[:, chunk, None] for bound in bounds)
        # Passed on without a name, so that nothing else holds the memory.
        best, best_blocks = _select_chunk(
            scoring.scores(chunk),
            first - span.start if layout.packed else None,
            stop - first,
            min(longest, len(span)),
            topk,
            blocks,
            None if candidates_BLM is None else candidates_BLM[:, chunk],
        )
        unused = best == NOTHING
        selected_BLK[:, chunk, : best.shape[-1]] = best.add_(first).masked_fill_(unused, NOTHING)
        if made_BLM is not None and best_blocks is not None:
            made_BLM[:, chunk, : best_blocks.shape[-1]] = best_blocks
    return selected_BLK, made_BLM


def index_scores(
    q_BCIF: torch.Tensor, keys_BPF: torch.Tensor, weights_BCI: torch.Tensor
) -> torch.Tensor:
    """Score every query against every key, [B, C, P] of the queries' dtype.

    Rounds where AutoModel's ``_Indexer.forward`` does with ``attn: eager``, so that equal tensors
    have equal scores.
    """
    products = torch.einsum("bcif,bpf->bcip", q_BCIF, keys_BPF)
    return products.relu_().mul_(weights_BCI.unsqueeze(-1)).sum(dim=2)


def _scoring(
    queries: RotatedIndexQueries,
    keys_BPF: torch.Tensor,
    slots: int,
    blocks: CandidateBlocks | None,
    workspace_bytes: int,
) -> Scoring:
    q, weights = queries.q_BLIF, queries.weights_BLI
    batch, _, heads = weights.shape

    def score(rows: slice, seen: range) -> torch.Tensor:
        return index_scores(q[:, rows], keys_BPF[:, seen.start : seen.stop], weights[:, rows])

    return Scoring(
        queries.plan,
        score,
        batch,
        score_bytes=batch * (heads + 1) * q.element_size(),
        workspace_bytes=workspace_bytes,
        # Blocks are ranked while the entries' scores are there.
        ranked_bytes=RANKED + (RANKED // blocks.size if blocks is not None else 0),
        query_bytes=slots * _SLOT,
    )


def _select_chunk(
    scores_BCP: torch.Tensor,
    first: torch.Tensor | None,
    seen: torch.Tensor,
    most: int,
    topk: int,
    blocks: CandidateBlocks | None,
    candidates_BCM: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Select for a chunk of queries.

    Args:
        scores_BCP: Scores, whose memory may be written over.
        first: Where each query's document has its first entry among them, int64 [B or 1, C, 1];
            None if all begin with it.
        seen: How many entries each query sees, int64 [B or 1, C, 1].
        most: How many entries any query sees at most.
        topk: Entries selected for each query.
        blocks: Number and size of candidates.
        candidates_BCM: Candidates to select in.

    Returns:
        Int64 [B, C, K] and [B, C, M]: entries and blocks counted from the document's first;
        the latter only if ``blocks`` are to be chosen.
    """
    if first is not None:
        scores_BCP = _from_first(scores_BCP, first, most)
    scores_BCP = scores_BCP.float()
    count, chosen = scores_BCP.shape[-1], None
    hidden = torch.arange(count, device=seen.device) >= seen
    if candidates_BCM is not None:
        assert blocks is not None, "candidates are blocks of a size"
        hidden = hidden | _out_of_blocks(candidates_BCM, blocks, count)
    elif blocks is not None:
        chosen = _best_blocks(scores_BCP.masked_fill_(hidden, -torch.inf), seen, blocks)
    return best_entries(scores_BCP, hidden, min(topk, count)), chosen


def _from_first(scores_BCP: torch.Tensor, first: torch.Tensor, most: int) -> torch.Tensor:
    """Return the scores of ``most`` entries from each query's first one on, [B, C, most].

    What is beyond the last one holds that one's score.
    """
    batch, _, count = scores_BCP.shape
    entry = first + torch.arange(most, device=first.device)
    return scores_BCP.gather(-1, entry.clamp_(max=count - 1).expand(batch, -1, -1))


def _best_blocks(
    scores_BCP: torch.Tensor, seen: torch.Tensor, blocks: CandidateBlocks
) -> torch.Tensor:
    """Return the numbers of the blocks to keep, [B, C, M]: the last visible entry's first."""
    lacking = -scores_BCP.shape[-1] % blocks.size
    whole = pad(scores_BCP, (0, lacking), value=-torch.inf) if lacking else scores_BCP
    best = whole.unflatten(-1, (-1, blocks.size)).amax(dim=-1)
    number = torch.arange(best.shape[-1], device=best.device)
    best.masked_fill_(number == (seen - 1) // blocks.size, torch.inf)
    return best_entries(best, number * blocks.size >= seen, min(blocks.keep, best.shape[-1]))


def _out_of_blocks(
    candidates_BCM: torch.Tensor, blocks: CandidateBlocks, entries: int
) -> torch.Tensor:
    """Return which of the first ``entries`` of a document are in no candidate, bool [B, C, P]."""
    count = blocks.count(entries)
    # A column more takes the unused slots.
    number = candidates_BCM.long().masked_fill_(candidates_BCM == NOTHING, count)
    outside = torch.ones(*number.shape[:2], count + 1, dtype=torch.bool, device=number.device)
    outside.scatter_(-1, number, False)
    return outside[..., :count].repeat_interleave(blocks.size, dim=-1)[..., :entries]
