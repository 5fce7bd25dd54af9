# SPDX-License-Identifier: Apache-2.0
"""Attention as one operation, forward and backward.

Forward norms and rotates the queries into the memory of the output, attends there and rotates
back: three launches, or four without norm, for queries that are copied and rotated. Backward goes
through chunks of queries whose probabilities fit the workspace, four launches each, or five where
entries are selected or their gradients summed in parts: few, and each large.
"""

# B batch rows   L queries   N heads   D head_dim   T raw keys   P entries   K selected entries
# r rotary dims   C queries of a chunk   G groups of heads

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from nemo_dsv4_cp.kernels.costs import register_cost
from nemo_dsv4_cp.kernels.triton import attention_costs, tiles
from nemo_dsv4_cp.kernels.triton.attention_backward import (
    keys_kernel,
    queries_kernel,
    ready_kernel,
    scores_kernel,
    selected_kernel,
    sum_parts_kernel,
)
from nemo_dsv4_cp.kernels.triton.attention_forward import LOG2E, forward_kernel
from nemo_dsv4_cp.kernels.triton.chunks import Chunk, chunks_of, in_blocks, raw_slots
from nemo_dsv4_cp.kernels.triton.norm_rotate import (
    HEADS,
    norm_rotate_backward_kernel,
    norm_rotate_kernel,
    padded,
    rotate_,
)


