# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss in torch, in chunks of queries: values and gradients in one pass.

No tensor grows with L * P: a chunk's target, scores and their gradients are freed with it.
"""

# B batch rows   C queries of a chunk   N heads   D head_dim   I index heads   F index width
# S entries of a chunk: the K selected of each query, or all that any of them may see   P entries

from __future__ import annotations

import torch

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    IndexerLossTerms,
    IndexQueries,
)
from nemo_dsv4_cp.kernels.reference.attention import ChunkKeys, chunks
from nemo_dsv4_cp.kernels.reference.rotary import norm_and_rotate, rotate_
from nemo_dsv4_cp.kernels.reference.workspace import AttentionScratch
from nemo_dsv4_cp.sequence.plan import NOTHING, halo

TINY = torch.finfo(torch.float32).tiny

# With weights a_i, dots d_ij = q_i.k_j, target p and prediction m over a query's entries:
# s_j = sum_i a_i relu(d_ij), m = softmax(s), loss = sum_j p_j (log p_j - log m_j);
# ds_j = m_j - p_j, da_i = sum_j ds_j relu(d_ij), dd_ij = ds_j a_i [d_ij > 0],
# dq_i = sum_j dd_ij k_j, dk_j = sum_i dd_ij q_i


def indexer_loss(
    index: IndexQueries,
    index_keys: torch.Tensor,
    queries: AttentionQueries,
    keys: AttentionKeys,
    constants: AttentionConstants,
    *,
    token_weights_BL: torch.Tensor,
    full: bool,
    workspace_bytes: int,
) -> IndexerLossTerms:
    """Compute what ``Kernels.indexer_loss`` says; ``workspace_bytes`` bounds a chunk's tensors."""
    plan, device = queries.plan, index_keys.device
    grad_q, grad_weights = torch.empty_like(index.q_BLIF), torch.empty_like(index.weights_BLI)
    grad_keys = torch.zeros_like(index_keys, dtype=torch.float32)
    totals = torch.zeros(2, dtype=torch.float32, device=device)
    ranges = plan.visible_ranges(device)
    compared = None if full else queries.selected_BLK
    for chunk in chunks(plan, _query_bytes(index, queries, full=full), workspace_bytes, device):
        of_chunk = ChunkKeys(plan, chunk, ranges, keys.raw_BTD, keys.entries_BPD, compared)
        target, mass = _target(of_chunk, chunk, queries, keys, constants, workspace_bytes)
        share = mass / queries.q_BLND.shape[2]
        if full:
            share = _selected_share(target, of_chunk, chunk, queries)
        hidden = of_chunk.entries_hidden.squeeze(2).expand_as(target)
        weights = token_weights_BL[:, chunk]
        targeted = weights.masked_fill(mass < TINY, 0)  # else window and sink have all
        loss, grads = _of_chunk(
            index, index_keys, chunk, of_chunk, target, hidden, targeted, workspace_bytes
        )
        totals += torch.stack((loss, (weights * share).sum()))
        grad_q[:, chunk], grad_weights[:, chunk] = grads[:2]
        _add_to_keys(grad_keys, of_chunk, grads[2])
        del of_chunk, target, grads  # not there too while the next are computed
    loss, captured = totals.unbind()
    return IndexerLossTerms(loss, captured, grad_q, grad_weights, grad_keys.to(index_keys.dtype))


