# SPDX-License-Identifier: Apache-2.0
"""Attention over a sliding window and compressed entries, addressed by position, with a sink.

Query i sees raw keys i-W+1 .. i and, of the entries that are complete, all (HCA) or the indexer's
top-k (CSA); keys are values. There is no mask and no score matrix of L x S: queries go in chunks,
and backward recomputes a chunk's probabilities from its log-sum-exp.
"""

# B batch rows   L queries   N heads   D head_dim   T raw keys   W sliding window
# P entries   K selected entries   C queries of a chunk

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan

_SCORES_ALIVE = 4
"""Tensors of a chunk's scores' size that backward holds at a time."""


class _ChunkKeys:
    """The keys of one chunk of queries, in both storages, and the scores against them."""

    def __init__(
        self, plan: AttentionPlan, chunk: slice, ranges: torch.Tensor, raw_BTD: torch.Tensor,
        entries_BPD: torch.Tensor, selected_BLK: torch.Tensor | None,
    ) -> None:  # fmt: skip
        device = raw_BTD.device
        raw_first, raw_last, entry_first, entry_stop = ranges[:, chunk, None].unbind(-1)
        self.span = plan.raw_span(chunk)
        self.raw = raw_BTD[:, self.span]
        rows = torch.arange(self.span.start, self.span.stop, device=device)
        self.raw_hidden = ((rows < raw_first) | (rows > raw_last))[:, :, None]
        self.selected = None
        if selected_BLK is not None:
            self.selected = selected_BLK[:, chunk].long()
            rows = torch.arange(raw_BTD.shape[0], device=device)[:, None, None]
            self.entries = entries_BPD[rows, self.selected.clamp(min=0)]
            self.entries_hidden = (self.selected == NOTHING)[:, :, None]
        else:
            span = plan.entry_span(chunk)
            self.entry_rows = slice(span.start, span.stop)
            self.entries = entries_BPD[:, self.entry_rows]
            rows = torch.arange(span.start, span.stop, device=device)
            self.entries_hidden = ((rows < entry_first) | (rows >= entry_stop))[:, :, None]

    def scores(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Return float32 [B, C, N, raw + entries], -inf where hidden."""
        raw, entries = self.dot(q)
        return torch.cat(
            (
                (raw.float() * scale).masked_fill_(self.raw_hidden, -torch.inf),
                (entries.float() * scale).masked_fill_(self.entries_hidden, -torch.inf),
            ),
            dim=-1,
        )

    def dot(self, x_BCND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the products of vectors with the chunk's raw keys and entries."""
        pattern = "bcnd,bckd->bcnk" if self.selected is not None else "bcnd,bkd->bcnk"
        return (
            torch.einsum("bcnd,bkd->bcnk", x_BCND, self.raw),
            torch.einsum(pattern, x_BCND, self.entries),
        )

    def weighted_sum(self, weights_BCNK: torch.Tensor) -> torch.Tensor:
        """Return the keys summed with weights of their own dtype, float32 [B, C, N, D]."""
        raw, entries = weights_BCNK.to(self.raw.dtype).split(self._sizes(), dim=-1)
        pattern = "bcnk,bckd->bcnd" if self.selected is not None else "bcnk,bkd->bcnd"
        return (
            torch.einsum("bcnk,bkd->bcnd", raw, self.raw).float()
            + torch.einsum(pattern, entries, self.entries).float()
        )

    def add_grad(
        self,
        weights_BCNK: torch.Tensor,
        x_BCND: torch.Tensor,
        grad_raw: torch.Tensor,
        grad_entries: torch.Tensor,
    ) -> None:
        """Add sum over queries of weight * x to the gradients of the keys that were weighted."""
        raw, entries = weights_BCNK.to(x_BCND.dtype).split(self._sizes(), dim=-1)
        grad_raw[:, self.span] += torch.einsum("bcnk,bcnd->bkd", raw, x_BCND)
        if self.selected is None:
            grad_entries[:, self.entry_rows] += torch.einsum("bcnk,bcnd->bkd", entries, x_BCND)
            return
        per_query = torch.einsum("bcnk,bcnd->bckd", entries, x_BCND).to(grad_entries.dtype)
        for row, where in enumerate(self.selected.clamp(min=0)):  # hidden slots carry weight 0
            grad_entries[row].index_add_(0, where.flatten(), per_query[row].flatten(0, 1))

    def _sizes(self) -> list[int]:
        return [self.raw.shape[1], self.entries.shape[-2]]


class SparseAttention(torch.autograd.Function):
    """Attention from normed and rotated queries, float32 inside; see ``Kernels.attend_rotated``."""

    # With s_j = scale q.k_j, Z = exp(sink) + sum_j exp(s_j), p_j = exp(s_j) / Z:
    # forward:   o = sum_j p_j k_j
    # backward:  delta = sum_j p_j do.k_j, ds_j = p_j (do.k_j - delta);
    #            dq = scale sum_j ds_j k_j, dk_j = scale ds_j q + p_j do,
    #            dsink = -exp(sink) / Z * delta

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor, sinks: torch.Tensor,
        selected: torch.Tensor | None, plan: AttentionPlan, scale: float, workspace_bytes: int,
    ) -> torch.Tensor:  # fmt: skip
        """Return [B, L, N, D]; ``workspace_bytes`` bounds what a chunk of queries computes."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        ranges = plan.visible_ranges(q.device)
        for chunk in _chunks(plan, q, selected, workspace_bytes):
            keys = _ChunkKeys(plan, chunk, ranges, raw, entries, selected)
            scores = keys.scores(q[:, chunk], scale)
            sink_column = sinks.float().expand(*scores.shape[:3])
            lse[:, chunk] = torch.logaddexp(scores.logsumexp(dim=-1), sink_column)
            probs = scores.sub_(lse[:, chunk, :, None]).exp_()
            out[:, chunk] = keys.weighted_sum(probs).to(out.dtype)
        ctx.save_for_backward(q, raw, entries, sinks, selected, lse, ranges)
        ctx.plan, ctx.scale, ctx.workspace_bytes = plan, scale, workspace_bytes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of q, raw, entries and sinks."""
        q, raw, entries, sinks, selected, lse, ranges = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        scale: float = ctx.scale
        grad_q = torch.empty_like(q)
        # Many chunks add to the same key, more than bfloat16 could count.
        grad_raw = torch.zeros_like(raw, dtype=torch.float32)
        grad_entries = torch.zeros_like(entries, dtype=torch.float32)
        grad_sinks = torch.zeros_like(sinks, dtype=torch.float32)
        for chunk in _chunks(plan, q, selected, ctx.workspace_bytes):
            keys = _ChunkKeys(plan, chunk, ranges, raw, entries, selected)
            q_c, grad_c, lse_c = q[:, chunk], grad_out[:, chunk], lse[:, chunk]
            probs = keys.scores(q_c, scale).sub_(lse_c[..., None]).exp_()
            grad_probs = torch.cat(keys.dot(grad_c), dim=-1).float()
            delta = (probs * grad_probs).sum(dim=-1)
            grad_sinks -= ((sinks.float() - lse_c).exp() * delta).sum(dim=(0, 1))
            keys.add_grad(probs, grad_c, grad_raw, grad_entries)
            grad_scores = grad_probs.sub_(delta[..., None]).mul_(probs).mul_(scale)
            grad_q[:, chunk] = keys.weighted_sum(grad_scores).to(grad_q.dtype)
            keys.add_grad(grad_scores, q_c, grad_raw, grad_entries)
        return (
            grad_q,
            grad_raw.to(raw.dtype),
            grad_entries.to(entries.dtype),
            grad_sinks.to(sinks.dtype),
            *[None] * 4,
        )


def _chunks(
    plan: AttentionPlan, q: torch.Tensor, selected: torch.Tensor | None, workspace_bytes: int
) -> Iterator[slice]:
    """Cut the queries so that a chunk's scores fit the workspace."""
    batch, _, heads, width = q.shape
    seen = plan.queries.layout.most_entries(plan.window, plan.ratio) if plan.ratio else 0
    if selected is not None:
        # Selected entries are copied out for each query: D numbers a key beside its N scores.
        seen = selected.shape[-1] * (1 + width // heads)
    # A chunk of C queries scores C * (C + W - 1) raw keys: longer than W, it wastes work.
    scores = 4 * batch * heads * (2 * plan.window + seen)
    rows = workspace_bytes // (_SCORES_ALIVE * scores)
    return plan.queries.chunks(max(1, min(rows, plan.window)))
