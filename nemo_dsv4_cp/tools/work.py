# SPDX-License-Identifier: Apache-2.0
"""What a rank computes: multiply-adds, by counting what each query sees.

Rows of one document. What counts is what a token passes (the projections of attention, compression,
the experts chosen for it, the language-model head), the keys that a query sees and the indexer's
scores of them. What the causal view hides does not count, padding at the end of the row does.
Norms, rotary, pooling, top-k, hyper-connections and the router do not count: they are small, or
bound by memory.
"""

# i position of a query   r compress ratio   D head_dim   E hidden size

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, entries_seen
from nemo_dsv4_cp.sequence.queries import Runs
from nemo_dsv4_cp.sequence.schedule import Schedule
from nemo_dsv4_cp.tools.sizes import ModelSizes


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one thing that a layer does, of one row.

    Attributes:
        forward: In forward.
        backward: In backward, 0 for what takes no gradient.
    """

    forward: int
    backward: int

    @property
    def repeated(self) -> int:
        """Those of a checkpointed layer's recomputation: forward's, but for the index choice.

        That takes no gradient and is kept (``keep_index_choice``).
        """
        return self.forward if self.backward else 0

    @property
    def total(self) -> int:
        """Those of forward and backward."""
        return self.forward + self.backward


def _linear(multiply_adds: int) -> Count:
    """A matrix product with weights: gradients of its input and of its weights in backward."""
    return Count(multiply_adds, 2 * multiply_adds)


def _attention(multiply_adds: int) -> Count:
    """Products of queries and keys: two in forward; scores and four gradients in backward."""
    return Count(2 * multiply_adds, 5 * multiply_adds)


def _index(multiply_adds: int) -> Count:
    """What only the index choice reads."""
    return Count(multiply_adds, 0)


@dataclass(frozen=True)
class QueryWork:
    """What some queries of one layer take, wherever they are computed.

    Attributes:
        projection: ``wq_b``.
        index_projection: ``indexer.wq_b``.
        choice: Index scores of the entries that each query sees.
        attention: Keys of the window, and entries: all that a query sees, at ratio 4 the top-k.
        output: ``wo_a`` and ``wo_b``.
    """

    projection: Count
    index_projection: Count
    choice: Count
    attention: Count
    output: Count


@dataclass(frozen=True)
class ShardWork:
    """What a shard's own tokens take in one layer and never leave to another rank.

    Attributes:
        projections: ``wq_a`` and ``wkv``.
        compression: The compressor's ``wkv`` and ``wgate``, in float32.
        index_compression: The indexer's, in float32.
        index_weights: ``indexer.weights_proj``.
        experts: Those chosen for each token, and the shared ones.
    """

    projections: Count
    compression: Count
    index_compression: Count
    index_weights: Count
    experts: Count


@dataclass(frozen=True)
class LayerWork:
    """What one rank computes for one row in one layer.

    Attributes:
        kept: Queries of its own shard.
        taken: Queries of others' shards.
        shard: Its own tokens.
    """

    kept: QueryWork
    taken: QueryWork
    shard: ShardWork

    @property
    def total(self) -> int:
        """Multiply-adds of forward and backward."""
        counts: list[Count] = [
            count for part in (self.kept, self.taken, self.shard) for count in vars(part).values()
        ]
        return sum(count.total for count in counts)


def _at_most(end: int, ratio: int, limit: int) -> int:
    """Return the entries that queries 0 .. end-1 see, at most ``limit`` each."""
    reached = min(end, max(limit * ratio - 1, 0))
    return entries_seen(range(reached), ratio) + (end - reached) * limit


def _seen(runs: Runs, ratio: int, limit: int) -> int:
    """Return the entries that the queries in ``runs`` see, at most ``limit`` each."""
    return sum(_at_most(run.stop, ratio, limit) - _at_most(run.start, ratio, limit) for run in runs)


def query_work(sizes: ModelSizes, ratio: int, runs: Runs) -> QueryWork:
    """Return what the queries at some positions take in one layer.

    Args:
        sizes: The model's sizes.
        ratio: The layer's compress ratio.
        runs: Positions in the row.
    """
    s, queries = sizes, sum(map(len, runs))
    per_head, index_width = s.num_attention_heads * s.head_dim, s.index_n_heads * s.index_head_dim
    keys, scored = _seen(runs, 1, s.sliding_window), 0
    if ratio:
        entries = sum(entries_seen(run, ratio) for run in runs)
        if ratio == OVERLAP_RATIO:
            entries, scored = _seen(runs, ratio, s.index_topk), entries
        keys += entries
    chooses = ratio == OVERLAP_RATIO
    return QueryWork(
        projection=_linear(queries * s.q_lora_rank * per_head),
        index_projection=_index(queries * s.q_lora_rank * index_width * chooses),
        choice=_index(scored * index_width),
        attention=_attention(keys * per_head),
        output=_linear(queries * s.o_lora_rank * (per_head + s.o_groups * s.hidden_size)),
    )


def shard_work(sizes: ModelSizes, ratio: int, tokens: int) -> ShardWork:
    """Return what a shard's own tokens take in one layer.

    Args:
        sizes: The model's sizes.
        ratio: The layer's compress ratio.
        tokens: L, tokens in the shard.
    """
    s, overlaps = sizes, ratio == OVERLAP_RATIO
    # Values and gates, of two windows each where windows overlap.
    features = 0 if not ratio else 4 if overlaps else 2
    hidden = tokens * s.hidden_size
    experts = (s.num_experts_per_tok + s.n_shared_experts) * 3 * s.moe_intermediate_size
    return ShardWork(
        projections=_linear(hidden * (s.q_lora_rank + s.head_dim)),
        compression=_linear(hidden * features * s.head_dim),
        index_compression=_index(hidden * 4 * s.index_head_dim * overlaps),
        index_weights=_index(hidden * s.index_n_heads * overlaps),
        experts=_linear(hidden * experts),
    )


def head_work(sizes: ModelSizes, tokens: int) -> Count:
    """Return what the language-model head takes for a shard of ``tokens``."""
    return _linear(tokens * sizes.hidden_size * sizes.vocab_size)


def layer_work(
    sizes: ModelSizes, ratio: int, schedule: Schedule, rank: int, tokens: int
) -> LayerWork:
    """Return what one rank computes in one layer.

    Args:
        sizes: The model's sizes.
        ratio: The layer's compress ratio.
        schedule: Which rank computes which queries.
        rank: Whose work.
        tokens: L, tokens in its shard.
    """
    return LayerWork(
        kept=query_work(sizes, ratio, schedule.local[rank]),
        taken=query_work(sizes, ratio, schedule.remote[rank]),
        shard=shard_work(sizes, ratio, tokens),
    )


def work_of_ranks(sizes: ModelSizes, schedules: Mapping[int, Schedule], tokens: int) -> list[int]:
    """Return the multiply-adds of each rank's forward and backward of one row, all layers.

    Args:
        sizes: The model's sizes.
        schedules: Of each compress ratio, which rank computes which queries.
        tokens: L, tokens in a shard.
    """
    layers = Counter(sizes.compress_ratios)
    head = head_work(sizes, tokens).total
    return [
        head
        + sum(
            n * layer_work(sizes, ratio, schedules[ratio], rank, tokens).total
            for ratio, n in layers.items()
        )
        for rank in range(len(next(iter(schedules.values())).local))
    ]