def _target(
    of_chunk: ChunkKeys,
    chunk: slice,
    queries: AttentionQueries,
    keys: AttentionKeys,
    constants: AttentionConstants,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention's probabilities of the entries, normalized to 1, float32 [B, C, S].

    And their sum over heads and entries before that, [B, C].
    """
    cos, sin = (angles[:, chunk] for angles in queries.rope)
    assert constants.eps is not None, "only V4's indexer is trained"
    q = norm_and_rotate(
        queries.q_BLND[:, chunk], cos, sin, eps=constants.eps, workspace_bytes=workspace_bytes
    )
    scores = of_chunk.scores(q, constants.scale)
    sinks = keys.sinks_N.float().expand(scores.shape[:3])
    lse = torch.logaddexp(scores.logsumexp(dim=-1), sinks)
    entries = scores[..., scores.shape[-1] - of_chunk.entries.shape[-2] :]
    mass = entries.sub_(lse[..., None]).exp_().sum(dim=2)
    total = mass.sum(dim=-1)
    return mass / total.clamp(min=TINY)[..., None], total


def _selected_share(
    target: torch.Tensor, of_chunk: ChunkKeys, chunk: slice, queries: AttentionQueries
) -> torch.Tensor:
    """Return which part of the target the selected entries have, [B, C]."""
    assert queries.selected_BLK is not None
    selected = queries.selected_BLK[:, chunk].long()
    if not target.shape[-1]:
        return target.sum(dim=-1)
    places = (selected - of_chunk.entry_rows.start).clamp(min=0)
    return target.gather(-1, places).masked_fill(selected == NOTHING, 0).sum(dim=-1)


def _of_chunk(
    index: IndexQueries,
    index_keys: torch.Tensor,
    chunk: slice,
    of_chunk: ChunkKeys,
    target: torch.Tensor,
    hidden: torch.Tensor,
    token_weights: torch.Tensor,
    workspace_bytes: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return a chunk's loss, and the gradients of its queries, their weights, and keys.

    The last is [B, C, S, F] for selected entries, else [B, S, F]; all are float32.
    """
    cos, sin = (angles[:, chunk] for angles in index.rope)
    q = rotate_(index.q_BLIF[:, chunk].clone(), cos, sin, workspace_bytes=workspace_bytes).float()
    if of_chunk.selected is None:
        keys, each = index_keys[:, of_chunk.entry_rows].float(), "bsf"
    else:
        rows = torch.arange(len(index_keys), device=index_keys.device)[:, None, None]
        keys, each = index_keys[rows, of_chunk.selected.clamp(min=0)].float(), "bcsf"
    weights = index.weights_BLI[:, chunk]
    dots = torch.einsum(f"bcif,{each}->bcis", q, keys).relu_()
    scores = torch.einsum("bci,bcis->bcs", weights, dots).masked_fill_(hidden, -torch.inf)
    # A query without entries has scores of -inf alone, whose softmax is NaN.
    log_predicted = scores.log_softmax(dim=-1).masked_fill_(hidden, 0)
    entropy = torch.special.xlogy(target, target).sum(dim=-1)
    loss = token_weights * (entropy - (target * log_predicted).sum(dim=-1))
    grad_scores = log_predicted.exp_().sub_(target).masked_fill_(hidden, 0)
    grad_scores *= token_weights[..., None]
    grad_weights = torch.einsum("bcs,bcis->bci", grad_scores, dots)
    grad_dots = dots.sign_().mul_(grad_scores.unsqueeze(2)).mul_(weights.unsqueeze(-1))
    grad_q = torch.einsum(f"bcis,{each}->bcif", grad_dots, keys)
    grad_keys = torch.einsum(f"bcis,bcif->{each}", grad_dots, q)
    grad_q = rotate_(grad_q, cos, -sin, workspace_bytes=workspace_bytes)
    return loss.sum(), (grad_q, grad_weights, grad_keys)


def _add_to_keys(grad_keys: torch.Tensor, of_chunk: ChunkKeys, added: torch.Tensor) -> None:
    if of_chunk.selected is None:
        grad_keys[:, of_chunk.entry_rows] += added
        return
    for row, where in enumerate(of_chunk.selected.clamp(min=0)):  # hidden slots carry 0
        grad_keys[row].index_add_(0, where.flatten(), added[row].flatten(0, 1))


def _query_bytes(index: IndexQueries, queries: AttentionQueries, *, full: bool) -> int:
    """Return what a chunk holds of one query at a time: attention's scores, then the indexer's."""
    (batch, length, heads, width), plan = queries.q_BLND.shape, queries.plan
    assert queries.selected_BLK is not None
    entries = queries.selected_BLK.shape[-1]
    copied = 0 if full else batch * entries
    if full:
        entries = plan.queries.layout.most_entries(length, plan.ratio)
    attention = AttentionScratch(
        heads=batch * heads,
        width=width,
        raw=plan.window + halo(plan.window),
        entries=entries,
        copied=copied,
        itemsize=queries.q_BLND.element_size(),
    ).forward
    _, _, index_heads, index_width = index.q_BLIF.shape
    # Dots and a product of them; keys of each query in their dtype, float32 and as a gradient.
    scores = batch * index_heads * entries * 4 * 2 + 3 * batch * index_heads * index_width * 4
    return max(attention, scores + copied * index_width * 10) + batch * entries * 4 * 4