@torch.library.custom_op("dsv4_cp::attend", mutates_args=())
def attend_op(
    x: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor, sinks: torch.Tensor,
    selected: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, ranges: torch.Tensor,
    chunks: list[int], window: int, scale: float, eps: float | None, groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the output [B, L, G, N / G * D], rotated back, and log Z, float32 [B, L, N].

    Args:
        x: Queries as projected [B, L, N, D].
        raw: Raw keys [B, T, D].
        entries: Entries [B, P, D].
        sinks: [N].
        selected: Int32 [B, L, K], -1 in unused slots, which come last; None for all past entries.
        cos: [B, L, r].
        sin: As ``cos``.
        ranges: Int32 [B or 1, L, 4] of :meth:`AttentionPlan.visible_ranges`.
        chunks: Of :func:`backward_chunks`.
        window: W.
        scale: Score multiplier.
        eps: Of the norm; None without.
        groups: G.
    """
    x = x.contiguous()
    batch, length, heads, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    lse = x.new_empty(x.shape[:3], dtype=torch.float32)
    tile = tiles.of(tiles.FORWARD, x)
    block_heads, block_d = min(tile.heads, padded(heads)), padded(width)
    if eps is None:
        rotate_(out.copy_(x), cos, sin)
    else:
        rows = HEADS if x.element_size() == 2 else HEADS // 2  # Triton 3.6 spills 8 of float32
        norm_rotate_kernel[batch * length, triton.cdiv(heads, rows)](
            x, cos, sin, out, heads, eps, width, cos.shape[-1], block_d, rows
        )
    forward_kernel[length, triton.cdiv(heads, block_heads), batch](
        out, raw, entries, sinks, ranges, selected, out, lse, length, heads, raw.shape[1],
        entries.shape[1], 0 if selected is None else selected.shape[-1], ranges.shape[0],
        scale * LOG2E.value, D=width, BLOCK_D=block_d, HEADS=block_heads, KEYS=tile.keys,
        SELECTED=selected is not None, BRANCH=tile.branch, num_warps=tile.warps,
        num_stages=tile.stages_of(selected),
    )  # fmt: skip
    rotate_(out, cos, sin, sign=-1.0)
    return out.view(batch, length, groups, -1), lse


@attend_op.register_fake
def _(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, width = x.shape
    groups = others[-1]
    out = x.new_empty(batch, length, groups, heads // groups * width)
    return out, x.new_empty(x.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dsv4_cp::attend_backward", mutates_args=())
def attend_backward_op(
    grad: torch.Tensor, x: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor,
    sinks: torch.Tensor, selected: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
    ranges: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, chunks: list[int], window: int,
    scale: float, eps: float | None, in_order: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, raw, entries and sinks, summed in float32."""
    grad_entries = torch.zeros_like(entries, dtype=torch.float32)
    grad_x, grad_raw, grad_sinks = _backward_adding(
        grad, x, raw, entries, sinks, selected, cos, sin, ranges, out, lse, chunks, window, scale,
        eps, in_order, grad_entries,
    )  # fmt: skip
    return grad_x, grad_raw, grad_entries.to(entries.dtype, copy=False), grad_sinks


@torch.library.custom_op("dsv4_cp::attend_backward_adding", mutates_args=("grad_entries",))
def attend_backward_adding_op(
    grad: torch.Tensor, x: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor,
    sinks: torch.Tensor, selected: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
    ranges: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, chunks: list[int], window: int,
    scale: float, eps: float | None, in_order: bool, grad_entries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, raw and sinks; add that of entries to float32 [B, P, D]."""
    return _backward_adding(
        grad, x, raw, entries, sinks, selected, cos, sin, ranges, out, lse, chunks, window, scale,
        eps, in_order, grad_entries,
    )  # fmt: skip


def _backward_adding(
    grad: torch.Tensor, x: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor,
    sinks: torch.Tensor, selected: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
    ranges: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, chunks: list[int], window: int,
    scale: float, eps: float | None, in_order: bool, grad_entries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, raw and sinks, and add that of entries."""
    batch, length, heads, width = x.shape
    x = x.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_x = torch.empty_like(x)
    grad_raw = torch.zeros_like(raw, dtype=torch.float32)
    delta, of_sinks = torch.empty_like(lse), torch.empty_like(lse)
    n_selected = 0 if selected is None else selected.shape[-1]
    block_d, slots = padded(width), raw_slots(window)
    rotary = cos.shape[-1]
    for chunk in chunks_of(chunks):
        rows = chunk.end - chunk.begin
        first_entry = chunk.entry_begin // tiles.ALIGNED * tiles.ALIGNED
        entry_slots = chunk.entry_slots(None if selected is None else n_selected)
        # The memory of the gradient holds the queries of a chunk until it is known.
        q, do = grad_x, x.new_empty(batch, rows, heads, width)
        ready_kernel[rows, triton.cdiv(heads, HEADS), batch](
            x, out, grad, cos, sin, q, do, delta, sinks, lse, of_sinks,
            chunk.begin, rows, length, heads, heads // grad.shape[2], *grad.stride()[:3],
            eps or 0.0, width, rotary, block_d, HEADS, NORM=eps is not None,
        )  # fmt: skip
        of_raw = x.new_empty(2, batch, rows, heads, slots)  # p and ds
        of_entries = x.new_empty(2, batch, rows, heads, entry_slots)
        tile = tiles.of(tiles.SCORES, x)
        block_heads = min(tile.heads, padded(heads))
        scores_kernel[rows, triton.cdiv(heads, block_heads), batch](
            q, do, raw, entries, ranges, selected, lse, delta, *of_raw, *of_entries,
            chunk.begin, rows, length, heads, raw.shape[1], entries.shape[1], n_selected,
            slots, entry_slots, first_entry, ranges.shape[0], scale,
            D=width, BLOCK_D=block_d, HEADS=block_heads, KEYS=tile.keys, ALIGNED=tiles.ALIGNED,
            SELECTED=selected is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        entry_blocks = 0 if selected is not None else entry_slots // tiles.ALIGNED
        _sum_keys(q, do, of_raw, of_entries, ranges, grad_raw, grad_entries, chunk, entry_blocks)
        if selected is not None and n_selected and chunk.entry_end > chunk.entry_begin:
            _sum_selected(q, do, of_entries, ranges, grad_entries, chunk, selected, in_order)
        tile = tiles.of(tiles.QUERIES_GRAD, x)
        block_heads, columns = min(tile.heads, padded(heads)), min(tile.columns, block_d)
        parts = triton.cdiv(heads, block_heads) * triton.cdiv(width, columns)
        queries_kernel[rows, parts, batch](
            raw, entries, ranges, selected, of_raw[1], of_entries[1], grad_x,
            chunk.begin, rows, length, heads, raw.shape[1], entries.shape[1], n_selected,
            slots, entry_slots, first_entry, ranges.shape[0],
            D=width, HEADS=block_heads, KEYS=tile.keys, ALIGNED=tiles.ALIGNED, COLUMNS=columns,
            SELECTED=selected is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        del do, of_raw, of_entries  # or the next chunk's would be there beside them
    if eps is None:
        rotate_(grad_x, cos, sin, sign=-1.0)
    else:
        norm_rotate_backward_kernel[batch * length, triton.cdiv(heads, HEADS)](
            x, cos, sin, grad_x, heads, eps, width, rotary, block_d, HEADS
        )
    return (
        grad_x,
        grad_raw.to(raw.dtype, copy=False),
        of_sinks.sum(dim=(0, 1)).to(sinks.dtype),
    )


def _sum_keys(
    q: torch.Tensor, do: torch.Tensor, of_raw: torch.Tensor, of_entries: torch.Tensor,
    ranges: torch.Tensor, grad_raw: torch.Tensor, grad_entries: torch.Tensor, chunk: Chunk,
    entry_blocks: int,
) -> None:  # fmt: skip
    """Add what a chunk gives to raw keys, and to entries in blocks."""
    (batch, rows, heads, width), n_entries = do.shape, grad_entries.shape[1]
    tile, parts, entry_slots = tiles.of(tiles.KEYS_GRAD, q), chunk.parts, of_entries.shape[-1]
    columns = min(tile.columns, padded(width))
    raw_blocks = in_blocks(chunk.raw_begin, chunk.raw_end) // tiles.ALIGNED
    first_entry = chunk.entry_begin // tiles.ALIGNED * tiles.ALIGNED
    partial = grad_entries
    if parts > 1:
        partial = grad_entries.new_empty(batch, parts, entry_slots, width)
    keys_kernel[raw_blocks + entry_blocks * parts, triton.cdiv(width, columns), batch](
        q, do, *of_raw, *of_entries, ranges, grad_raw, grad_entries, partial, chunk.begin, rows,
        ranges.shape[1], heads, grad_raw.shape[1], n_entries, of_raw.shape[-1], entry_slots,
        raw_blocks, chunk.raw_begin // tiles.ALIGNED * tiles.ALIGNED, first_entry, parts,
        ranges.shape[0], D=width, HEADS=min(tile.heads, padded(heads)), ALIGNED=tiles.ALIGNED,
        COLUMNS=columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        sum_parts_kernel[triton.cdiv(entry_slots, HEADS), batch](
            partial, grad_entries, n_entries, first_entry, parts, entry_slots,
            D=width, BLOCK_D=padded(width), ROWS=HEADS,
        )  # fmt: skip


def _sum_selected(
    q: torch.Tensor, do: torch.Tensor, p_ds: torch.Tensor, ranges: torch.Tensor,
    grad: torch.Tensor, chunk: Chunk, selected: torch.Tensor, in_order: bool,
) -> None:  # fmt: skip
    """Add what a chunk gives to the entries selected for its queries."""
    batch, rows, heads, width = do.shape
    n_selected = selected.shape[-1]
    tile = tiles.of(tiles.SELECTED_GRAD, q)
    columns = min(tile.columns, padded(width))
    to = grad.new_zeros(batch, rows, n_selected, width) if in_order else grad
    selected_kernel[rows, triton.cdiv(width, columns), batch](
        q, do, *p_ds, ranges, selected, to, chunk.begin, rows, ranges.shape[1], heads,
        grad.shape[1], n_selected, p_ds.shape[-1], ranges.shape[0],
        D=width, HEADS=padded(heads), KEYS=tile.keys, COLUMNS=columns, IN_ORDER=in_order,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if in_order:
        add_in_order(grad, to, selected, chunk)


def add_in_order(
    grad: torch.Tensor, of_slots: torch.Tensor, selected: torch.Tensor, chunk: Chunk
) -> None:
    """Add what a chunk gives to its selected entries, [B, C, K, ...], to ``grad`` [B, P, ...]."""
    where = selected[:, chunk.begin : chunk.end].clamp(min=0).long().flatten(1)
    every = torch.arange(len(grad), device=grad.device)[:, None]
    grad.index_put_((every, where), of_slots.flatten(1, 2), accumulate=True)


@attend_backward_op.register_fake
def _(grad: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in inputs[:4])


@attend_backward_adding_op.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor,
    sinks: torch.Tensor, *_: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (x, raw, sinks))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, raw, entries, sinks, selected, cos, sin, ranges, *options = inputs
    ctx.set_materialize_grads(False)  # log Z takes none
    ctx.save_for_backward(x, raw, entries, sinks, selected, cos, sin, ranges, *output)
    ctx.options = options[:-1]  # the gradient shows the groups


def _backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    in_order = torch.are_deterministic_algorithms_enabled()
    grads = attend_backward_op(grad, *ctx.saved_tensors, *ctx.options, in_order)
    return (*grads, *[None] * 9)


attend_op.register_autograd(_backward, setup_context=_setup)


class AttendAdding(torch.autograd.Function):
    """``attend_op`` whose entries have their gradient added to a sum that other layers share."""

    @staticmethod
    def forward(
        ctx: Any, grad_entries: Callable[[], torch.Tensor], *inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what ``attend_op`` does; ``grad_entries`` returns the sum in backward."""
        output: tuple[torch.Tensor, torch.Tensor] = attend_op(*inputs)
        ctx.grad_entries = grad_entries
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, raw and sinks."""
        in_order = torch.are_deterministic_algorithms_enabled()
        grad_x, grad_raw, grad_sinks = attend_backward_adding_op(
            grad, *ctx.saved_tensors, *ctx.options, in_order, ctx.grad_entries()
        )
        return None, grad_x, grad_raw, None, grad_sinks, *[None] * 9


register_cost("dsv4_cp::attend")(attention_costs.forward_cost)
register_flop_formula(torch.ops.dsv4_cp.attend)(attention_costs.forward_flops)
for _name in ("attend_backward", "attend_backward_adding"):
    register_cost(f"dsv4_cp::{_name}")(attention_costs.backward_cost)
    register_flop_formula(getattr(torch.ops.dsv4_cp, _name))(attention_costs.backward_flops)
