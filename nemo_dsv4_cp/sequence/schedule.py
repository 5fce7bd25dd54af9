# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which queries of a compressed layer, or selects for which (V4.1).

A query sees the entries of all tokens before it, so with contiguous shards the last rank computes
the most. Tokens stay with their shard; inside the layer queries move, so that every rank computes
as many as it owns and all see about as many entries.

Rows of one document: rank k of R computes the first half of its own shard and the second half of
rank R - 1 - k's. If the 2R half shards of a row are numbered from 0, these are 2k and 2R - 1 - 2k.
A query sees entries in proportion to its position, and the two numbers have the same sum on every
rank, so the queries of every rank see about equally many entries.
Packed rows: blocks of queries are exchanged between the rank that sees the most entries and the one
that sees the fewest, until all are near the mean.

All ranks compute the same schedule from what they all know, without communication.
"""

# S global tokens   L local tokens   R CP ranks

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.queries import Runs

BLOCKS = 32
"""Blocks in a packed shard, the units that move: 512 of 16,384 tokens each. More blocks balance
better, and each needs W - 1 raw keys of its own."""

LAUNCH_SECONDS = 200e-6
"""What the launches of two more exchanges take, about forty each way."""


class _Rates(Protocol):
    """What a GPU computes and receives, as :class:`nemo_dsv4_cp.gpus.Gpu` has it."""

    @property
    def kernels_per_second(self) -> float: ...
    def exchange_seconds(self, received: float, ranks: int) -> float: ...


ATTENTION_PRODUCTS = (2, 5)
"""Products of queries and keys in forward and in backward: the scores are computed again there."""


class Cost(Protocol):
    """What one query costs: the work that balancing evens out, and bytes where it moves."""

    @property
    def flops_per_entry(self) -> int:
        """Floating-point operations per visible entry, forward and backward."""

    @property
    def sent_forward(self) -> int:
        """Bytes that cross in forward for a query computed elsewhere, there and back."""

    @property
    def sent_backward(self) -> int:
        """Bytes of their gradients."""


@dataclass(frozen=True)
class QueryCost:
    """What one query of a V4 layer costs; bytes cross where another rank computes it.

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
    def of(cls, sizes: Any, ratio: int) -> QueryCost:
        """Return the cost in a layer of a model, from its ``DeepseekV4Config``.

        What grows with the visible entries is, at ratio 4, the indexer's scores, in forward only;
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


@dataclass(frozen=True)
class SelectionCost:
    """What selecting for one query of a V4.1 layer costs; bytes cross where another rank does it.

    Only layers that score all visible entries balance their selection. Attention stays: it reads
    ``index_topk`` entries for nearly every query.

    Attributes:
        flops_per_entry: Floating-point operations of scores per visible entry, in forward only.
        queries: Bytes of its index queries, quantized.
        index_weights: Of its index heads' weights, in bfloat16 as all activations.
        selected: Of the top-k indices that return, int32; fewer where a row has fewer entries.
        candidates: Of the candidate blocks that return, int32; 0 in layers that choose none.
    """

    flops_per_entry: int
    queries: int
    index_weights: int
    selected: int
    candidates: int

    @classmethod
    def of(cls, sizes: Any, *, head_bytes: int, chooses_candidates: bool) -> SelectionCost:
        """Return the cost in a layer of a model.

        Args:
            sizes: Fields of V4.1's text config.
            head_bytes: Of the index query of one head, as it is sent.
            chooses_candidates: Whether the layer is the one of ``candidate_source_layer_id``.
        """
        return cls(
            flops_per_entry=2 * sizes.index_n_heads * sizes.index_head_dim,
            queries=sizes.index_n_heads * head_bytes,
            index_weights=2 * sizes.index_n_heads,
            selected=4 * sizes.index_topk,
            candidates=4 * sizes.candidate_topk_blocks if chooses_candidates else 0,
        )

    @property
    def sent_forward(self) -> int:
        """Bytes that cross for a query that another rank selects for, both ways."""
        return self.queries + self.index_weights + self.selected + self.candidates

    @property
    def sent_backward(self) -> int:
        """None: integers take no gradient."""
        return 0


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which queries each rank computes: as many on every rank.

    Attributes:
        local: Of each rank, those of its own shard, ascending runs.
        remote: Of each rank, those of other ranks' shards, ascending runs.
    """

    local: tuple[Runs, ...]
    remote: tuple[Runs, ...]

    @property
    def moves(self) -> bool:
        """Whether any query is computed elsewhere."""
        return any(self.remote)


def contiguous(layout: SequenceLayout) -> Schedule:
    """Let every rank compute the queries of its own shard."""
    ranks = range(layout.cp_size)
    return Schedule(tuple((layout.shard(rank),) for rank in ranks), ((),) * layout.cp_size)


def balanced(layout: SequenceLayout) -> Schedule:
    """Let every rank's queries see about as many tokens, and so as many entries of any ratio."""
    if layout.packed:
        return _by_blocks(layout)
    shards = [layout.shard(rank) for rank in range(layout.cp_size)]
    half = (layout.local_len + 1) // 2
    return Schedule(
        tuple((shard[:half],) for shard in shards),
        tuple((shard[half:],) for shard in reversed(shards)),
    )


