# SPDX-License-Identifier: Apache-2.0
"""What one layer of a rank computes, receives and holds: its products, collectives and tensors.

``plan`` adds these up, and tests compare them with what ``bench`` profiles. Products count the
keys that a query sees, and padding at the end of a row. Rows hold one document. Left out, since
they are small or bound by memory: norms, rotary, pooling, top-k, hyper-connections and the router.
"""

# B batch rows   S global tokens, padded   L local tokens (S / R)   R CP ranks   W sliding window
# N attention heads   D head_dim   E hidden size   r compress ratio   C queries of a chunk
# P compressed entries (S / r)   K selected entries   T raw keys that a rank addresses
# A query rank (q_lora_rank)   G output groups times their rank   I index heads   F index width

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemo_dsv4_cp.kernels.reference.workspace import AttentionScratch, chunk_rows
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout, entries_seen
from nemo_dsv4_cp.sequence.plan import halo
from nemo_dsv4_cp.sequence.queries import Runs
from nemo_dsv4_cp.sequence.schedule import ATTENTION_PRODUCTS, QueryCost, Schedule
from nemo_dsv4_cp.tools.sizes import ModelSizes

AUTOMODEL = "automodel"
"""Name of AutoModel's own path, beside those of transports."""
BOUNDARY = "boundary"
ALL_GATHER = "all_gather"
TRANSPORTS = (BOUNDARY, ALL_GATHER)
PATHS = (*TRANSPORTS, AUTOMODEL)

Pass = Literal["forward", "repeated", "backward"]
"""A pass through a layer; ``repeated`` is the recomputation under activation checkpointing."""
PASSES: tuple[Pass, ...] = ("forward", "repeated", "backward")

Stage = Literal["shard", "index_queries", "project", "select", "attend"]
"""What computes a product: the shard's tokens, or for some queries a function of the layer."""

_BF16, _FP32, _INT32 = 2, 4, 4


@dataclass(frozen=True)
class Operation:
    """A matrix product of a layer, in multiply-adds per row of the batch.

    Attributes:
        name: The weights, or what is multiplied.
        rate: Which rate of a GPU applies.
        backward: 0 for what takes no gradient.
    """

    name: str
    stage: Stage
    rate: Literal["products", "float32", "kernels"]
    forward: int
    backward: int = 0

    @property
    def repeated(self) -> int:
        """In the recomputation, which keeps top-k indices and repeats what takes a gradient."""
        return self.forward if self.backward else 0

    @property
    def total(self) -> int:
        """In forward and backward."""
        return self.forward + self.backward


Operations = tuple[Operation, ...]


def _linear(
    name: str,
    stage: Stage,
    multiply_adds: int,
    rate: Literal["products", "float32"] = "products",
) -> Operation:
    """A product with weights: gradients of its input and of its weights in backward."""
    return Operation(name, stage, rate, multiply_adds, 2 * multiply_adds)


def _at_most(end: int, ratio: int, limit: int) -> int:
    """Return the entries that queries 0 .. end-1 see, at most ``limit`` each."""
    reached = min(end, max(limit * ratio - 1, 0))
    return entries_seen(range(reached), ratio) + (end - reached) * limit


def _seen(runs: Runs, ratio: int, limit: int) -> int:
    """Return the entries that the queries in ``runs`` see, at most ``limit`` each."""
    return sum(_at_most(run.stop, ratio, limit) - _at_most(run.start, ratio, limit) for run in runs)


def query_operations(sizes: ModelSizes, ratio: int, runs: Runs) -> Operations:
    """Return what the queries at the positions in ``runs`` take, wherever they are computed."""
    s, queries = sizes, sum(map(len, runs))
    per_head, index_width = s.num_attention_heads * s.head_dim, s.index_n_heads * s.index_head_dim
    visible = sum(entries_seen(run, ratio) for run in runs) if ratio else 0
    selects = ratio == OVERLAP_RATIO
    attended = _seen(runs, ratio, s.index_topk) if selects else visible
    keys = (_seen(runs, 1, s.sliding_window) + attended) * per_head
    forward, backward = ATTENTION_PRODUCTS
    operations = (
        _linear("wq_b", "project", queries * s.q_lora_rank * per_head),
        Operation("attention", "attend", "kernels", forward * keys, backward * keys),
        _linear(
            "wo_a and wo_b",
            "attend",
            queries * s.o_lora_rank * (per_head + s.o_groups * s.hidden_size),
        ),
    )
    if not selects:
        return operations
    projected = queries * s.q_lora_rank * index_width
    return (
        *operations,
        Operation("indexer.wq_b", "index_queries", "products", projected),
        Operation("index scores", "select", "kernels", visible * index_width),
    )


