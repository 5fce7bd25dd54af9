# SPDX-License-Identifier: Apache-2.0
"""The peak memory of one attention layer of V4.1, and what its layers hand on.

As in :mod:`nemo_dsv4_cp.tools.memory`, which is V4's. What a layer receives from the layers before
it counts where the layer keeps a view of it.
"""

# S global tokens, padded   L local tokens (S / R)   N attention heads   D head_dim   E hidden size
# P compressed entries (S / r)   n local entries   K selected entries   M candidate blocks
# I index heads   F index width   r compress ratio

from __future__ import annotations

from nemo_dsv4_cp.kernels.operations import ALL_ENTRIES, CANDIDATES, INSIDE
from nemo_dsv4_cp.tools.crossings import AUTOMODEL, BF16, FP32, INT32, INT64, candidate_blocks
from nemo_dsv4_cp.tools.inventory import Shape
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.memory import Tensors, chunk_bytes
from nemo_dsv4_cp.tools.sizes import ModelSizesV41

_ALIGNED = 64
"""AutoModel pads the indices of a query's keys to a multiple of this."""


def attention_bytes(
    sizes: ModelSizesV41, shape: Shape, layer: Layer, path: str, *, workspace_bytes: int
) -> int:
    """Return the peak memory of one attention layer, forward and backward, on the last rank.

    The arguments are those of ``crossings.crossings``, and ``workspace_bytes`` of scratch.
    """
    t, ratio = Tensors.of(sizes, shape), layer.ratio
    # Backward through the output's projections is done: what it leaves, and what waits for more.
    held = 3 * t.hidden + 5 * t.low_rank + t.wq_b + 2 * t.outward + t.inward + t.lse
    held += _kept_by_source(sizes, shape, layer)
    if layer.selects:
        held += sizes.q_lora_rank * sizes.index_n_heads * sizes.index_head_dim * BF16
    entries = shape.batch * shape.entries(ratio) * sizes.head_dim  # [P, D]
    angles = shape.tokens * sizes.qk_rope_head_dim * FP32
    if path == AUTOMODEL:
        return _automodels_bytes(sizes, shape, layer, held + 4 * t.key + 2 * angles)

    selected = min(sizes.index_topk, shape.entries(ratio))
    held += 3 * t.per_head + 5 * t.key + t.raw * BF16 + 3 * angles
    held += shape.tokens * selected * INT32
    if ratio:  # the entries, and the sum of their gradients over the layers that share them
        held += entries * (BF16 + FP32)
    if layer.selects:
        held += shape.batch * shape.entries(ratio) * sizes.index_head_dim * BF16
    if layer.selects in (CANDIDATES, INSIDE):
        held += shape.tokens * candidate_blocks(sizes, shape.entries(ratio)) * INT32
    # Backward of the attention: float32 gradients of raw keys, then either a chunk's scores or
    # those gradients in bfloat16.
    chunk = chunk_bytes(sizes, shape, ratio, selected, workspace_bytes)
    return held + t.raw * FP32 + max(chunk, t.raw * BF16)


def _kept_by_source(sizes: ModelSizesV41, shape: Shape, layer: Layer) -> int:
    """Return what making entries keeps for backward, on every path."""
    if not layer.makes_entries:
        return 0
    tokens, width = shape.tokens, sizes.head_dim
    kept = 2 * tokens // layer.ratio * width * FP32  # of the norm [n, D]
    kept += tokens // layer.ratio * sizes.qk_rope_head_dim * FP32
    weights = sizes.hidden_size * width
    if layer.ratio == 1:  # a projection in bfloat16
        return kept + weights * BF16
    # Hidden states, values and softmax of the gates, and both weights, all in float32.
    return kept + 2 * (tokens * sizes.hidden_size + tokens * width + weights) * FP32


def _automodels_bytes(sizes: ModelSizesV41, shape: Shape, layer: Layer, held: int) -> int:
    t, entries = Tensors.of(sizes, shape), shape.entries(layer.ratio)
    keys = (shape.layout.seq_len + entries) * shape.batch * sizes.head_dim  # [S + P, D]
    slots = min(sizes.sliding_window, shape.layout.seq_len)
    slots += min(sizes.index_topk, entries)
    indices = shape.tokens * -(-slots // _ALIGNED) * _ALIGNED * INT32
    made = of_state = 0
    if layer.makes_entries:  # beside them the gradient of the layers that share them
        made = shape.batch * entries * (sizes.head_dim + sizes.index_head_dim) * BF16
        of_state = made + shape.batch * entries * sizes.head_dim * BF16
    if layer.selects:
        of_state += shape.tokens * min(sizes.index_topk, entries) * INT64
    if layer.selects == CANDIDATES:
        of_state += shape.tokens * entries  # a mask
    # Backward of the output's rotation; of the attention, with float32 gradients of the keys.
    rotating = held + 5 * t.per_head + keys * BF16 + indices + of_state
    attending = held + 4 * t.per_head + keys * (FP32 + 2 * BF16) + indices + of_state + t.lse
    if not layer.selects:
        return max(rotating, attending)
    # Forward of the selection: bfloat16 scores [L, P] and a mask; beside them the indices, or
    # padded scores and the best of each block, or the scores inside candidates and another mask.
    scores = shape.tokens * entries * (BF16 + 1)
    if layer.selects == ALL_ENTRIES:
        scores += shape.tokens * min(sizes.index_topk, entries) * 3 * INT64
    else:
        scores += shape.tokens * entries * (BF16 + (layer.selects == INSIDE))
    if layer.selects == CANDIDATES:
        scores += shape.tokens * -(-entries // sizes.candidate_block_size) * BF16
    queries = shape.tokens * sizes.index_n_heads * sizes.index_head_dim * BF16
    raw = shape.batch * shape.layout.seq_len * sizes.head_dim * BF16
    before = held - 2 * (t.hidden + t.outward) - t.lse
    return max(rotating, attending, before + scores + t.per_head + raw + made + queries)


def carried_bytes(sizes: ModelSizesV41, shape: Shape, path: str, layer: int) -> int:
    """Return what else a rank holds while a layer's backward runs: the state of other layers.

    A checkpointed layer keeps the state that it received. So those of all layers before this one
    are there; on AutoModel's path also the gradient of the entries that layers after it share with
    it, which :func:`attention_bytes` counts on ours, as it counts the entries of this layer.
    """
    held, index_key = 0, sizes.index_head_dim * BF16
    whole, entry = path == AUTOMODEL, sizes.head_dim * BF16
    mine, after = sizes.layers[layer], sizes.layers[layer + 1 : layer + 2]
    reads = mine.ratio and not mine.makes_entries
    for kind in sizes.layers[:layer]:
        entries = shape.entries(kind.ratio)
        if kind.makes_entries:
            held += shape.batch * entries * (entry + index_key + whole)
        if kind.selects:
            selected = min(sizes.index_topk, entries)
            held += shape.tokens * selected * (INT64 if whole else INT32)
        if kind.selects == CANDIDATES:
            blocks = candidate_blocks(sizes, entries) * INT32
            held += shape.tokens * (entries if whole else blocks)  # a mask of entries
    of_mine = shape.batch * shape.entries(mine.ratio) * entry
    if whole and reads and after and not after[0].makes_entries:
        held += of_mine
    return held if whole or not reads else held - of_mine
