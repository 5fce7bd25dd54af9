# SPDX-License-Identifier: Apache-2.0
"""Bytes and memory of a layer, as sums of named tensors, by arithmetic alone.

They are what ``bench bytes`` and ``bench memory`` weigh.
"""

# B batch rows   S global tokens, padded   L local tokens (S / R)   R CP ranks   W sliding window
# N attention heads   D head_dim   E hidden size   r compress ratio
# P compressed entries (S / r)   K selected entries   T raw keys that a rank addresses
# A query rank (q_lora_rank)   G output groups times their rank   C queries of a chunk

from __future__ import annotations

from dataclasses import dataclass

from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.schedule import QueryCost
from nemo_dsv4_cp.tools.paths import ALL_GATHER, AUTOMODEL, BOUNDARY
from nemo_dsv4_cp.tools.sizes import ModelSizes

_BF16, _FP32, _INT32 = 2, 4, 4
_WORKSPACE_BYTES = 256 << 20
"""What the torch path's chunks take of ``context_parallel.workspace_mib`` as the package sets it.
"""


@dataclass(frozen=True)
class Shape:
    """A batch and how it is cut.

    Attributes:
        layout: Positions of the last rank, which sees the most.
        batch: B, rows.
    """

    layout: SequenceLayout
    batch: int = 1

    @property
    def ranks(self) -> int:
        """R, number of CP ranks."""
        return self.layout.cp_size

    @property
    def halo(self) -> int:
        """Tokens before the last rank's shard."""
        return self.layout.start


@dataclass(frozen=True)
class Crossing:
    """Bytes that one collective of a layer brings a rank, whatever algorithm carries them.

    Attributes:
        forward: In forward.
        backward: Of their gradients, in backward.
        repeated: In the recomputation of a checkpointed layer.
        from_all: Whether every rank receives the same of all ranks, as a gather brings it; else
            each what it asks a few for.
    """

    forward: int = 0
    backward: int = 0
    repeated: int = 0
    from_all: bool = True


@dataclass(frozen=True)
class LayerCrossings:
    """What crosses for one layer, in the order of forward.

    Attributes:
        fetch: Raw keys, features before the shard, and what queries computed here bring.
        index_keys: The indexer's finished entries.
        entries: Finished entries.
        home: Output of queries that were computed elsewhere.
    """

    fetch: Crossing
    index_keys: Crossing
    entries: Crossing
    home: Crossing