def _features(ratio: int) -> int:
    """Return the features [D] of a token: values and gates, of two windows where they overlap."""
    return 0 if not ratio else 4 if ratio == OVERLAP_RATIO else 2


def shard_operations(sizes: ModelSizes, ratio: int, tokens: int) -> Operations:
    """Return what the ``tokens`` of a shard take, which no other rank computes."""
    s, hidden = sizes, tokens * sizes.hidden_size
    experts = (s.num_experts_per_tok + s.n_shared_experts) * 3 * s.moe_intermediate_size
    operations = [
        _linear("wq_a and wkv", "shard", hidden * (s.q_lora_rank + s.head_dim)),
        _linear("experts", "shard", hidden * experts),
    ]
    if ratio:
        pooled = hidden * _features(ratio) * s.head_dim
        operations.append(_linear("compressor", "shard", pooled, "float32"))
    if ratio == OVERLAP_RATIO:
        pooled = hidden * _features(ratio) * s.index_head_dim
        operations += [
            Operation("indexer.compressor", "shard", "float32", pooled),
            Operation("indexer.weights_proj", "shard", "products", hidden * s.index_n_heads),
        ]
    return tuple(operations)


def head_operation(sizes: ModelSizes, tokens: int) -> Operation:
    """Return the language-model head's product for a shard of ``tokens``."""
    return _linear("lm_head", "shard", tokens * sizes.hidden_size * sizes.vocab_size)


def work_of_ranks(sizes: ModelSizes, schedules: Mapping[int, Schedule], tokens: int) -> list[int]:
    """Return the multiply-adds of each rank's forward and backward of one row, all layers.

    ``schedules`` are those of each compress ratio, ``tokens`` L.
    """

    def total(operations: Operations) -> int:
        return sum(operation.total for operation in operations)

    ranks = len(next(iter(schedules.values())).local)
    works = [head_operation(sizes, tokens).total] * ranks
    for ratio, layers in Counter(sizes.compress_ratios).items():
        shard, schedule = total(shard_operations(sizes, ratio, tokens)), schedules[ratio]
        for rank, runs in enumerate(zip(schedule.local, schedule.remote, strict=True)):
            queries = sum(total(query_operations(sizes, ratio, each)) for each in runs)
            works[rank] += layers * (shard + queries)
    return works


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
    def tokens(self) -> int:
        """B L, tokens of a rank."""
        return self.batch * self.layout.local_len

    @property
    def row_tokens(self) -> int:
        """B S, tokens of all ranks."""
        return self.batch * self.layout.seq_len


@dataclass(frozen=True)
class Collective:
    """Bytes that one collective of a layer brings a rank, whatever algorithm carries them.

    Attributes:
        name: ``"fetch"``: raw keys, features before the shard, and what remote queries need;
            ``"index_keys"``; ``"entries"``; ``"returned"``: the output of queries that another rank
            computed.
        forward: In forward.
        backward: Of their gradients, in backward.
        repeated: In the recomputation.
        from_all: Whether every rank receives the same from all ranks, as in an all-gather, instead
            of what it requests from a few.
        reduced: The part of ``backward`` that is summed on its way: float32, where ``from_all``.
    """

    name: str
    forward: int = 0
    backward: int = 0
    repeated: int = 0
    from_all: bool = True
    reduced: int = 0


