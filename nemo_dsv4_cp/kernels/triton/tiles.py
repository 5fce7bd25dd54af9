"""Block sizes, warps and stages of every kernel, by architecture: the one table.

Shared memory of a block is 163 KiB on sm_80 and 227 KiB on sm_90 and sm_100. At head dim 512 one
query's 64 heads fill a tensor-core tile, and the float32 sums [64, 512] take 128 registers of each
of 256 threads: fewer warps spill, and so do more than 32 keys a step beside the queries.
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100)

ALIGNED = 64
"""Keys that share a block of stored probabilities, whose gradient one program sums."""


@dataclass(frozen=True)
class Tile:
    """How one kernel walks.

    Attributes:
        heads: Heads of a query that a program takes.
        keys: Keys a step.
        columns: Of the head dim that a program takes; 0 for all.
        warps: Warps a program.
        stages: Steps whose loads are in flight.
    """

    heads: int
    keys: int
    columns: int
    warps: int
    stages: int


FORWARD = {
    80: Tile(heads=64, keys=32, columns=0, warps=8, stages=2),
    90: Tile(heads=64, keys=32, columns=0, warps=8, stages=2),
    100: Tile(heads=64, keys=32, columns=0, warps=8, stages=2),
}

# Scores, their gradient and the queries' gradient: both operands of a query stay in shared memory.
QUERIES_GRAD = {
    80: Tile(heads=64, keys=32, columns=0, warps=8, stages=1),
    90: Tile(heads=64, keys=32, columns=0, warps=8, stages=1),
    100: Tile(heads=64, keys=32, columns=0, warps=8, stages=1),
}

# Two products with stored factors and nothing else: float32 sums of [64, 256].
KEYS_GRAD = {
    80: Tile(heads=64, keys=ALIGNED, columns=128, warps=4, stages=2),
    90: Tile(heads=64, keys=ALIGNED, columns=256, warps=8, stages=2),
    100: Tile(heads=64, keys=ALIGNED, columns=256, warps=8, stages=2),
}

# A query's chosen entries: nothing to keep, the sums [64, 128] leave by atomics.
CHOSEN_GRAD = {
    80: Tile(heads=0, keys=64, columns=128, warps=4, stages=1),
    90: Tile(heads=0, keys=64, columns=128, warps=4, stages=1),
    100: Tile(heads=0, keys=64, columns=128, warps=4, stages=1),
}


def of(table: dict[int, Tile], capability: tuple[int, int] | None) -> Tile:
    """Return the tile for a device: that of the newest architecture not newer than it."""
    if capability is None:  # interpreted
        return table[90]
    number = capability[0] * 10
    return table[max(arch for arch in ARCHITECTURES if arch <= max(number, ARCHITECTURES[0]))]
