# SPDX-License-Identifier: Apache-2.0
"""Attention over a sliding window and compressed entries, addressed by position, with a sink.

Query i sees raw keys i-W+1 .. i and, of the entries that are complete, all (HCA) or the indexer's
top-k (CSA); keys are values. There is no mask and no score matrix of L x S: queries go in chunks,
and backward recomputes a chunk's probabilities from its log-sum-exp.
"""

# B batch rows   L queries   N heads   D head_dim   T raw keys   W sliding window
# P entries   K selected entries   C queries of a chunk

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nemo_dsv4_cp.kernels.reference.workspace import AttentionScratch, chunk_rows, on_gpu
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan, halo


class ChunkKeys:
    """The keys of one chunk of queries, in both storages, and the scores against them."""

    def __init__(
        self, plan: AttentionPlan, chunk: slice, ranges: torch.Tensor, raw_BTD: torch.Tensor,
        entries_BPD: torch.Tensor, selected_BLK: torch.Tensor | None,
    ) -> None:  # fmt: skip
        device = raw_BTD.device
        raw_first, raw_last, entry_first, entry_stop = ranges[:, chunk, None].unbind(-1)
        self.span, self._length = plan.raw_span(chunk), chunk.stop - chunk.start
        self.block = min(self._length, plan.window)
        keys = self.block + halo(plan.window)
        self.raw_BMDk = raw_BTD[:, self.span].unfold(1, keys, self.block)
        rows = torch.arange(self.span.start, self.span.stop, device=device)
        rows = rows.unfold(0, keys, self.block).repeat_interleave(self.block, dim=0)
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

    def scores(self, q_BCND: torch.Tensor, scale: float) -> torch.Tensor:
        """Return float32 [B, C, N, raw + entries], -inf where hidden."""
        scores = self.dot(q_BCND).mul_(scale)
        raw, entries = scores.split(self._sizes(), dim=-1)
        raw.masked_fill_(self.raw_hidden, -torch.inf)
        entries.masked_fill_(self.entries_hidden, -torch.inf)
        return scores

    def dot(self, x_BCND: torch.Tensor) -> torch.Tensor:
        """Return the products of vectors with the chunk's keys, float32 [B, C, N, raw + entries].

        In the memory of no other tensor.
        """
        raw = torch.einsum("bmcnd,bmdk->bmcnk", self._blocks(x_BCND), self.raw_BMDk)
        pattern = "bcnd,bckd->bcnk" if self.selected is not None else "bcnd,bkd->bcnk"
        entries = torch.einsum(pattern, x_BCND, self.entries)
        return torch.cat((raw.flatten(1, 2), entries), dim=-1).float()

    def weighted_sum(self, weights_BCNK: torch.Tensor) -> torch.Tensor:
        """Return the keys summed with weights of their own dtype, float32 [B, C, N, D]."""
        weights = weights_BCNK.to(self.entries.dtype)
        raw, entries = weights.split(self._sizes(), dim=-1)
        summed = torch.einsum("bmcnk,bmdk->bmcnd", self._blocks(raw), self.raw_BMDk).float()
        pattern = "bcnk,bckd->bcnd" if self.selected is not None else "bcnk,bkd->bcnd"
        return summed.flatten(1, 2) + torch.einsum(pattern, entries, self.entries).float()

    def add_grad(
        self,
        weights_BCNK: torch.Tensor,
        x_BCND: torch.Tensor,
        grad_raw: torch.Tensor,
        grad_entries: torch.Tensor,
    ) -> None:
        """Add sum over queries of weight * x to the gradients of the keys that were weighted."""
        raw, entries = weights_BCNK.to(x_BCND.dtype).split(self._sizes(), dim=-1)
        blocks = torch.einsum("bmcnk,bmcnd->bmdk", self._blocks(raw), self._blocks(x_BCND))
        # Blocks share their halos: keys of their own first, then those of the block after, neither
        # of which two blocks have.
        halo_begin, grad_span = self.block, grad_raw[:, self.span]
        own, rest = blocks.split((halo_begin, blocks.shape[-1] - halo_begin), dim=-1)
        grad_span[:, : self._length].unfold(1, own.shape[-1], self.block).add_(own)
        if rest.shape[-1]:
            grad_span[:, halo_begin:].unfold(1, rest.shape[-1], self.block).add_(rest)
        if self.selected is None:
            grad_entries[:, self.entry_rows] += torch.einsum("bcnk,bcnd->bkd", entries, x_BCND)
            return
        per_query = torch.einsum("bcnk,bcnd->bckd", entries, x_BCND).to(grad_entries.dtype)
        for row, where in enumerate(self.selected.clamp(min=0)):  # hidden slots carry weight 0
            grad_entries[row].index_add_(0, where.flatten(), per_query[row].flatten(0, 1))

    def _blocks(self, x_BC: torch.Tensor) -> torch.Tensor:
        blocks: torch.Tensor = x_BC.unflatten(1, (-1, self.block))
        return blocks

    def _sizes(self) -> list[int]:
        return [self.raw_BMDk.shape[-1], self.entries.shape[-2]]


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
        entries_grad: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return [B, L, N, D]; ``workspace_bytes`` bounds what a chunk of queries holds."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        ranges = plan.visible_ranges(q.device)
        per_query = _scratch(plan, q, selected).forward
        for chunk in chunks(plan, per_query, workspace_bytes, q.device):
            keys = ChunkKeys(plan, chunk, ranges, raw, entries, selected)
            _attend_chunk(keys, q[:, chunk], sinks, scale, lse[:, chunk], out[:, chunk])
            del keys  # or the next chunk's would be there beside it
        ctx.save_for_backward(q, raw, entries, sinks, selected, lse, ranges)
        ctx.plan, ctx.scale, ctx.workspace_bytes = plan, scale, workspace_bytes
        ctx.entries_grad = entries_grad
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of q, raw, entries and sinks; None for entries that share a sum."""
        q, raw, entries, sinks, selected, lse, ranges = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        scale: float = ctx.scale
        grad_q = torch.empty_like(q)
        # Many chunks add to the same key, more than bfloat16 could count.
        grad_raw = torch.zeros_like(raw, dtype=torch.float32)
        shared = ctx.entries_grad is not None
        grad_entries = (
            ctx.entries_grad() if shared else torch.zeros_like(entries, dtype=torch.float32)
        )
        grad_sinks = torch.zeros_like(sinks, dtype=torch.float32)
        per_query = _scratch(plan, q, selected).backward
        for chunk in chunks(plan, per_query, ctx.workspace_bytes, q.device):
            keys = ChunkKeys(plan, chunk, ranges, raw, entries, selected)
            grad_sinks -= _attend_chunk_backward(
                keys, grad_out[:, chunk], q[:, chunk], sinks, scale, lse[:, chunk],
                grad_q[:, chunk], grad_raw, grad_entries,
            )  # fmt: skip
            del keys
        return (
            grad_q,
            grad_raw.to(raw.dtype),
            None if shared else grad_entries.to(entries.dtype),
            grad_sinks.to(sinks.dtype),
            *[None] * 5,
        )


def _attend_chunk(
    keys: ChunkKeys, q: torch.Tensor, sinks: torch.Tensor, scale: float,
    lse: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Fill a chunk's log-sum-exp [B, C, N] and output [B, C, N, D]."""
    scores = keys.scores(q, scale)
    sink_column = sinks.float().expand(*scores.shape[:3])
    lse.copy_(torch.logaddexp(scores.logsumexp(dim=-1), sink_column))
    probs = scores.sub_(lse[..., None]).exp_()
    out.copy_(keys.weighted_sum(probs))


