# SPDX-License-Identifier: Apache-2.0
"""Attention of projected queries as one operation, forward and backward.

Forward norms and rotates the queries into the memory of the output, attends there and rotates
back: three launches. Backward goes through chunks of queries whose probabilities fit the workspace,
four launches each, or five: few, and each large.
"""

# B batch rows   L queries   N heads   D head_dim   T raw keys   P entries   K chosen entries
# r rotary dims   C queries of a chunk   G groups of heads

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from nemo_dsv4_cp.kernels.costs import tell
from nemo_dsv4_cp.kernels.triton import attention_costs, tiles
from nemo_dsv4_cp.kernels.triton.attention_backward import (
    chosen_kernel,
    keys_kernel,
    queries_kernel,
    ready_kernel,
    scores_kernel,
)
from nemo_dsv4_cp.kernels.triton.attention_chunks import (
    Chunk,
    backward_chunks,
    chunks_of,
    in_blocks,
    raw_slots,
)
from nemo_dsv4_cp.kernels.triton.attention_forward import attend_into
from nemo_dsv4_cp.kernels.triton.norm_rotate import (
    HEADS,
    norm_rotate_backward_,
    norm_rotate_into,
    padded,
    rotate_,
)
from nemo_dsv4_cp.sequence.plan import AttentionPlan


@torch.library.custom_op("dsv4_cp::attend", mutates_args=())
def attend_op(
    x: torch.Tensor,
    raw: torch.Tensor,
    entries: torch.Tensor,
    sinks: torch.Tensor,
    chosen: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sight: torch.Tensor,
    chunks: list[int],
    window: int,
    scale: float,
    eps: float,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, L, G, N / G * D], rotated back, and log Z, float32 [B, L, N].

    Args:
        x: Queries as projected [B, L, N, D].
        raw: Raw keys [B, T, D].
        entries: Entries [B, P, D].
        sinks: [N].
        chosen: Int32 [B, L, K], -1 in unused slots, which come last; None for all past entries.
        cos: [B, L, r].
        sin: [B, L, r].
        sight: Int32 [B or 1, L, 4] of :meth:`AttentionPlan.visible_ranges`.
        chunks: Of :func:`backward_chunks`.
        window: W.
        scale: Score multiplier.
        eps: Of the norm.
        groups: G.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    lse = x.new_empty(x.shape[:3], dtype=torch.float32)
    norm_rotate_into(out, x.contiguous(), cos, sin, eps)
    tile = tiles.of(tiles.FORWARD, x)
    attend_into(out, lse, out, raw, entries, sinks, chosen, sight, scale, tile)
    rotate_(out, cos, sin, sign=-1.0)
    return out.view(*x.shape[:2], groups, -1), lse


