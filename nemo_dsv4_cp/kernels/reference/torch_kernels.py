# SPDX-License-Identifier: Apache-2.0
"""The torch path as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`.

Queries go in chunks, so that memory never grows with L * P. Chunks are as long as scratch allows:
512 MiB on a CPU, gigabytes on a GPU, where each chunk costs launches.
"""

# B batch rows   L queries   N heads   D head_dim   P entries   K selected entries
# C queries of a chunk   I index heads   F index width   M candidate blocks

from __future__ import annotations

import torch

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    CandidateBlocks,
    IndexerLossTerms,
    IndexQueries,
    Rope,
    RotatedIndexQueries,
)
from nemo_dsv4_cp.kernels.reference.attention import SparseAttention
from nemo_dsv4_cp.kernels.reference.indexer_loss import indexer_loss
from nemo_dsv4_cp.kernels.reference.rotary import norm_and_rotate, rotate_
from nemo_dsv4_cp.kernels.reference.selection import Scoring, best_entries, outside
from nemo_dsv4_cp.kernels.reference.two_level_selection import select_shared
from nemo_dsv4_cp.kernels.reference.workspace import WORKSPACE, workspace_on
from nemo_dsv4_cp.sequence.plan import NOTHING


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
        (batch, length, _), plan = queries.weights_BLI.shape, queries.plan
        slots, device = min(topk, keys_BPF.shape[1]), keys_BPF.device
        selected = torch.full((batch, length, slots), NOTHING, dtype=torch.int32, device=device)
        if not slots:
            return selected
        scoring = self._scoring(queries, keys_BPF)
        bounds = plan.queries.visible_entries(plan.ratio, device)
        for chunk in scoring.chunks():
            span = plan.entry_span(chunk)
            first, stop = (bound[:, chunk, None] - span.start for bound in bounds)
            scores_BCP = scoring.scores(chunk)
            best = best_entries(scores_BCP, outside(len(span), first, stop), min(slots, len(span)))
            del scores_BCP  # not there too while the next are computed
            best = (best + span.start).masked_fill(best == NOTHING, NOTHING)
            selected[:, chunk, : best.shape[-1]] = best.to(torch.int32)
        return selected

    def _scoring(self, queries: IndexQueries, keys_BPF: torch.Tensor) -> Scoring:
        """Rotate index queries, which are scored in chunks by :meth:`index_scores`."""
        weights, plan = queries.weights_BLI, queries.plan
        workspace, (batch, _, heads) = self._workspace(queries.q_BLIF), weights.shape
        rotated = rotate_(queries.q_BLIF, *queries.rope, workspace_bytes=workspace)
        each = batch * (4 * heads if self.score_bytes is None else self.score_bytes)
        if batch > 1 and self.score_bytes is None:
            each += batch * 4 * keys_BPF.shape[-1]  # matmul copies the keys for each query

        def score(rows: slice, seen: range) -> torch.Tensor:
            (places,) = plan.queries.spans(rows)
            return self.index_scores(
                rotated[:, rows],
                keys_BPF[:, seen.start : seen.stop],
                weights[:, rows],
                first_query=places.start - seen.start * plan.ratio,
                ratio=plan.ratio,
            )

        return Scoring(plan, score, batch, each, workspace)

    def select_shared(
        self,
        queries: RotatedIndexQueries,
        keys_BPF: torch.Tensor,
        *,
        topk: int,
        blocks: CandidateBlocks | None,
        candidates_BLM: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the ``topk`` best entries of each query, the best first, and candidates if due."""
        selected: tuple[torch.Tensor, torch.Tensor | None] = _select_shared(
            queries, keys_BPF, topk, blocks, candidates_BLM, self._workspace(keys_BPF)
        )
        return selected

    def attend(
        self, queries: AttentionQueries, keys: AttentionKeys, constants: AttentionConstants
    ) -> torch.Tensor:
        """Attend to the window and to entries, all in range or the selected."""
        q_BLND, (cos, sin) = queries.q_BLND, queries.rope
        workspace = self._workspace(q_BLND)
        if constants.eps is None:
            q_BLND = rotate_(q_BLND, cos, sin, workspace_bytes=workspace)
        else:
            q_BLND = norm_and_rotate(q_BLND, cos, sin, eps=constants.eps, workspace_bytes=workspace)
        rotated = AttentionQueries(q_BLND, queries.rope, queries.plan, queries.selected_BLK)
        out_BLND = self.attend_rotated(rotated, keys, constants.scale)
        out_BLND = rotate_(out_BLND, cos, -sin, workspace_bytes=workspace)
        return out_BLND.view(*out_BLND.shape[:2], constants.groups, -1)

    def indexer_loss(
        self,
        index: IndexQueries,
        index_keys_BPF: torch.Tensor,
        queries: AttentionQueries,
        keys: AttentionKeys,
        constants: AttentionConstants,
        *,
        token_weights_BL: torch.Tensor,
        full: bool,
    ) -> IndexerLossTerms:
        """Compare what the indexer would choose with what attention looks at."""
        terms: IndexerLossTerms = _indexer_loss(
            index,
            index_keys_BPF,
            queries,
            keys,
            constants,
            token_weights_BL=token_weights_BL,
            full=full,
            workspace_bytes=self._workspace(index_keys_BPF),
        )
        return terms

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
            keys.entries_grad,
        )
        return out

    def _workspace(self, tensor: torch.Tensor) -> int:
        return self.workspace_bytes if self._is_set else workspace_on(tensor.device)


# Chunks break graphs, and AOTAutograd differentiates a Function whose forward breaks wrongly.
_sparse_attention = torch.compiler.disable(SparseAttention.apply)
_select_shared = torch.compiler.disable(select_shared)
_indexer_loss = torch.compiler.disable(indexer_loss)