def crossings(
    sizes: ModelSizes, shape: Shape, ratio: int, path: str, *, balanced: bool = False
) -> LayerCrossings:
    """Return what other ranks send to one layer of a rank with neighbours on both sides.

    Args:
        sizes: The model's sizes; activations are bfloat16, compressor features float32.
        shape: The batch and how it is cut.
        ratio: The layer's compress ratio.
        path: One of ``paths.PATHS``.
        balanced: Whether half of the layer's queries are computed by another rank.

    Returns:
        Backward carries nothing of the indexer, which takes no gradient. A recomputation repeats
        the forward's, less the indexer's.
    """
    nothing = Crossing()
    if shape.ranks == 1:
        return LayerCrossings(nothing, nothing, nothing, nothing)
    remote = shape.batch * (shape.layout.seq_len - shape.layout.local_len)  # tokens
    overlaps, width, index_width = ratio == OVERLAP_RATIO, sizes.head_dim, sizes.index_head_dim
    key, home_width = width * _BF16, sizes.hidden_size * _BF16
    if path == BOUNDARY:
        keys = shape.batch * min(sizes.sliding_window - 1, shape.halo) * key
        # A window's predecessor: values and gates of its half, [r, 2 D] float32.
        before, halves = shape.batch * ratio, 2
    else:
        keys = remote * key  # every raw key
        # The values and gates of every token: the overlapping half [S, 2 D] with all_gather,
        # both halves [S, 4 D] on AutoModel's path.
        before, halves = remote, 2 if path == ALL_GATHER else 4
    if not overlaps:
        before = 0
    forward = backward = keys + before * halves * width * _FP32
    index = before * halves * index_width * _FP32  # forward alone, and not repeated
    home = nothing
    if balanced and ratio and path != AUTOMODEL:
        moved, cost = shape.batch * (shape.layout.local_len // 2), QueryCost.of(sizes, ratio)
        returned = moved * home_width
        home = Crossing(returned, returned, returned, from_all=False)
        weights = sizes.index_n_heads * _FP32 if overlaps else 0
        there, back = cost.sent_forward - home_width - weights, cost.sent_backward - home_width
        if path == BOUNDARY:  # the keys before the half that is taken come with it
            rows, halo = moved, shape.batch * (sizes.sliding_window - 1) * key
        else:  # every rank has the keys; the other rows of every token's query
            rows, halo, there, back = remote, 0, there - key, back - key
        forward, backward = forward + rows * there + halo, backward + rows * back + halo
        index += rows * weights
    # Finished entries [P, D], and for CSA index keys, of the other ranks.
    finished = remote // ratio * width * _BF16 if ratio else 0
    index_keys = remote // ratio * index_width * _BF16 if overlaps else 0
    return LayerCrossings(
        fetch=Crossing(forward + index, backward, forward, from_all=path != BOUNDARY),
        index_keys=Crossing(forward=index_keys),
        entries=Crossing(finished, finished, finished),
        home=home,
    )


def received_bytes(
    sizes: ModelSizes, shape: Shape, ratio: int, path: str, *, balanced: bool = False
) -> tuple[int, int]:
    """Return the bytes of all :func:`crossings` together, in forward and in backward."""
    layer = crossings(sizes, shape, ratio, path, balanced=balanced)
    every = (layer.fetch, layer.index_keys, layer.entries, layer.home)
    return sum(each.forward for each in every), sum(each.backward for each in every)


def attention_bytes(sizes: ModelSizes, shape: Shape, ratio: int, path: str) -> int:
    """Return the peak memory of one attention layer's forward and backward on the last rank.

    Without balance: a rank that attends its queries in two halves takes less.

    Its tensors at each of the moments where the peak may lie; parameters and input count where an
    operation keeps a view of them, as ``bench memory`` counts them. AutoModel's is of its TileLang
    kernels.

    Args:
        sizes: The model's sizes; activations are bfloat16, compressor features float32.
        shape: The batch and how it is cut.
        ratio: The layer's compress ratio.
        path: One of ``paths.PATHS``.

    Returns:
        Bytes.
    """
    s, tokens, rows = sizes, shape.batch * shape.layout.local_len, shape.batch
    row_tokens = rows * shape.layout.seq_len
    compresses, overlaps = ratio > 0, ratio == OVERLAP_RATIO
    out_width = s.o_groups * s.o_lora_rank

    per_head = tokens * s.num_attention_heads * s.head_dim * _BF16  # [L, N, D]
    hidden = tokens * s.hidden_size * _BF16  # [L, E]
    low_rank = tokens * s.q_lora_rank * _BF16  # [L, A]
    key = tokens * s.head_dim * _BF16  # [L, D]
    lse = tokens * s.num_attention_heads * _FP32  # [L, N]
    grouped = tokens * out_width * _BF16  # [L, G], the output between its two projections

    wq_b = s.q_lora_rank * s.num_attention_heads * s.head_dim * _BF16
    wo_a = s.num_attention_heads * s.head_dim * s.o_lora_rank * _BF16
    wo_b = out_width * s.hidden_size * _BF16
    inward = s.hidden_size * (s.q_lora_rank + s.head_dim) * _BF16  # wq_a, wkv
    weights = wq_b + wo_a + wo_b + inward

    # Features of a token: values and gates, float32, D wide each, twice that where windows overlap.
    feature_width = (4 if overlaps else 2) * s.head_dim
    compressor = feature_width * s.hidden_size * _FP32 if compresses else 0  # wkv, wgate
    entry_count = row_tokens // ratio if compresses else 0
    entries = entry_count * s.head_dim  # [P, D]
    selected = min(s.index_topk, shape.layout.seq_len // ratio) if overlaps else 0

    if path == AUTOMODEL:
        # The mask before it is one: int64 positions' difference and two bools, [L, S] each. (At
        # R = 1 AutoModel builds it from [S, S] tensors of the same order.)
        elements = tokens * shape.layout.seq_len
        mask = elements * (8 + 1 + 1)
        # Backward through the per-head norm: six float32 [N, L, D]; then what the layer holds.
        held = 3 * hidden + 2 * low_rank + key + weights + wo_a + wo_b
        norm = 6 * per_head * _FP32 // _BF16 + held + compressor * 2 + (hidden if compresses else 0)
        # Forward at ratio 4: masks [L, S], [L, P] and both joined; four [L, N, D], one in float32.
        masks = 2 * (elements + tokens * shape.layout.seq_len // ratio) * _BF16 if overlaps else 0
        features = tokens * (s.hidden_size + 2 * feature_width) * _FP32
        joined = masks + 6 * per_head + held + features if overlaps else 0
        return max(mask, norm, joined)

    if path == ALL_GATHER and shape.ranks > 1:
        raw = rows * (shape.layout.seq_len + s.sliding_window - 1) * s.head_dim  # [T, D]
    else:
        raw = (tokens + rows * (s.sliding_window - 1)) * s.head_dim

    # Between forward and backward: queries before their norm and after it, and the output.
    saved = 3 * per_head + grouped + 2 * hidden + 2 * low_rank + 2 * key + lse
    saved += weights + raw * _BF16
    if compresses:
        saved += compressor + tokens * s.hidden_size * _FP32  # the hidden states, in float32
        # What pooling multiplies, values and softmax: [n, 2 r, D] each with overlap, else the
        # features [L, 2 D] and [n, r, D].
        saved += (4 if overlaps else 3) * tokens * s.head_dim * _FP32
        saved += entries * _BF16 + tokens * selected * _INT32

    # 1. Backward through the output's projections: its gradient beside it.
    leaving = saved + per_head + hidden + wo_a + wo_b

    # 2. Backward of the attention: the output is gone; its gradient turned back, the queries'
    # gradient and the keys' in float32, then either a chunk's scores or the keys' in bfloat16.
    chunk = _chunk_bytes(sizes, shape, ratio, selected)
    grads = (raw + entries) * _FP32 + max(chunk, (raw + entries) * _BF16)
    attending = saved - grouped + per_head + hidden + wo_a + wo_b + grads

    # 3. Backward through the queries' norm: they and two gradients, four float32 chunks of rows;
    # the compressor has been through, its weights' gradients are there.
    norm_rows = min(per_head * _FP32 // _BF16, _WORKSPACE_BYTES)
    held = 4 * hidden + 2 * low_rank + lse + weights + wo_a + wo_b + inward + compressor * 2
    norming = 3 * per_head + 4 * norm_rows + held
    peak = max(leaving, attending, norming)

    # 4. Backward of a gather of the overlapping half's features [S, 2 D] float32: their gradient,
    # the same cut by rank; the queries and their gradient and the raw keys' in bfloat16.
    if path == ALL_GATHER and overlaps and shape.ranks > 1:
        gathered = 2 * row_tokens * 2 * s.head_dim * _FP32
        local = tokens * (s.hidden_size + feature_width) * _FP32
        held = 3 * hidden + 2 * low_rank + lse + weights + wo_a + wo_b + compressor
        peak = max(peak, gathered + raw * _BF16 + 2 * per_head + local + held)
    return peak


def _chunk_bytes(sizes: ModelSizes, shape: Shape, ratio: int, selected: int) -> int:
    """Return what backward of the attention holds for one chunk of queries."""
    heads, width = shape.batch * sizes.num_attention_heads, sizes.head_dim
    if selected:  # sparse_attention.py counts the copied entries like scores
        seen = selected * (1 + width // sizes.num_attention_heads)
    else:
        seen = shape.layout.seq_len // ratio if ratio else 0
    window = 2 * sizes.sliding_window
    rows = _WORKSPACE_BYTES // (4 * heads * (window + seen) * _FP32)
    rows = max(1, min(rows, sizes.sliding_window, shape.layout.local_len))
    # Scores, probabilities, their gradients: five [C, N, W + entries]; for CSA, chosen entries
    # [C, K, D] and their gradient in bfloat16 and in float32.
    scores = 5 * rows * heads * (window + (selected or seen)) * _FP32
    return scores + rows * shape.batch * selected * width * (_BF16 + _BF16 + _FP32)


def stream_bytes(sizes: ModelSizes, shape: Shape) -> int:
    """Return the checkpointed inputs of all layers, [L, hc_mult, E] bfloat16 each."""
    tokens = shape.batch * shape.layout.local_len
    return tokens * sizes.hc_mult * sizes.hidden_size * _BF16 * sizes.num_hidden_layers
