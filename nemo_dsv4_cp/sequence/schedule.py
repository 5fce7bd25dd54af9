# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which queries of a compressing layer.

Contiguous shards make the last rank compute the most: a query sees the entries of all tokens before
it. Tokens stay with their shard; queries move, inside the layer, so that every rank computes as
many of them as it owns and all see about as many entries.

Rows of one document: rank k of R computes the first half of its own shard and the second half of
rank R - 1 - k's. Entries grow with the position, so every rank sees (2k) + (2R - 1 - 2k) halves'.
Packed rows: blocks of queries change places between the rank that sees the most and the one that
sees the least, until all are near the mean.

Pure arithmetic on what every rank knows, so all ranks come to the same schedule without a word.
"""

# S global tokens   L local tokens   R CP ranks

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout, once_a_layout
from nemo_dsv4_cp.sequence.packed_layout import PackedLayout
from nemo_dsv4_cp.sequence.queries import Runs

BLOCKS = 32
"""Blocks that a packed shard's queries move in: of 16,384 tokens 512 each. More balance better, and
each brings W - 1 raw keys of its own."""

LAUNCH_SECONDS = 200e-6
"""What the launches of two more exchanges take: some forty each way."""


class _Rates(Protocol):
    """What a GPU computes and receives, as :class:`nemo_dsv4_cp.gpus.Gpu` has it."""

    @property
    def kernels_per_second(self) -> float: ...
    def exchange_seconds(self, received: float, ranks: int) -> float: ...


class _Sizes(Protocol):
    """The fields of a ``DeepseekV4Config`` that a query's cost depends on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def qk_rope_head_dim(self) -> int: ...
    @property
    def q_lora_rank(self) -> int: ...
    @property
    def index_n_heads(self) -> int: ...
    @property
    def index_head_dim(self) -> int: ...


ATTENTION_PRODUCTS = (2, 5)
"""Products of queries and keys in forward and in backward: the scores are computed again there."""


@dataclass(frozen=True)
class QueryCost:
    """What one query of a layer costs; bytes cross where another rank computes it.

    Attributes:
        flops_per_entry: Floating-point operations per visible entry, forward and backward.
        low_rank: Bytes of its low-rank query, in bfloat16 as all activations.
        key: Of its raw key.
        angles: Of its cos and sin.
        index_weights: Of its index heads' weights, float32.
        output: Of the layer's output.
    """

    flops_per_entry: int
    low_rank: int
    key: int
    angles: int
    index_weights: int
    output: int

    @classmethod
    def of(cls, sizes: _Sizes, ratio: int) -> QueryCost:
        """Return the cost in a layer of a model.

        At ratio 4 it is the indexer's scores that grow with the visible entries, in forward alone;
        else the products of attention.
        """
        overlaps = ratio == OVERLAP_RATIO
        product = 2 * sizes.num_attention_heads * sizes.head_dim
        scores = 2 * sizes.index_n_heads * sizes.index_head_dim
        return cls(
            flops_per_entry=scores if overlaps else sum(ATTENTION_PRODUCTS) * product,
            low_rank=2 * sizes.q_lora_rank,
            key=2 * sizes.head_dim,
            angles=2 * 2 * sizes.qk_rope_head_dim,
            index_weights=4 * sizes.index_n_heads if overlaps else 0,
            output=2 * sizes.hidden_size,
        )

    @property
    def sent_forward(self) -> int:
        """Bytes that cross in forward for a query computed elsewhere."""
        return self.sent_backward + self.angles + self.index_weights

    @property
    def sent_backward(self) -> int:
        """Bytes of their gradients."""
        return self.low_rank + self.key + self.output


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which queries each rank computes, all as many.

    Attributes:
        kept: Of each rank, those of its own shard, ascending runs.
        taken: Of each rank, those of other ranks' shards.
    """

    kept: tuple[Runs, ...]
    taken: tuple[Runs, ...]

    @property
    def moves(self) -> bool:
        """Whether any query is computed elsewhere."""
        return any(self.taken)


@once_a_layout
def contiguous(layout: SequenceLayout) -> Schedule:
    """Let every rank compute the queries of its own shard."""
    ranks = range(layout.cp_size)
    return Schedule(tuple((layout.shard(rank),) for rank in ranks), ((),) * layout.cp_size)


@once_a_layout
def balanced(layout: SequenceLayout, ratio: int) -> Schedule:
    """Let every rank's queries see about as many entries.

    Args:
        layout: Positions; any rank's.
        ratio: Compress ratio of the layer.
    """
    if isinstance(layout, PackedLayout):
        return _by_blocks(layout, ratio)
    halves, last = [], layout.cp_size - 1
    for rank in range(layout.cp_size):
        shard = layout.shard(rank)
        middle = shard.start + (len(shard) + 1) // 2
        halves.append((range(shard.start, middle), range(middle, shard.stop)))
    return Schedule(
        tuple((first,) for first, _ in halves),
        tuple((halves[last - rank][1],) for rank in range(layout.cp_size)),
    )


@once_a_layout
def schedule_of(
    layout: SequenceLayout, ratio: int, balance: str, cost: QueryCost, rates: _Rates
) -> Schedule:
    """Return the schedule that an option asks for.

    Args:
        layout: Positions.
        ratio: Compress ratio of the layer.
        balance: ``"on"``, ``"off"``, or ``"auto"`` for whichever ends sooner: the time that the
            busiest rank is spared against what its exchanges take, as if they hid behind nothing.
        cost: What the layer's queries cost.
        rates: Of the GPU that ``"auto"`` decides for.
    """
    stay = contiguous(layout)
    # A shard of one token has no half to give.
    if balance == "off" or layout.cp_size == 1 or layout.local_len < 2:
        return stay
    move = balanced(layout, ratio)
    if balance == "on":
        return move
    spared = max(entries_seen(layout, stay, ratio)) - max(entries_seen(layout, move, ratio))
    moved = max(sum(map(len, runs)) for runs in move.taken) * layout.rows
    sent = moved * (cost.sent_forward + cost.sent_backward)
    exchanged = rates.exchange_seconds(sent, layout.cp_size) + LAUNCH_SECONDS
    return move if spared * cost.flops_per_entry / rates.kernels_per_second > exchanged else stay


def entries_seen(layout: SequenceLayout, schedule: Schedule, ratio: int) -> list[int]:
    """Return how many entries each rank's queries see, query by query."""
    ranks = [(*kept, *taken) for kept, taken in zip(schedule.kept, schedule.taken, strict=True)]
    cuts = sorted({cut for runs in ranks for run in runs for cut in (run.start, run.stop)})
    before = dict(zip(cuts, layout.entries_before(cuts, ratio), strict=True))
    return [sum(before[run.stop] - before[run.start] for run in runs) for runs in ranks]