@attend_op.register_fake
def _(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, width = x.shape
    groups = others[-1]
    out = x.new_empty(batch, length, groups, heads // groups * width)
    return out, x.new_empty(x.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dsv4_cp::attend_backward", mutates_args=())
def attend_backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    raw: torch.Tensor,
    entries: torch.Tensor,
    sinks: torch.Tensor,
    chosen: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sight: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    chunks: list[int],
    window: int,
    scale: float,
    eps: float,
    in_order: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, raw, entries and sinks, summed in float32."""
    batch, length, heads, width = x.shape
    x = x.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_x = torch.empty_like(x)  # holds the queries of a chunk until their gradient is known
    grad_raw = torch.zeros_like(raw, dtype=torch.float32)
    grad_entries = torch.zeros_like(entries, dtype=torch.float32)
    delta, of_sinks = torch.empty_like(lse), torch.empty_like(lse)
    n_chosen = 0 if chosen is None else chosen.shape[-1]
    block_d, rotary, slots = padded(width), cos.shape[-1], raw_slots(window)
    for chunk in chunks_of(chunks):
        rows = chunk.end - chunk.begin
        first_entry = chunk.entry_begin // tiles.ALIGNED * tiles.ALIGNED
        entry_slots = chunk.entry_slots(None if chosen is None else n_chosen)
        do = x.new_empty(batch, rows, heads, width)
        ready_kernel[rows, triton.cdiv(heads, HEADS), batch](
            x, out, grad, cos, sin, grad_x, do, delta, sinks, lse, of_sinks,
            chunk.begin, rows, length, heads, heads // grad.shape[2], *grad.stride()[:3],
            eps, width, rotary, block_d, HEADS,
        )  # fmt: skip
        of_raw = x.new_empty(2, batch, rows, heads, slots)  # p and ds
        of_entries = x.new_empty(2, batch, rows, heads, entry_slots)
        tile = tiles.of(tiles.SCORES, x)
        block_heads = min(tile.heads, padded(heads))
        scores_kernel[rows, triton.cdiv(heads, block_heads), batch](
            grad_x, do, raw, entries, sight, chosen, lse, delta, *of_raw, *of_entries,
            chunk.begin, rows, length, heads, raw.shape[1], entries.shape[1], n_chosen,
            slots, entry_slots, first_entry, sight.shape[0], scale,
            D=width, BLOCK_D=block_d, HEADS=block_heads, KEYS=tile.keys, ALIGNED=tiles.ALIGNED,
            CHOSEN=chosen is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = tiles.of(tiles.KEYS_GRAD, x)
        columns = min(tile.columns, block_d)
        raw_blocks = in_blocks(chunk.raw_begin, chunk.raw_end) // tiles.ALIGNED
        entry_blocks = 0 if chosen is not None else entry_slots // tiles.ALIGNED
        keys_kernel[raw_blocks + entry_blocks, triton.cdiv(width, columns), batch](
            grad_x, do, *of_raw, *of_entries, sight, grad_raw, grad_entries,
            chunk.begin, rows, length, heads, raw.shape[1], entries.shape[1], slots, entry_slots,
            raw_blocks, chunk.raw_begin // tiles.ALIGNED * tiles.ALIGNED, first_entry,
            sight.shape[0], D=width, HEADS=min(tile.heads, padded(heads)), ALIGNED=tiles.ALIGNED,
            COLUMNS=columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if chosen is not None and n_chosen and chunk.entry_end > chunk.entry_begin:
            _sum_chosen(grad_x, do, of_entries, sight, grad_entries, chunk, chosen, in_order)
        tile = tiles.of(tiles.QUERIES_GRAD, x)
        block_heads, columns = min(tile.heads, padded(heads)), min(tile.columns, block_d)
        parts = triton.cdiv(heads, block_heads) * triton.cdiv(width, columns)
        queries_kernel[rows, parts, batch](
            raw, entries, sight, chosen, of_raw[1], of_entries[1], grad_x,
            chunk.begin, rows, length, heads, raw.shape[1], entries.shape[1], n_chosen,
            slots, entry_slots, first_entry, sight.shape[0],
            D=width, HEADS=block_heads, KEYS=tile.keys, ALIGNED=tiles.ALIGNED, COLUMNS=columns,
            CHOSEN=chosen is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    norm_rotate_backward_(grad_x, x, cos, sin, eps)
    return (
        grad_x,
        grad_raw.to(raw.dtype, copy=False),
        grad_entries.to(entries.dtype, copy=False),
        of_sinks.sum(dim=(0, 1)).to(sinks.dtype),
    )


def _sum_chosen(
    q: torch.Tensor,
    do: torch.Tensor,
    p_ds: torch.Tensor,
    sight: torch.Tensor,
    grad: torch.Tensor,
    chunk: Chunk,
    chosen: torch.Tensor,
    in_order: bool,
) -> None:
    """Add what a chunk gives to the entries that its queries chose."""
    batch, rows, heads, width = do.shape
    n_chosen = chosen.shape[-1]
    tile = tiles.of(tiles.CHOSEN_GRAD, q)
    columns = min(tile.columns, padded(width))
    to = grad.new_zeros(batch, rows, n_chosen, width) if in_order else grad
    chosen_kernel[rows, triton.cdiv(width, columns), batch](
        q, do, *p_ds, sight, chosen, to, chunk.begin, rows, sight.shape[1], heads,
        grad.shape[1], n_chosen, p_ds.shape[-1], sight.shape[0],
        D=width, HEADS=padded(heads), KEYS=tile.keys, COLUMNS=columns, IN_ORDER=in_order,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if in_order:
        where = chosen[:, chunk.begin : chunk.end].clamp(min=0).long().flatten(1)
        every = torch.arange(batch, device=q.device)[:, None]
        grad.index_put_((every, where), to.flatten(1, 2), accumulate=True)


@attend_backward_op.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    raw: torch.Tensor,
    entries: torch.Tensor,
    sinks: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(raw, memory_format=contiguous),
        torch.empty_like(entries, memory_format=contiguous),
        torch.empty_like(sinks, memory_format=contiguous),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, raw, entries, sinks, chosen, cos, sin, sight, *options = inputs
    ctx.set_materialize_grads(False)  # log Z takes none
    ctx.save_for_backward(x, raw, entries, sinks, chosen, cos, sin, sight, *output)
    ctx.options = options[:-1]  # the gradient shows the groups


def _backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    in_order = torch.are_deterministic_algorithms_enabled()
    grads = attend_backward_op(grad, *ctx.saved_tensors, *ctx.options, in_order)
    return (*grads, *[None] * 9)


attend_op.register_autograd(_backward, setup_context=_setup)

tell("dsv4_cp::attend")(attention_costs.forward_cost)
tell("dsv4_cp::attend_backward")(attention_costs.backward_cost)
register_flop_formula(torch.ops.dsv4_cp.attend)(attention_costs.forward_flops)
register_flop_formula(torch.ops.dsv4_cp.attend_backward)(attention_costs.backward_flops)


def attend(
    q_BLND: torch.Tensor,
    raw_BTD: torch.Tensor,
    entries_BPD: torch.Tensor,
    sinks_N: torch.Tensor,
    chosen_BLK: torch.Tensor | None,
    rope: tuple[torch.Tensor, torch.Tensor],
    *,
    plan: AttentionPlan,
    scale: float,
    eps: float,
    groups: int,
    workspace_bytes: int,
) -> torch.Tensor:
    """Norm and rotate queries, attend, rotate back; see :class:`Kernels`.

    Args:
        q_BLND: Queries as projected.
        raw_BTD: Raw keys in the plan's order.
        entries_BPD: Entries.
        sinks_N: Logit per head of the sink.
        chosen_BLK: Chosen entries, ``NOTHING`` in unused slots, which come last; None for all.
        rope: Cos and sin.
        plan: Which keys each query sees.
        scale: Score multiplier.
        eps: Of the norm.
        groups: How many groups the output shows the heads in.
        workspace_bytes: How much backward may store of a chunk of queries.

    Returns:
        [B, L, G, N / G * D] of the queries' dtype.
    """
    batch, _, heads, width = q_BLND.shape
    sizes: dict[str, Any] = {
        "batch": batch,
        "heads": heads,
        "width": width,
        "n_chosen": None if chosen_BLK is None else chosen_BLK.shape[-1],
        "itemsize": q_BLND.element_size(),
        "in_order": torch.are_deterministic_algorithms_enabled(),
        "workspace_bytes": workspace_bytes,
    }
    chunks = plan.queries.once(
        ("backward chunks", plan.window, plan.ratio, *sizes.values()),
        lambda: backward_chunks(plan, **sizes),
    )
    cos, sin = (part.expand(batch, -1, -1).contiguous() for part in rope)
    out: torch.Tensor = attend_op(
        q_BLND,
        raw_BTD.contiguous(),
        entries_BPD.contiguous(),
        sinks_N,
        None if chosen_BLK is None else chosen_BLK.contiguous(),
        cos,
        sin,
        plan.visible_ranges(q_BLND.device),
        chunks,
        plan.window,
        scale,
        eps,
        groups,
    )[0]
    return out