def crossings(
    sizes: ModelSizes, shape: Shape, ratio: int, path: str, *, balanced: bool = False
) -> tuple[Collective, ...]:
    """Return what other ranks send to one layer of a rank with neighbors on both sides.

    Args:
        sizes: The model's sizes; activations are bfloat16, compressor features float32.
        shape: The batch and how it is cut.
        ratio: The layer's compress ratio.
        path: One of :data:`PATHS`.
        balanced: Whether half of the layer's queries are computed by another rank.

    Returns:
        The collectives in the order of forward. Nothing of the indexer crosses in backward, since
        it takes no gradient, nor in a recomputation, which keeps the top-k indices.
    """
    if shape.ranks == 1:
        return ()
    remote = shape.row_tokens - shape.tokens
    overlaps, cost = ratio == OVERLAP_RATIO, QueryCost.of(sizes, ratio)
    if path == BOUNDARY:
        keys = shape.batch * min(halo(sizes.sliding_window), shape.layout.start)
        # A window's predecessor: values and gates of its half.
        before, features = shape.batch * ratio, 2
    else:
        keys = remote
        # The values and gates of every token: the overlapping half with all_gather, both halves on
        # AutoModel's path.
        before, features = remote, 2 if path == ALL_GATHER else 4
    forward = backward = keys * cost.key
    index = reduced = 0
    if overlaps:
        reduced = before * features * sizes.head_dim * _FP32
        forward = backward = forward + reduced
        index = before * features * sizes.index_head_dim * _FP32
    returned = []
    if balanced and ratio and path != AUTOMODEL:
        moved = shape.batch * (shape.layout.local_len // 2)
        rows, key, before = remote, 0, 0  # every rank has the keys
        if path == BOUNDARY:  # the keys before the remote half come with it
            rows, key = moved, cost.key
            before = shape.batch * halo(sizes.sliding_window) * cost.key
        forward += rows * (cost.low_rank + key + cost.angles) + before
        backward += rows * (cost.low_rank + key) + before
        index += rows * cost.index_weights
        output = moved * cost.output
        returned = [Collective("returned", output, output, output, from_all=False)]
    fetch = Collective("fetch", forward + index, backward, forward, path != BOUNDARY, reduced)
    if not ratio:
        return (fetch,)
    entries = remote // ratio * sizes.head_dim * _BF16
    index_keys = remote // ratio * sizes.index_head_dim * _BF16
    return (
        fetch,
        *([Collective("index_keys", index_keys)] if overlaps else ()),
        Collective("entries", entries, entries, entries),
        *returned,
    )


def received_bytes(
    sizes: ModelSizes, shape: Shape, ratio: int, path: str, *, balanced: bool = False
) -> tuple[int, int]:
    """Return the bytes of all :func:`crossings` together, in forward and in backward."""
    collectives = crossings(sizes, shape, ratio, path, balanced=balanced)
    return sum(each.forward for each in collectives), sum(each.backward for each in collectives)


def attention_bytes(
    sizes: ModelSizes, shape: Shape, ratio: int, path: str, *, workspace_bytes: int
) -> int:
    """Return the peak memory of one attention layer's forward and backward on the last rank.

    It is the sum of the live tensors at each moment where the peak may lie, without load balancing:
    attention in two parts takes less. Parameters and input count where an operation keeps a view of
    them, as in ``bench memory``. AutoModel's is that of its TileLang kernels, ours that of the
    torch path with ``workspace_bytes`` of scratch. The others are those of :func:`crossings`.
    """
    s, tokens, rows = sizes, shape.tokens, shape.batch
    overlaps = ratio == OVERLAP_RATIO
    out_width = s.o_groups * s.o_lora_rank

    per_head = tokens * s.num_attention_heads * s.head_dim * _BF16  # [L, N, D]
    hidden = tokens * s.hidden_size * _BF16  # [L, E]
    low_rank = tokens * s.q_lora_rank * _BF16  # [L, A]
    key = tokens * s.head_dim * _BF16  # [L, D]
    lse = tokens * s.num_attention_heads * _FP32  # [L, N]
    grouped = tokens * out_width * _BF16  # [L, G], the output between its two projections

    wq_b = s.q_lora_rank * s.num_attention_heads * s.head_dim * _BF16
    outward = s.num_attention_heads * s.head_dim * s.o_lora_rank * _BF16  # wo_a
    outward += out_width * s.hidden_size * _BF16  # wo_b
    inward = s.hidden_size * (s.q_lora_rank + s.head_dim) * _BF16  # wq_a, wkv
    weights = wq_b + outward + inward

    feature_width = _features(ratio) * s.head_dim
    compressor = feature_width * s.hidden_size * _FP32  # wkv, wgate
    entries = shape.row_tokens // ratio * s.head_dim if ratio else 0  # [P, D]
    selected = min(s.index_topk, shape.layout.seq_len // ratio) if overlaps else 0

    if path == AUTOMODEL:
        # The mask before it is one: int64 positions' difference and two bools, [L, S] each. (At
        # R = 1 AutoModel builds it from [S, S] tensors of the same order.)
        elements = tokens * shape.layout.seq_len
        mask = elements * (8 + 1 + 1)
        # Backward through the per-head norm: six float32 [N, L, D]; then what the layer holds.
        held = 3 * hidden + 2 * low_rank + key + weights + outward
        norm = 6 * per_head * _FP32 // _BF16 + held + compressor * 2 + (hidden if ratio else 0)
        if not overlaps:
            return max(mask, norm)
        # Forward at ratio 4: masks [L, S], [L, P] and both joined; four [L, N, D], one in float32.
        masks = 2 * (elements + elements // ratio) * _BF16
        features = tokens * (s.hidden_size + 2 * feature_width) * _FP32
        return max(mask, norm, masks + 6 * per_head + held + features)

    raw = (tokens + rows * halo(s.sliding_window)) * s.head_dim

    # Between forward and backward: queries before their norm and after it, and the output.
    saved = 3 * per_head + grouped + 2 * hidden + 2 * low_rank + 2 * key + lse
    saved += weights + raw * _BF16
    if ratio:
        saved += compressor + tokens * s.hidden_size * _FP32  # the hidden states, in float32
        # What pooling multiplies, values and softmax: [n, 2 r, D] each with overlap, else the
        # features [L, 2 D] and [n, r, D].
        saved += (4 if overlaps else 3) * tokens * s.head_dim * _FP32
        saved += entries * _BF16 + tokens * selected * _INT32

    # 1. Backward through the output's projections: its gradient beside it.
    leaving = saved + per_head + hidden + outward

    # 2. Backward of the attention: the output is gone; its gradient turned back, the queries'
    # gradient and the keys' in float32, then either a chunk's scores or the keys' in bfloat16.
    chunk = _chunk_bytes(sizes, shape, ratio, selected, workspace_bytes)
    grads = (raw + entries) * _FP32 + max(chunk, (raw + entries) * _BF16)
    attending = saved - grouped + per_head + hidden + outward + grads

    # 3. Backward through the queries' norm: they and two gradients, four float32 chunks of rows;
    # the compressor has been through, its weights' gradients are there.
    norm_rows = min(per_head * _FP32 // _BF16, workspace_bytes // 4)
    held = 4 * hidden + 2 * low_rank + lse + weights + outward + inward + compressor * 2
    peak = max(leaving, attending, 3 * per_head + 4 * norm_rows + held)

    # 4. Whole rows: raw keys [S, D] bfloat16 and the overlapping half's features [S, 2 D] float32,
    # in forward with the index features, in backward their gradients.
    if path == ALL_GATHER and shape.ranks > 1:
        gathered, index = shape.row_tokens * s.head_dim * _BF16, 0
        if overlaps:
            gathered += shape.row_tokens * 2 * s.head_dim * _FP32
            index = shape.row_tokens * 2 * s.index_head_dim * _FP32
        local = tokens * (s.hidden_size + feature_width) * _FP32 + hidden + low_rank + key
        held = 3 * hidden + 2 * low_rank + lse + weights + outward + wq_b + compressor
        peak = max(peak, gathered + index + local, gathered + local + held)
    return peak


def _chunk_bytes(
    sizes: ModelSizes, shape: Shape, ratio: int, selected: int, workspace_bytes: int
) -> int:
    """Return what backward of the attention holds for one chunk of queries."""
    window = sizes.sliding_window
    scratch = AttentionScratch(
        heads=shape.batch * sizes.num_attention_heads,
        width=sizes.head_dim,
        raw=window + halo(window),
        entries=selected or (shape.layout.seq_len // ratio if ratio else 0),
        copied=shape.batch * selected,
        itemsize=_BF16,
    )
    rows = chunk_rows(scratch.backward, window, workspace_bytes, on_gpu=True)
    return min(rows, shape.layout.local_len) * scratch.backward


def stream_bytes(sizes: ModelSizes, shape: Shape) -> int:
    """Return the checkpointed inputs of all layers, [L, hc_mult, E] bfloat16 each."""
    return shape.tokens * sizes.hc_mult * sizes.hidden_size * _BF16 * sizes.num_hidden_layers
