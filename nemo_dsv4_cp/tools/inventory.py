# SPDX-License-Identifier: Apache-2.0
"""What one layer of a rank computes: its products. What it receives is in ``crossings``.

``plan`` adds these up, and tests compare them with what ``bench`` profiles. Products count the
keys that a query sees, and padding at the end of a row; in V4.1, a layer that selects inside
candidates scores these alone, as the Triton kernels do. Rows hold one document. Left out, since
they are small or bound by memory: norms, rotary, pooling, top-k, hyper-connections and the router.
"""

# B batch rows   S global tokens, padded   L local tokens (S / R)   R CP ranks   D head_dim

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemo_dsv4_cp.kernels.operations import INSIDE
from nemo_dsv4_cp.sequence.layout import SequenceLayout, entries_seen
from nemo_dsv4_cp.sequence.queries import Runs
from nemo_dsv4_cp.sequence.schedule import ATTENTION_PRODUCTS, Schedule
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.sizes import ModelSizes, ModelSizesV41

Pass = Literal["forward", "repeated", "backward"]
"""A pass through a layer; ``repeated`` is the recomputation under activation checkpointing."""
PASSES: tuple[Pass, ...] = ("forward", "repeated", "backward")

Stage = Literal["shard", "index_queries", "project", "select", "attend"]
"""What computes a product: the shard's tokens, or for some queries a function of the layer."""

Rate = Literal["products", "float32", "kernels"]


@dataclass(frozen=True)
class Operation:
    """A matrix product of a layer, in multiply-adds per row of the batch.

    Attributes:
        name: The weights, or what is multiplied.
        rate: Which rate of a GPU applies.
        backward: 0 for what takes no gradient.
        repeats: Whether a recomputation repeats it also then.
    """

    name: str
    stage: Stage
    rate: Rate
    forward: int
    backward: int = 0
    repeats: bool = False

    @property
    def repeated(self) -> int:
        """In the recomputation, which keeps top-k indices and repeats what takes a gradient."""
        return self.forward if self.backward or self.repeats else 0

    @property
    def total(self) -> int:
        """In forward and backward."""
        return self.forward + self.backward


Operations = tuple[Operation, ...]


def _linear(
    name: str,
    stage: Stage,
    multiply_adds: int,
    rate: Rate = "products",
) -> Operation:
    """A product with weights: gradients of its input and of its weights in backward."""
    return Operation(name, stage, rate, multiply_adds, 2 * multiply_adds)


def _at_most(end: int, ratio: int, limit: int | None) -> int:
    """Return the entries that queries 0 .. end-1 see, at most ``limit`` each."""
    if limit is None:
        return entries_seen(range(end), ratio)
    reached = min(end, max(limit * ratio - 1, 0))
    return entries_seen(range(reached), ratio) + (end - reached) * limit


def _seen(runs: Runs, ratio: int, limit: int | None) -> int:
    """Return the entries that the queries in ``runs`` see, at most ``limit`` each."""
    if not ratio:
        return 0
    return sum(_at_most(run.stop, ratio, limit) - _at_most(run.start, ratio, limit) for run in runs)


def query_operations(sizes: ModelSizes, layer: Layer, runs: Runs) -> Operations:
    """Return what the queries at the positions in ``runs`` take, wherever they are computed."""
    s, queries = sizes, sum(map(len, runs))
    per_head = s.num_attention_heads * s.head_dim
    limit = s.index_topk if layer.attends_to_selected else None
    keys = (_seen(runs, 1, s.sliding_window) + _seen(runs, layer.ratio, limit)) * per_head
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
    if not layer.selects:
        return operations
    projected = queries * s.q_lora_rank * s.index_n_heads * s.index_head_dim
    return (
        *operations,
        _of_indexer(layer, "indexer.wq_b", "index_queries", "products", projected),
        _scores(sizes, layer, runs),
        *([_loss(sizes, layer, runs)] if layer.loss else ()),
    )


def _of_indexer(layer: Layer, name: str, stage: Stage, rate: Rate, products: int) -> Operation:
    """Return a product with the indexer's weights, which take a gradient if they have a loss."""
    return Operation(name, stage, rate, products, products if layer.loss else 0)


def _loss(sizes: ModelSizes, layer: Layer, runs: Runs) -> Operation:
    """Return the indexer's loss with its gradient, as Triton computes it.

    Attention's scores twice, for their log-sum-exp and for what goes to each entry; index scores,
    and the gradients of index queries and keys.
    """
    entries = _seen(runs, layer.ratio, sizes.index_topk if layer.loss == "sparse" else None)
    attended = _seen(runs, 1, sizes.sliding_window) + 2 * entries
    products = attended * sizes.num_attention_heads * sizes.head_dim
    products += 3 * entries * sizes.index_n_heads * sizes.index_head_dim
    return Operation("indexer loss", "attend", "kernels", products, repeats=True)


