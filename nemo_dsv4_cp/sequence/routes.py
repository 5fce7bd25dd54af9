"""What crosses ranks for one layer: who computes which queries, and which rows that takes."""

# R CP ranks   W sliding window

from __future__ import annotations

from dataclasses import dataclass

from nemo_dsv4_cp.sequence.layout import SequenceLayout, once_a_layout
from nemo_dsv4_cp.sequence.plan import raw_tokens
from nemo_dsv4_cp.sequence.queries import Queries, Runs
from nemo_dsv4_cp.sequence.schedule import Schedule
from nemo_dsv4_cp.sequence.transfers import Transfers, transfers


@dataclass(frozen=True, eq=False)
class Routes:
    """One rank's part in what crosses for a layer.

    Attributes:
        kept: Queries of its own shard that it computes itself.
        kept_keys: Raw keys that these see.
        moved: None where the schedule moves no query of any rank.
    """

    kept: Queries
    kept_keys: Transfers
    moved: Moved | None = None


@dataclass(frozen=True, eq=False)
class Moved:
    """What one rank computes for others, and they for it.

    Attributes:
        queries: Queries of other shards that it computes.
        keys: Raw keys that these see.
        rows: Their own rows of any per-token tensor.
        returned: The rows of its own shard: computed here, or by the rank that took them.
    """

    queries: Queries
    keys: Transfers
    rows: Transfers
    returned: Transfers


@once_a_layout
def routes(layout: SequenceLayout, schedule: Schedule, window: int) -> Routes:
    """Return ``layout``'s rank's part under a schedule.

    Args:
        layout: Positions of the rank.
        schedule: Which rank computes which queries.
        window: W.
    """
    rank = layout.cp_rank
    shards = _shards(layout)

    def of_shards(wanted: tuple[Runs, ...]) -> Transfers:
        return transfers(wanted, shards, shards, rank=rank)

    def keys(runs_of_ranks: tuple[Runs, ...]) -> Transfers:
        return of_shards(tuple(raw_tokens(runs, window) for runs in runs_of_ranks))

    kept = Queries(layout, schedule.kept[rank])
    if not schedule.moves:
        return Routes(kept, keys(schedule.kept))
    moved = Moved(
        queries=Queries(layout, schedule.taken[rank]),
        keys=keys(schedule.taken),
        rows=of_shards(schedule.taken),
        returned=transfers(shards, schedule.kept, schedule.taken, rank=rank),
    )
    return Routes(kept, keys(schedule.kept), moved)


@once_a_layout
def before_shards(layout: SequenceLayout, tokens: int) -> Transfers:
    """Return the exchange that extends each shard by ``tokens`` tokens before it."""
    wanted = tuple((layout.shard(rank, before=tokens),) for rank in range(layout.cp_size))
    shards = _shards(layout)
    return transfers(wanted, shards, shards, rank=layout.cp_rank)


def _shards(layout: SequenceLayout) -> tuple[Runs, ...]:
    return tuple((layout.shard(rank),) for rank in range(layout.cp_size))
