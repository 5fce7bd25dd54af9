# SPDX-License-Identifier: Apache-2.0
"""The torch path as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`.

Queries go in chunks, so that memory never grows with L * P. Chunks are as long as scratch allows:
512 MiB on a CPU, gigabytes on a GPU, where each chunk costs launches.
"""

# B batch rows   L queries   N heads   D head_dim   P entries   K selected entries
# C queries of a chunk   I index heads   F index width

from __future__ import annotations

import torch

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    IndexQueries,
    Rope,
)
from nemo_dsv4_cp.kernels.reference.attention import SparseAttention
from nemo_dsv4_cp.kernels.reference.rotary import norm_and_rotate, rotate_
from nemo_dsv4_cp.kernels.reference.workspace import WORKSPACE, workspace_on
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan

_RANKED = 16
"""Bytes that a score takes while it is ranked: itself, an integer with its place, a mask."""


class TorchKernels:
    """Operations of torch in chunks, on any device."""

    score_bytes: int | None = None

    def __init__(self, *, workspace_bytes: int | None) -> None:
        self.workspace_bytes = workspace_bytes or WORKSPACE
        self._is_set = workspace_bytes is not None

    def rotate(self, x_BLD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Return keys or entries with their last r dims rotated."""
        rows = x_BLD.unsqueeze(2).clone()
        return rotate_(rows, *rope, workspace_bytes=self._workspace(rows)).squeeze(2)

    def select_entries(
        self, queries: IndexQueries, keys_BPF: torch.Tensor, *, topk: int
    ) -> torch.Tensor:
        """Rotate index queries and return the ``topk`` best entries of each, the best first."""
        selected: torch.Tensor = self._select(queries, keys_BPF, topk)
        return selected

    # Chunks go by the lengths of rows and documents: traced, each length would compile anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _select(self, queries: IndexQueries, keys_BPF: torch.Tensor, topk: int) -> torch.Tensor:
        workspace, plan = self._workspace(queries.q_BLIF), queries.plan
        rotated = rotate_(queries.q_BLIF, *queries.rope, workspace_bytes=workspace)
        weights, which, ratio = queries.weights_BLI, plan.queries, plan.ratio
        batch, length, _ = weights.shape
        slots = min(topk, keys_BPF.shape[1])
        shape, device = (batch, length, slots), weights.device
        selected = torch.full(shape, NOTHING, dtype=torch.int32, device=device)
        if not slots:
            return selected
        bounds = which.visible_entries(ratio, device)
        for chunk in which.chunks(_fitting(plan, length, batch * _RANKED, workspace)):
            span = which.entry_span(chunk, ratio)
            if not len(span):
                continue
            scores_BCP = self._scores(rotated, keys_BPF, weights, plan, chunk, workspace)
            first, stop = (bound[:, chunk, None] - span.start for bound in bounds)
            best = best_entries(scores_BCP, first, stop, min(slots, len(span)))
            unseen = (best < first) | (best >= stop)
            best = (best + span.start).masked_fill(unseen, NOTHING)
            selected[:, chunk, : best.shape[-1]] = best.to(torch.int32)
        return selected

    def _scores(
        self, rotated_BLIF: torch.Tensor, keys_BPF: torch.Tensor, weights_BLI: torch.Tensor,
        plan: AttentionPlan, chunk: slice, workspace_bytes: int,
    ) -> torch.Tensor:  # fmt: skip
        """Score a chunk of queries against the entries that they see between them, [B, C, P].

        In parts: scores of all heads take more memory than ranking their sums, which takes more
        launches. What a query does not see may hold anything.
        """
        batch, _, heads = weights_BLI.shape
        each = batch * (4 * heads if self.score_bytes is None else self.score_bytes)
        if batch > 1 and self.score_bytes is None:
            each += batch * 4 * keys_BPF.shape[-1]  # matmul copies the keys for each query
        span, count = plan.entry_span(chunk), chunk.stop - chunk.start
        # The sums of the whole chunk are there too.
        rows = _fitting(plan, count, each, workspace_bytes - workspace_bytes * 4 // _RANKED)
        scores_BCP = None
        for begin in range(chunk.start, chunk.stop, rows):
            part = slice(begin, min(begin + rows, chunk.stop))
            seen = plan.entry_span(part)
            if not len(seen):
                continue
            (places,) = plan.queries.spans(part)
            scores = self.index_scores(
                rotated_BLIF[:, part],
                keys_BPF[:, seen.start : seen.stop],
                weights_BLI[:, part],
                first_query=places.start - seen.start * plan.ratio,
                ratio=plan.ratio,
            )
            if part == chunk:
                return scores
            if scores_BCP is None:
                scores_BCP = scores.new_empty(batch, count, len(span))
            at = slice(seen.start - span.start, seen.stop - span.start)
            scores_BCP[:, begin - chunk.start : part.stop - chunk.start, at] = scores
        assert scores_BCP is not None, "a chunk that sees no entry was scored"
        return scores_BCP

    def attend(
        self, queries: AttentionQueries, keys: AttentionKeys, constants: AttentionConstants
    ) -> torch.Tensor:
        """Attend to the window and to entries, all in range or the selected."""
        q_BLND, (cos, sin) = queries.q_BLND, queries.rope
        workspace = self._workspace(q_BLND)
        q_BLND = norm_and_rotate(q_BLND, cos, sin, eps=constants.eps, workspace_bytes=workspace)
        rotated = AttentionQueries(q_BLND, queries.rope, queries.plan, queries.selected_BLK)
        out_BLND = self.attend_rotated(rotated, keys, constants.scale)
        out_BLND = rotate_(out_BLND, cos, -sin, workspace_bytes=workspace)
        return out_BLND.view(*out_BLND.shape[:2], constants.groups, -1)

    def index_scores(
        self,
        q_BCIF: torch.Tensor,
        keys_BPF: torch.Tensor,
        weights_BCI: torch.Tensor,
        *,
        first_query: int,
        ratio: int,
    ) -> torch.Tensor:
        """Score every query against every key, float32 [B, C, P].

        The formula is AutoModel's ``indexer_scores_torch``, its scale among the weights.
        """
        scores = torch.matmul(q_BCIF.float(), keys_BPF.float().transpose(-1, -2).unsqueeze(1))
        return scores.relu_().mul_(weights_BCI.float().unsqueeze(-1)).sum(dim=2)

    def attend_rotated(
        self, queries: AttentionQueries, keys: AttentionKeys, scale: float
    ) -> torch.Tensor:
        """Attend from normed and rotated queries, [B, L, N, D]."""
        out: torch.Tensor = _sparse_attention(
            queries.q_BLND,
            keys.raw_BTD,
            keys.entries_BPD,
            keys.sinks_N,
            queries.selected_BLK,
            queries.plan,
            scale,
            self._workspace(queries.q_BLND),
        )
        return out

    def _workspace(self, tensor: torch.Tensor) -> int:
        return self.workspace_bytes if self._is_set else workspace_on(tensor.device)


# Chunks break graphs, and AOTAutograd differentiates a Function whose forward breaks wrongly.
_sparse_attention = torch.compiler.disable(SparseAttention.apply)


def _fitting(plan: AttentionPlan, rows: int, score_bytes: int, workspace_bytes: int) -> int:
    """Return how many of ``rows`` neighboring queries go together, one at least."""
    most_entries = plan.queries.layout.most_entries
    while True:
        row_bytes = score_bytes * max(most_entries(rows, plan.ratio), 1)
        fitting = max(1, workspace_bytes // row_bytes)
        if rows <= fitting:
            return max(rows, 1)
        # Fewer queries may see fewer entries, and then more of them fit.
        rows = max(fitting, rows // 2)


def best_entries(
    scores_BCP: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the ``count`` best entries of each row, the earlier of two equal ones first.

    The scores' memory is written over. ``topk`` breaks ties as its algorithm happens to, which
    depends on more than the row. Ranking integers that hold score and place leaves no ties.
    Entries outside [first, stop) come last.
    """
    bits = scores_BCP.add_(0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # in the order of the floats
    entry = torch.arange(scores_BCP.shape[-1], device=scores_BCP.device)
    lowest = torch.iinfo(torch.int32).min + 1  # below -inf, above overflow
    hidden = (entry < first) | (entry >= stop)
    ranked = bits.masked_fill_(hidden, lowest).long()
    ranked <<= 32
    ranked -= entry
    return ranked.topk(count, dim=-1).indices
