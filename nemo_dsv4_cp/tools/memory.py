# SPDX-License-Identifier: Apache-2.0
"""The peak memory of one attention layer of V4; V4.1's is in :mod:`nemo_dsv4_cp.tools.memory_v41`.

It is the sum of the live tensors at each moment where the peak may lie, without load balancing:
attention in two parts takes less. Parameters and input count where an operation keeps a view of
them, as in ``bench memory``. AutoModel's is that of its TileLang kernels, ours that of the torch
path.
"""

# S global tokens, padded   L local tokens (S / R)   R CP ranks   N attention heads   D head_dim
# E hidden size   P compressed entries (S / r)   K selected entries   r compress ratio
# T raw keys that a rank addresses   A query rank (q_lora_rank)   n local entries
# G output groups times their rank

from __future__ import annotations

from dataclasses import dataclass

from nemo_dsv4_cp.kernels.reference.workspace import AttentionScratch, chunk_rows
from nemo_dsv4_cp.sequence.plan import halo
from nemo_dsv4_cp.tools.crossings import ALL_GATHER, AUTOMODEL, BF16, FP32, INT32
from nemo_dsv4_cp.tools.inventory import Shape, features_of
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.sizes import ModelSizes


@dataclass(frozen=True)
class Tensors:
    """Bytes of tensors that layers of V4 and V4.1 have alike, in bfloat16 but for ``lse``.

    Attributes:
        per_head: Queries or outputs of all heads, [L, N, D].
        hidden: [L, E].
        low_rank: [L, A].
        key: [L, D].
        lse: Float32 [L, N].
        grouped: [L, G], the output between its two projections.
        wq_b: Weights of queries.
        outward: Of ``wo_a`` and ``wo_b``.
        inward: Of ``wq_a`` and ``wkv``.
        raw: Numbers of the raw keys [T, D], of which backward also holds float32 sums.
    """

    per_head: int
    hidden: int
    low_rank: int
    key: int
    lse: int
    grouped: int
    wq_b: int
    outward: int
    inward: int
    raw: int

    @classmethod
    def of(cls, sizes: ModelSizes, shape: Shape) -> Tensors:
        """Return those of a rank's layer."""
        s, tokens = sizes, shape.tokens
        all_heads, out_width = s.num_attention_heads * s.head_dim, s.o_groups * s.o_lora_rank
        return cls(
            per_head=tokens * all_heads * BF16,
            hidden=tokens * s.hidden_size * BF16,
            low_rank=tokens * s.q_lora_rank * BF16,
            key=tokens * s.head_dim * BF16,
            lse=tokens * s.num_attention_heads * FP32,
            grouped=tokens * out_width * BF16,
            wq_b=s.q_lora_rank * all_heads * BF16,
            outward=(all_heads * s.o_lora_rank + out_width * s.hidden_size) * BF16,
            inward=s.hidden_size * (s.q_lora_rank + s.head_dim) * BF16,
            raw=(tokens + shape.batch * halo(s.sliding_window)) * s.head_dim,
        )