def _by_blocks(layout: PackedLayout, ratio: int) -> Schedule:
    """Exchange blocks of equal length between ranks that see much and ranks that see little."""
    length = layout.local_len
    block = max(length // BLOCKS, 1)
    count = length // block
    # Where each shard's blocks begin and the last one ends; what follows it stays.
    begins = [begin + block * i for begin in layout.shard_starts for i in range(count + 1)]
    seen = layout.entries_before([*begins, layout.seq_len], ratio)
    costs = [after - before for before, after in pairwise(seen)]
    of_shard = [slice(k * (count + 1), (k + 1) * (count + 1)) for k in range(layout.cp_size)]
    holds = _spread(
        [list(zip(costs[part], begins[part], strict=True))[:-1] for part in of_shard],
        [costs[part][-1] for part in of_shard],
    )
    kept, taken = [], []
    for shard, mine in zip(layout.shard_starts, holds, strict=True):
        mine.sort()
        first, after = bisect_left(mine, shard), bisect_left(mine, shard + length)
        rest = range(shard + count * block, shard + length)
        kept.append(_runs(mine[first:after], block, rest))
        taken.append(_runs(mine[:first] + mine[after:], block))
    return Schedule(tuple(kept), tuple(taken))


def _spread(blocks: Sequence[list[tuple[int, int]]], fixed: Sequence[int]) -> list[list[int]]:
    """Exchange blocks (cost, name), one for one, until no rank is far from the mean.

    Args:
        blocks: Of each rank, as many each.
        fixed: What each rank computes besides.

    Returns:
        The names of each rank's blocks.
    """
    holds = [sorted(of_rank) for of_rank in blocks]
    loads = [
        sum(cost for cost, _ in of_rank) + rest for of_rank, rest in zip(holds, fixed, strict=True)
    ]
    mean = sum(loads) / len(loads)
    order = sorted((load, rank) for rank, load in enumerate(loads))
    for _ in range(2 * len(loads)):
        (least, light), (most, heavy) = order[0], order[-1]
        wanted = min(most - mean, mean - least)
        given = _exchange(holds[heavy], holds[light], wanted)
        if not given:
            break
        order = order[1:-1]
        insort(order, (least + given, light))
        insort(order, (most - given, heavy))
    return [[name for _, name in of_rank] for of_rank in holds]


def _exchange(heavy: list[tuple[int, int]], light: list[tuple[int, int]], wanted: float) -> int:
    """Give a rank's dearest blocks for another's cheapest, as many as ``wanted`` asks for.

    Both lists are sorted, are changed in place and stay sorted.

    Returns:
        By how much the one's cost fell and the other's rose.
    """
    given, dear, cheap = 0, len(heavy) - 1, 0
    exchanged: list[tuple[int, int]] = []
    # The first exchange may go beyond what is wanted, to less than twice as much.
    most = math.ceil(2 * wanted) - 1
    while cheap < len(light):
        least, _ = light[cheap]
        dear = min(dear, bisect_left(heavy, (least + most - given + 1,)) - 1)
        if dear < 0 or heavy[dear][0] <= least:
            break
        exchanged.append((dear, cheap))
        given += heavy[dear][0] - least
        most = math.floor(wanted)
        dear, cheap = dear - 1, cheap + 1
    for dear, cheap in exchanged:
        heavy[dear], light[cheap] = light[cheap], heavy[dear]
    heavy.sort()
    light.sort()
    return given


def _runs(begins: Sequence[int], block: int, rest: range = range(0)) -> Runs:
    """Return ascending blocks, and what follows them, with those that touch made one run."""
    starts = [*begins, rest.start] if rest else begins
    if not starts:
        return ()
    cuts = [(a + block, b) for a, b in pairwise(starts) if a + block != b]
    end = rest.stop if rest else starts[-1] + block
    return tuple(map(range, [starts[0], *(b for _, b in cuts)], [*(a for a, _ in cuts), end]))