def _attend_chunk_backward(
    keys: ChunkKeys, grad: torch.Tensor, q: torch.Tensor, sinks: torch.Tensor, scale: float,
    lse: torch.Tensor, grad_q: torch.Tensor, grad_raw: torch.Tensor, grad_entries: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Fill a chunk's ``grad_q``, add to its keys' gradients, and return minus its sinks'."""
    probs = keys.scores(q, scale).sub_(lse[..., None]).exp_()
    grad_probs = keys.dot(grad)
    delta = (probs * grad_probs).sum(dim=-1)
    keys.add_grad(probs, grad, grad_raw, grad_entries)
    grad_scores = grad_probs.sub_(delta[..., None]).mul_(probs).mul_(scale)
    grad_q.copy_(keys.weighted_sum(grad_scores))
    keys.add_grad(grad_scores, q, grad_raw, grad_entries)
    return ((sinks.float() - lse).exp() * delta).sum(dim=(0, 1))


def _scratch(
    plan: AttentionPlan, q: torch.Tensor, selected: torch.Tensor | None
) -> AttentionScratch:
    batch, length, heads, width = q.shape
    seen = plan.queries.layout.most_entries(length, plan.ratio) if plan.ratio else 0
    if selected is not None:
        seen = selected.shape[-1]
    return AttentionScratch(
        heads=batch * heads,
        width=width,
        raw=plan.window + halo(plan.window),
        entries=seen,
        copied=0 if selected is None else batch * seen,
        itemsize=q.element_size(),
    )


def chunks(
    plan: AttentionPlan, per_query: int, workspace_bytes: int, device: torch.device
) -> Iterator[slice]:
    """Cut the queries so that a chunk fits the workspace and is one block, or whole blocks."""
    rows = chunk_rows(per_query, plan.window, workspace_bytes, on_gpu=on_gpu(device))
    for chunk in plan.queries.chunks(rows):
        last = chunk.stop - (chunk.stop - chunk.start) % plan.window
        if chunk.start < last < chunk.stop:
            yield slice(chunk.start, last)
            yield slice(last, chunk.stop)
        else:
            yield chunk