def attention_bytes(
    sizes: ModelSizes, shape: Shape, layer: Layer, path: str, *, workspace_bytes: int
) -> int:
    """Return the peak memory of one attention layer of V4, forward and backward, on the last rank.

    The arguments are those of ``crossings.crossings``, and ``workspace_bytes`` of scratch.
    """
    s, tokens = sizes, shape.tokens
    ratio, overlaps = layer.ratio, layer.overlaps
    t = Tensors.of(sizes, shape)
    weights = t.wq_b + t.outward + t.inward

    feature_width = features_of(layer) * s.head_dim
    compressor = feature_width * s.hidden_size * FP32  # wkv, wgate
    entries = shape.row_tokens // ratio * s.head_dim if ratio else 0  # [P, D]
    selected = min(s.index_topk, shape.entries(ratio)) if overlaps else 0

    if path == AUTOMODEL:
        # The mask before it is one: int64 positions' difference and two bools, [L, S] each. (At
        # R = 1 AutoModel builds it from [S, S] tensors of the same order.)
        elements = tokens * shape.layout.seq_len
        mask = elements * (8 + 1 + 1)
        # Backward through the per-head norm: six float32 [N, L, D]; then what the layer holds.
        held = 3 * t.hidden + 2 * t.low_rank + t.key + weights + t.outward
        norm = 6 * t.per_head * FP32 // BF16 + held + compressor * 2 + (t.hidden if ratio else 0)
        if not overlaps:
            return max(mask, norm)
        # Forward at ratio 4: masks [L, S], [L, P] and both joined; four [L, N, D], one in float32.
        masks = 2 * (elements + elements // ratio) * BF16
        features = tokens * (s.hidden_size + 2 * feature_width) * FP32
        return max(mask, norm, masks + 6 * t.per_head + held + features)

    # Between forward and backward: queries before their norm and after it, and the output.
    saved = 3 * t.per_head + t.grouped + 2 * t.hidden + 2 * t.low_rank + 2 * t.key + t.lse
    saved += weights + t.raw * BF16
    if ratio:
        saved += compressor + tokens * s.hidden_size * FP32  # the t.hidden states, in float32
        # What pooling multiplies, values and softmax: [n, 2 r, D] each with overlap, else the
        # features [L, 2 D] and [n, r, D].
        saved += (4 if overlaps else 3) * tokens * s.head_dim * FP32
        saved += entries * BF16 + tokens * selected * INT32
    if layer.loss:
        saved += _loss_bytes(sizes, shape, layer)

    # 1. Backward through the output's projections: its gradient beside it.
    leaving = saved + t.per_head + t.hidden + t.outward

    # 2. Backward of the attention: the output is gone; its gradient turned back, the queries'
    # gradient and the keys' in float32, then either a chunk's scores or the keys' in bfloat16.
    chunk = chunk_bytes(sizes, shape, ratio, selected, workspace_bytes)
    grads = (t.raw + entries) * FP32 + max(chunk, (t.raw + entries) * BF16)
    attending = saved - t.grouped + t.per_head + t.hidden + t.outward + grads

    # 3. Backward through the queries' norm: they and two gradients, four float32 chunks of rows;
    # the compressor has been through, its weights' gradients are there.
    norm_rows = min(t.per_head * FP32 // BF16, workspace_bytes // 4)
    held = 4 * t.hidden + 2 * t.low_rank + t.lse + weights + t.outward + t.inward + compressor * 2
    peak = max(leaving, attending, 3 * t.per_head + 4 * norm_rows + held)

    # 4. Whole rows: raw keys [S, D] bfloat16 and the overlapping half's features [S, 2 D] float32,
    # in forward with the index features, in backward their gradients.
    if path == ALL_GATHER and shape.ranks > 1:
        gathered, index = shape.row_tokens * s.head_dim * BF16, 0
        if overlaps:
            gathered += shape.row_tokens * 2 * s.head_dim * FP32
            index = shape.row_tokens * 2 * s.index_head_dim * FP32
        local = tokens * (s.hidden_size + feature_width) * FP32 + t.hidden + t.low_rank + t.key
        held = 3 * t.hidden + 2 * t.low_rank + t.lse + weights + t.outward + t.wq_b + compressor
        peak = max(peak, gathered + index + local, gathered + local + held)
    return peak


def _loss_bytes(sizes: ModelSizes, shape: Shape, layer: Layer) -> int:
    """Return what the indexer's loss keeps for backward."""
    tokens, heads, width = shape.tokens, sizes.index_n_heads, sizes.index_head_dim
    gradients = tokens * heads * (width * BF16 + FP32)  # of index queries and their weights
    gradients += shape.batch * shape.entries(layer.ratio) * width * BF16  # of index keys
    pooled = 4 * tokens * width * FP32  # values and softmax [n, 2 r, F]
    projections = sizes.q_lora_rank * heads * width * BF16
    projections += features_of(layer) * width * sizes.hidden_size * FP32
    return gradients + pooled + projections + sizes.hidden_size * heads * BF16


def chunk_bytes(
    sizes: ModelSizes, shape: Shape, ratio: int, selected: int, workspace_bytes: int
) -> int:
    """Return what backward of the attention holds for one chunk of queries."""
    window = sizes.sliding_window
    scratch = AttentionScratch(
        heads=shape.batch * sizes.num_attention_heads,
        width=sizes.head_dim,
        raw=window + halo(window),
        entries=selected or shape.entries(ratio),
        copied=shape.batch * selected,
        itemsize=BF16,
    )
    rows = chunk_rows(scratch.backward, window, workspace_bytes, on_gpu=True)
    return min(rows, shape.layout.local_len) * scratch.backward


def stream_bytes(sizes: ModelSizes, shape: Shape) -> int:
    """Return the checkpointed inputs of all layers, [L, hc_mult, E] bfloat16 each."""
    return shape.tokens * sizes.hc_mult * sizes.hidden_size * BF16 * sizes.num_hidden_layers