class Schedules:
    """The schedules of a step's layers: those that balance have the same one."""

    def __init__(self, layout: SequenceLayout, balance: str, rates: _Rates) -> None:
        """Bind a layout.

        Args:
            layout: Positions; any rank's.
            balance: ``"on"``, ``"off"``, or ``"auto"``: on if the time that the busiest rank saves
                is longer than its exchanges take without overlap.
            rates: Of the GPU that ``"auto"`` decides for.
        """
        self._layout, self._balance, self._rates = layout, balance, rates
        self._stay, self._move = contiguous(layout), None
        # A shard of one token has no half to give.
        if balance != "off" and layout.cp_size > 1 and layout.local_len > 1:
            self._move = balanced(layout)

    def of(self, ratio: int, cost: Cost | None) -> Schedule:
        """Return the schedule of layers of a compress ratio.

        Args:
            ratio: Compress ratio; without compression, queries stay.
            cost: What a query costs; None where queries stay.
        """
        if not ratio or cost is None or self._move is None:
            return self._stay
        pays = self._balance == "on" or self._pays(self._move, ratio, cost)
        return self._move if pays else self._stay

    def _pays(self, move: Schedule, ratio: int, cost: Cost) -> bool:
        layout, rates = self._layout, self._rates
        stays, moves = (max(entries_seen(layout, s, ratio)) for s in (self._stay, move))
        moved = max(sum(map(len, runs)) for runs in move.remote) * layout.rows
        sent = moved * (cost.sent_forward + cost.sent_backward)
        exchanged = rates.exchange_seconds(sent, layout.cp_size) + LAUNCH_SECONDS
        return (stays - moves) * cost.flops_per_entry / rates.kernels_per_second > exchanged


def entries_seen(layout: SequenceLayout, schedule: Schedule, ratio: int) -> list[int]:
    """Return how many entries each rank's queries see, query by query."""
    ranks = [local + remote for local, remote in zip(schedule.local, schedule.remote, strict=True)]
    cuts = sorted({cut for runs in ranks for run in runs for cut in (run.start, run.stop)})
    before = dict(zip(cuts, layout.entries_before(cuts, ratio), strict=True))
    return [sum(before[run.stop] - before[run.start] for run in runs) for runs in ranks]


def _by_blocks(layout: SequenceLayout) -> Schedule:
    """Exchange blocks of equal length between ranks that see many tokens and few."""
    length, seq_len, shards = layout.local_len, layout.seq_len, layout.shard_starts
    block = max(length // BLOCKS, 1)
    count = length // block
    rest = length % block  # what follows a shard's last block stays
    begins = [b for start in shards for b in range(start, start + block * count + 1, block)]
    seen = layout.entries_before([*begins, seq_len], ratio=1)
    # A block is one integer, for speed: its cost * S + where it begins.
    blocks = [
        (b - a) * seq_len + begin for a, b, begin in zip(seen, seen[1:], begins, strict=False)
    ]
    held, loads = [], []
    for first in range(0, len(blocks), count + 1):
        held.append(sorted(blocks[first : first + count]))
        loads.append(seen[first + count + 1] - seen[first])
    _spread(held, loads, seq_len)
    local, remote = [], []
    for start, of_rank in zip(shards, held, strict=True):
        computed = sorted([number % seq_len for number in of_rank])
        first, after = bisect_left(computed, start), bisect_left(computed, start + length)
        stay = computed[first:after] + ([start + block * count] if rest else [])
        local.append(_joined(stay, block, rest or block))
        remote.append(_joined(computed[:first] + computed[after:], block, block))
    return Schedule(tuple(local), tuple(remote))


def _spread(held: list[list[int]], loads: list[int], unit: int) -> None:
    """Exchange blocks, one for one, until no rank is far from the mean.

    Args:
        held: Of each rank its blocks, as many each, ascending; changed in place. A block is an
            integer: its cost times ``unit``, plus its name, which is less than ``unit``.
        loads: How many tokens each rank's queries see.
        unit: See ``held``.
    """
    mean = sum(loads) / len(loads)
    order = sorted((load, rank) for rank, load in enumerate(loads))
    for _ in range(2 * len(loads)):
        (least, light), (most, heavy) = order[0], order[-1]
        given = _exchange(held[heavy], held[light], min(most - mean, mean - least), unit)
        if not given:
            break
        order = order[1:-1]
        insort(order, (least + given, light))
        insort(order, (most - given, heavy))


def _exchange(heavy: list[int], light: list[int], wanted: float, unit: int) -> int:
    """Exchange a rank's dearest blocks for another's cheapest, until ``wanted`` has moved.

    Returns:
        By how much the cost of ``heavy`` fell and that of ``light`` rose.
    """
    given, dear = 0, len(heavy)
    # The first exchange may go beyond what is wanted, to less than twice as much.
    most = math.ceil(2 * wanted) - 1
    pairs = []
    for cheap, number in enumerate(light):
        least = number // unit
        dear = bisect_left(heavy, (least + most - given + 1) * unit, 0, dear) - 1
        gained = heavy[dear] // unit - least
        if dear < 0 or gained <= 0:
            break
        pairs.append((dear, cheap))
        given += gained
        most = math.floor(wanted)
    for dear, cheap in pairs:
        heavy[dear], light[cheap] = light[cheap], heavy[dear]
    heavy.sort()
    light.sort()
    return given


def _joined(begins: list[int], block: int, last: int) -> Runs:
    """Return ascending blocks, the last one of ``last`` tokens, joined where they touch."""
    if not begins:
        return ()
    runs, start = [], begins[0]
    for a, b in pairwise(begins):
        if b - a != block:
            runs.append(range(start, a + block))
            start = b
    return (*runs, range(start, begins[-1] + last))