def _scores(sizes: ModelSizes, layer: Layer, runs: Runs) -> Operation:
    """Return the scores of the entries among which a layer selects for the queries in ``runs``."""
    limit = None
    if isinstance(sizes, ModelSizesV41) and layer.selects == INSIDE:
        limit = sizes.candidate_topk_blocks * sizes.candidate_block_size
    scored = _seen(runs, layer.ratio, limit) * sizes.index_n_heads * sizes.index_head_dim
    return Operation("index scores", "select", "kernels", scored)


def operations_of_queries(
    sizes: ModelSizes, layer: Layer, schedule: Schedule, shape: Shape, rank: int
) -> dict[str, Operations]:
    """Return what a rank computes for ``"local"`` and for ``"remote"`` queries."""
    local, remote = schedule.local[rank], schedule.remote[rank]
    if not layer.shares:
        return {
            "local": query_operations(sizes, layer, local),
            "remote": query_operations(sizes, layer, remote),
        }
    # V4.1 moves nothing but top-k selection.
    own = query_operations(sizes, layer, (shape.layout.shard(rank),))
    if not schedule.moves:
        return {"local": own, "remote": ()}
    stays = (each for each in own if each.stage != "select")
    return {
        "local": (*stays, _scores(sizes, layer, local)),
        "remote": (_scores(sizes, layer, remote),),
    }


def features_of(layer: Layer) -> int:
    """Return the features [D] of a token: values and gates, of two windows where they overlap."""
    if not layer.makes_entries or layer.ratio == 1:  # of one token there is nothing to weigh
        return int(layer.makes_entries)
    return 4 if layer.overlaps else 2


def shard_operations(sizes: ModelSizes, layer: Layer, tokens: int) -> Operations:
    """Return what the ``tokens`` of a shard take, which no other rank computes."""
    s, hidden = sizes, tokens * sizes.hidden_size
    experts = (s.num_experts_per_tok + s.n_shared_experts) * 3 * s.moe_intermediate_size
    operations = [
        _linear("wq_a and wkv", "shard", hidden * (s.q_lora_rank + s.head_dim)),
        _linear("experts", "shard", hidden * experts),
    ]
    if layer.makes_entries:
        pooled = hidden * features_of(layer) * s.head_dim
        rate: Rate = "products" if layer.ratio == 1 else "float32"
        operations.append(_linear("compressor", "shard", pooled, rate))
    if layer.overlaps:
        pooled = hidden * features_of(layer) * s.index_head_dim
        operations.append(_of_indexer(layer, "indexer.compressor", "shard", "float32", pooled))
    elif layer.makes_entries and layer.selects:
        keys = tokens // layer.ratio * s.head_dim * s.index_head_dim
        operations.append(Operation("indexer.wk", "shard", "products", keys))
    if layer.selects:
        weights = hidden * s.index_n_heads
        projection = _of_indexer(layer, "indexer.weights_proj", "shard", "products", weights)
        operations.append(projection)
    return tuple(operations)


def head_operation(sizes: ModelSizes, tokens: int) -> Operation:
    """Return the language-model head's product for a shard of ``tokens``."""
    return _linear("lm_head", "shard", tokens * sizes.hidden_size * sizes.vocab_size)


def engram_operation(sizes: ModelSizes, tokens: int) -> Operation:
    """Return the products of V4.1's Engram layers, all together, for a shard of ``tokens``.

    One projects what the n-grams of a token look up to a key per stream and a value.
    """
    products = 0
    if isinstance(sizes, ModelSizesV41):
        found = (sizes.engram_max_ngram_size - 1) * sizes.engram_n_heads * sizes.engram_head_dim
        made = sizes.hidden_size * (sizes.hc_mult + 1)
        products = len(sizes.engrams) * tokens * found * made
    return _linear("engram", "shard", products)


def work_of_ranks(
    sizes: ModelSizes, schedules: Mapping[Layer, Schedule], shape: Shape
) -> list[int]:
    """Return the multiply-adds of each rank's forward and backward of one row, all layers.

    ``schedules`` are those of each kind of layer.
    """

    def total(operations: Operations) -> int:
        return sum(operation.total for operation in operations)

    tokens = shape.layout.local_len
    beside = total((head_operation(sizes, tokens), engram_operation(sizes, tokens)))
    works = [beside] * shape.ranks
    for layer, layers in Counter(sizes.layers).items():
        shard = total(shard_operations(sizes, layer, tokens))
        for rank in range(shape.ranks):
            queries = operations_of_queries(sizes, layer, schedules[layer], shape, rank)
            works[rank] += layers * (shard + sum(map(total, queries.values())))
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

    @property
    def remote_tokens(self) -> int:
        """Tokens of the other ranks."""
        return self.row_tokens - self.tokens

    def entries(self, ratio: int) -> int:
        """Return P, the compressed entries of one row."""
        return self.layout.seq_len // ratio if ratio else 0
