# SPDX-License-Identifier: Apache-2.0
"""Block sizes, warps and stages of every kernel, by architecture: the one table.

Shared memory of a block is 163 KiB on sm_80 and 227 KiB on sm_90 and sm_100. At head dim 512 one
query's 64 heads fill a tensor-core tile, and the float32 sums [64, 512] take 128 registers of each
of 256 threads: fewer warps spill, and so do more than 32 keys per step. Two stages and more load
keys straight to shared memory; one takes them through registers that are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
import triton

SHARED_MEMORY = 163 << 10
"""Bytes per block that the tables assume: sm_80's. A40, L40S and RTX cards have 99 KiB."""

FLOAT32 = 32
"""Row of the tables for float32 on any device: no tensor cores, and twice the bytes."""

ALIGNED = 64
"""Keys that share a block of stored probabilities, whose gradient one program sums."""


COUNTERS = (
    "begin",
    "n_chunk",
    "n_queries",
    "n_raw",
    "n_entries",
    "raw_blocks",
    "parts",
    "first_query",
    "first_entry",
    "n_rows",
    "n_candidates",
)
"""Arguments that change with every pack: Triton would compile anew where 16 divides one or not."""


@dataclass(frozen=True)
class Tile:
    """How one kernel walks.

    Attributes:
        heads: Heads of a query per program.
        keys: Keys per step.
        columns: Columns of the head dim per program; 0 for all.
        warps: Warps per program.
        stages: Triton's ``num_stages``: 1 + s copy s steps ahead, and 1 + 2 s where the place of a
            step's keys is loaded too, for each of both loads gets half of them. In the PTX of a
            step, ``cp.async.wait_group`` above 0 shows copies in flight during its products.
        selected_stages: The same where keys are selected, if that differs.
        branch: Keep softmax in a branch, see ``attention_forward``.
    """

    heads: int
    keys: int
    columns: int
    warps: int
    stages: int
    selected_stages: int | None = None
    branch: bool = False

    def stages_of(self, selected: torch.Tensor | None) -> int:
        """Return ``num_stages`` of a kernel for selected keys, or for None of them."""
        return self.stages if selected is None else self.selected_stages or self.stages


FORWARD = {
    FLOAT32: Tile(heads=16, keys=16, columns=0, warps=8, stages=2),
    80: Tile(heads=64, keys=32, columns=0, warps=8, stages=2),
    90: Tile(heads=64, keys=32, columns=0, warps=8, stages=3, selected_stages=5, branch=True),
    100: Tile(heads=64, keys=32, columns=0, warps=8, stages=3),
}

# Queries and their outputs' gradients take 128 KiB of shared memory: two steps of keys do not fit
# beside them, so that the kernel itself loads a step ahead, through registers. Keys divide ALIGNED.
SCORES = {
    FLOAT32: Tile(heads=16, keys=16, columns=0, warps=8, stages=1),
    80: Tile(heads=64, keys=32, columns=0, warps=8, stages=1),
    90: Tile(heads=64, keys=64, columns=0, warps=8, stages=1),
    100: Tile(heads=64, keys=32, columns=0, warps=8, stages=1),
}

# One product: whole rows of gathered keys, for each is 1 KiB in one place.
QUERIES_GRAD = {
    FLOAT32: Tile(heads=16, keys=32, columns=128, warps=8, stages=2),
    80: Tile(heads=64, keys=32, columns=512, warps=8, stages=2),
    90: Tile(heads=64, keys=32, columns=512, warps=8, stages=3),
    100: Tile(heads=64, keys=64, columns=512, warps=8, stages=2),
}

# Two products with stored factors, one after the other: float32 sums of [64, 256]. Each step loads
# the place of its window first, so that five stages copy two steps ahead.
KEYS_GRAD = {
    FLOAT32: Tile(heads=16, keys=ALIGNED, columns=128, warps=4, stages=2),
    80: Tile(heads=64, keys=ALIGNED, columns=128, warps=4, stages=2),
    90: Tile(heads=64, keys=ALIGNED, columns=256, warps=8, stages=5),
    100: Tile(heads=64, keys=ALIGNED, columns=256, warps=8, stages=5),
}

# A query's selected entries, all heads at once: nothing is held, the sums leave by atomics.
SELECTED_GRAD = {
    FLOAT32: Tile(heads=0, keys=32, columns=64, warps=8, stages=1),
    80: Tile(heads=0, keys=64, columns=64, warps=8, stages=1),
    90: Tile(heads=0, keys=64, columns=128, warps=8, stages=1),
    100: Tile(heads=0, keys=64, columns=128, warps=8, stages=1),
}

