# SPDX-License-Identifier: Apache-2.0
"""What one layer of a rank receives from other ranks: its collectives, in bytes.

``plan`` adds these up, and tests compare them with what ``bench`` profiles. Rows hold one document.
"""

# B batch rows   S global tokens, padded   L local tokens (S / R)   R CP ranks   D head_dim

from __future__ import annotations

from dataclasses import dataclass

from nemo_dsv4_cp.kernels.operations import CANDIDATES
from nemo_dsv4_cp.kernels.reference.cache_formats import MXFP4, NVFP4
from nemo_dsv4_cp.sequence.plan import halo
from nemo_dsv4_cp.sequence.schedule import Cost, QueryCost, SelectionCost
from nemo_dsv4_cp.tools.inventory import Shape
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.sizes import ModelSizes, ModelSizesV41

AUTOMODEL = "automodel"
"""Name of AutoModel's own path, beside those of transports."""
BOUNDARY = "boundary"
ALL_GATHER = "all_gather"
TRANSPORTS = (BOUNDARY, ALL_GATHER)
PATHS = (*TRANSPORTS, AUTOMODEL)

BF16, FP32, INT32, INT64 = 2, 4, 4, 8


@dataclass(frozen=True)
class Collective:
    """Bytes that one collective of a layer brings a rank, whatever algorithm carries them.

    Attributes:
        name: ``"fetch"``: raw keys, features before the shard, and what remote queries need;
            ``"index_keys"``; ``"entries"``; ``"index_queries"`` that V4.1 selects for elsewhere;
            ``"returned"``: the output of queries that another rank computed, or what it selected.
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


def query_cost(sizes: ModelSizes, layer: Layer) -> Cost | None:
    """Return what a query costs that balance may move; None where V4.1 moves none."""
    if not layer.shares:
        return QueryCost.of(sizes, layer.ratio)
    if not layer.moves:
        return None
    return SelectionCost.of(
        sizes,
        head_bytes=MXFP4.bytes_of(sizes.index_head_dim),
        chooses_candidates=layer.selects == CANDIDATES,
    )


def crossings(
    sizes: ModelSizes, shape: Shape, layer: Layer, path: str, *, balanced: bool = False
) -> tuple[Collective, ...]:
    """Return what other ranks send to one layer of a rank with neighbors on both sides.

    Args:
        sizes: The model's sizes; activations are bfloat16, V4's compressor features float32.
        shape: The batch and how it is cut.
        layer: The kind of layer.
        path: One of :data:`PATHS`.
        balanced: Whether half of the layer's queries are computed by another rank; in V4.1,
            whether another rank selects for them.

    Returns:
        The collectives in the order of forward. Without a loss of the indexer, nothing of it
        crosses in backward, since it takes no gradient, and in a recomputation, which keeps the
        top-k indices, index keys cross only in V4.1.
    """
    if shape.ranks == 1:
        return ()
    if layer.shares:
        return _crossings_v41(sizes, shape, layer, path, balanced=balanced)
    remote, ratio = shape.remote_tokens, layer.ratio
    trained = bool(layer.loss) and path != AUTOMODEL
    cost = QueryCost.of(sizes, ratio)
    if path == BOUNDARY:
        # A window's predecessor: values and gates of its half.
        before, features = shape.batch * ratio, 2
    else:
        # The values and gates of every token: the overlapping half with all_gather, both halves on
        # AutoModel's path.
        before, features = remote, 2 if path == ALL_GATHER else 4
    forward = backward = _raw_keys(sizes, shape, path) * cost.key
    index = reduced = share = 0
    if layer.overlaps:
        reduced = before * features * sizes.head_dim * FP32
        forward = backward = forward + reduced
        index = before * features * sizes.index_head_dim * FP32
        reduced += index if trained else 0
    returned = []
    if balanced and layer.moves and path != AUTOMODEL:
        moved = shape.batch * (shape.layout.local_len // 2)
        rows, key, before = remote, 0, 0  # every rank has the keys
        if path == BOUNDARY:  # the keys before the remote half come with it
            rows, key = moved, cost.key
            before = shape.batch * halo(sizes.sliding_window) * cost.key
        forward += rows * (cost.low_rank + key + cost.angles) + before
        backward += rows * (cost.low_rank + key) + before
        index += rows * cost.index_weights
        share = rows * FP32 if trained else 0  # what a query weighs in the loss
        output = moved * cost.output
        returned = [Collective("returned", output, output, output, from_all=False)]
    repeated, brought = forward, forward + index + share
    if trained:
        backward, repeated = backward + index, brought
    fetch = Collective("fetch", brought, backward, repeated, path != BOUNDARY, reduced)
    if not ratio:
        return (fetch,)
    entries = remote // ratio * sizes.head_dim * BF16
    index_keys = remote // ratio * sizes.index_head_dim * BF16
    gradient = index_keys if trained else 0
    return (
        fetch,
        *([Collective("index_keys", index_keys, gradient, gradient)] if layer.overlaps else ()),
        Collective("entries", entries, entries, entries),
        *returned,
    )


def _raw_keys(sizes: ModelSizes, shape: Shape, path: str) -> int:
    """Return how many raw keys a rank receives: those before its shard, or all."""
    if path == BOUNDARY:
        return shape.batch * min(halo(sizes.sliding_window), shape.layout.start)
    return shape.remote_tokens


def _crossings_v41(
    sizes: ModelSizes, shape: Shape, layer: Layer, path: str, *, balanced: bool
) -> tuple[Collective, ...]:
    """Return :func:`crossings` of a layer of V4.1: entries cross only where they are made."""
    remote, whole = shape.remote_tokens, path == AUTOMODEL
    keys = _raw_keys(sizes, shape, path) * sizes.head_dim * BF16
    # AutoModel gathers a byte with each key and each entry: whether it is padding.
    gathered = keys + (remote if whole else 0)
    found = [Collective("fetch", gathered, keys, gathered, path != BOUNDARY)]
    if layer.makes_entries:
        count, gradient = remote // layer.ratio, sizes.head_dim * BF16
        if whole:
            entry, index_key = gradient + 1, sizes.index_head_dim * BF16
        else:
            entry, index_key = NVFP4.bytes_of(sizes.head_dim), MXFP4.bytes_of(sizes.index_head_dim)
        found += [
            Collective("index_keys", count * index_key, 0, count * index_key),
            Collective("entries", count * entry, count * gradient, count * entry),
        ]
    cost = query_cost(sizes, layer)
    if balanced and not whole and isinstance(cost, SelectionCost):
        moved, entries = shape.batch * (shape.layout.local_len // 2), shape.entries(layer.ratio)
        sent = (moved if path == BOUNDARY else remote) * (cost.queries + cost.index_weights)
        returned = min(cost.selected, entries * INT32)
        if cost.candidates:
            returned += candidate_blocks(sizes, entries) * INT32
        found += [
            Collective("index_queries", sent, from_all=path != BOUNDARY),
            Collective("returned", moved * returned, from_all=False),
        ]
    return tuple(found)


def candidate_blocks(sizes: ModelSizes, entries: int) -> int:
    """Return how many candidate blocks V4.1 keeps for a query of a row of ``entries``."""
    assert isinstance(sizes, ModelSizesV41)
    return min(sizes.candidate_topk_blocks, -(-entries // sizes.candidate_block_size))


def engram_bytes(sizes: ModelSizes, shape: Shape, path: str) -> int:
    """Return what a step receives for V4.1's n-grams: token ids, and which of them are real."""
    if shape.ranks == 1 or not isinstance(sizes, ModelSizesV41) or not sizes.engrams:
        return 0
    if path != BOUNDARY:
        return shape.remote_tokens * (INT64 + 1)
    before = min(sizes.engram_max_ngram_size - 1, shape.layout.start)
    return shape.batch * before * 2 * INT64  # rows of several tensors are aligned


def received_bytes(
    sizes: ModelSizes, shape: Shape, layer: Layer, path: str, *, balanced: bool = False
) -> tuple[int, int]:
    """Return the bytes of all :func:`crossings` together, in forward and in backward."""
    collectives = crossings(sizes, shape, layer, path, balanced=balanced)
    return sum(each.forward for each in collectives), sum(each.backward for each in collectives)