# Heads: of all the queries that a program walks; keys stay, and their products with 64 heads take
# 64 registers of each thread.
INDEX_SCORES = {
    FLOAT32: Tile(heads=1024, keys=32, columns=0, warps=4, stages=2),
    80: Tile(heads=1024, keys=128, columns=0, warps=8, stages=3),
    90: Tile(heads=1024, keys=256, columns=0, warps=8, stages=3),
    100: Tile(heads=1024, keys=256, columns=0, warps=8, stages=3),
}

# Keys per step, gathered by blocks; products with all heads of one query.
CANDIDATE_SCORES = {
    FLOAT32: Tile(heads=0, keys=32, columns=0, warps=4, stages=2),
    80: Tile(heads=0, keys=128, columns=0, warps=4, stages=5),
    90: Tile(heads=0, keys=128, columns=0, warps=4, stages=5),
    100: Tile(heads=0, keys=128, columns=0, warps=4, stages=5),
}

# Scores as in forward, whose sums leave registers for norm and rotary here.
TARGET = {
    FLOAT32: Tile(heads=32, keys=16, columns=0, warps=8, stages=2),
    80: Tile(heads=64, keys=32, columns=0, warps=8, stages=3, selected_stages=5),
    90: Tile(heads=64, keys=32, columns=0, warps=8, stages=3, selected_stages=5),
    100: Tile(heads=64, keys=32, columns=0, warps=8, stages=3, selected_stages=5),
}

# All index heads of a query in three kernels, which stay; keys per step. Four warps: with eight,
# sm_90 computes products that reach others twice.
INDEX_GRAD = {
    FLOAT32: Tile(heads=0, keys=16, columns=0, warps=8, stages=1),
    80: Tile(heads=0, keys=32, columns=0, warps=4, stages=3, selected_stages=5),
    90: Tile(heads=0, keys=64, columns=0, warps=4, stages=3, selected_stages=5),
    100: Tile(heads=0, keys=64, columns=0, warps=4, stages=3, selected_stages=5),
}
SELECTED_INDEX_GRAD = {
    FLOAT32: Tile(heads=0, keys=16, columns=0, warps=8, stages=1),
    80: Tile(heads=0, keys=64, columns=0, warps=4, stages=5),
    90: Tile(heads=0, keys=64, columns=0, warps=4, stages=5),
    100: Tile(heads=0, keys=64, columns=0, warps=4, stages=5),
}
# Here a block of keys stays, and a step takes a query.
INDEX_KEYS_GRAD = {
    FLOAT32: Tile(heads=0, keys=32, columns=0, warps=8, stages=1),
    80: Tile(heads=0, keys=32, columns=0, warps=4, stages=3),
    90: Tile(heads=0, keys=128, columns=0, warps=8, stages=3),
    100: Tile(heads=0, keys=64, columns=0, warps=4, stages=2),
}

# Keys: groups per step of the last pass. K groups are held at a time, 32 numbers each.
TOP_K = {
    80: Tile(heads=0, keys=64, columns=0, warps=8, stages=1),
}
# For rows of so many groups that each is twice as large.
TOP_K_OF_MANY = {80: replace(TOP_K[80], warps=16)}

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# Tiles that older releases of Triton need, or registers spill. In 3.4, stages are not divided by
# the levels of loads.
if TRITON < (3, 6):
    FORWARD[80] = replace(FORWARD[80], heads=32)
if TRITON < (3, 5):
    KEYS_GRAD[90] = replace(KEYS_GRAD[90], stages=3)
    KEYS_GRAD[100] = replace(KEYS_GRAD[100], stages=3)


_compiled_for: ContextVar[int | None] = ContextVar("_compiled_for", default=None)


@contextmanager
def compiled_for(arch: int) -> Iterator[None]:
    """Take tensors without a GPU for those of an architecture, in this block."""
    before = _compiled_for.set(arch)
    try:
        yield
    finally:
        _compiled_for.reset(before)


def compiling_ahead() -> bool:
    """Whether kernels are compiled for an architecture that need not be here."""
    return _compiled_for.get() is not None


def of(table: dict[int, Tile], x: torch.Tensor) -> Tile:
    """Return the tile for a tensor: of its device's architecture, or the last before that.

    Raises:
        ValueError: If Triton interprets, and cannot multiply numbers of the tensor's type.
    """
    refuse_interpreted_bfloat16(x)
    arch = _compiled_for.get()
    if x.is_cuda:
        arch = torch.cuda.get_device_capability(x.device)[0] * 10
    elif arch is None:
        return table[90 if 90 in table else 80]  # interpreted, the walk of a GPU
    if x.dtype == torch.float32:
        return table[FLOAT32]
    return table[max(known for known in table if known <= arch)]


def refuse_interpreted_bfloat16(x: torch.Tensor) -> None:
    """Raise ValueError for a tensor that the interpreter would multiply wrongly."""
    if x.dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
        raise ValueError(
            "Triton's interpreter multiplies the bits of bfloat16 as integers; under "
            "TRITON_INTERPRET=1 set torch_dtype: float32"
        )
