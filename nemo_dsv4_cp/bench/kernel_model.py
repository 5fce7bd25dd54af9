# SPDX-License-Identifier: Apache-2.0
"""A model of a kernel's time on a GPU, from its binary and one layer's launches.

A kernel that multiplies takes whole steps of its inner loop. A step takes, in cycles of one SM:

    products   of each tensor-core instruction the longer of: its FLOP at the SM's rate, and the
               bytes of shared memory that it reads at 128 per cycle
    shared     other bytes read and written in shared memory, at 128 per cycle
    issue      other instructions of all warps, four per cycle
    waits      30 for each barrier
    L2         bytes moved to and from global memory, at the SM's share of the L2's rate

These add up, for each needs the one before, but for L2 where loads are in flight during products:
then the step takes the longer of L2 and the rest; where they are not, L2 adds to it with 800 cycles
of latency. Programs that share an SM fill each other's waits, until one of its resources is full. A
launch takes the time of all steps over all SMs, or of the program with the most steps.

A kernel that does not multiply takes the time of its bytes at the memory's rate.

Left out: the part of a kernel outside its loop, launches, misses of the L2, bank conflicts, tensor
memory's rate, atomics beyond their bytes, clocks below their peak. Instructions are counted in PTX;
of the forward kernel on sm_90 the binary has a fifth more. Nothing of it was measured on a GPU: it
is there to compare kernels.
"""

# B batch rows   L queries   N heads   D head_dim   K selected entries   I index heads
# F index width

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_dsv4_cp.gpus import MULTIPROCESSORS, SHARED_MEMORY, Multiprocessors
from nemo_dsv4_cp.kernels.triton import tiles
from nemo_dsv4_cp.kernels.triton.chunks import in_blocks, raw_slots
from nemo_dsv4_cp.kernels.triton.top_k import bytes_read
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.tools.ahead import Compiled, Launch
from nemo_dsv4_cp.tools.inner_loops import WARP, Loop

BARRIER = 30
LATENCY = 800
_OF_THE_SYSTEM = 1 << 10  # bytes of shared memory per block


@dataclass(frozen=True)
class Estimate:
    """The modelled time of a kernel in one pass of a layer.

    Attributes:
        ms: Of all its launches.
        bound: What takes the largest part.
        programs: Of its largest launch.
    """

    ms: float
    bound: str
    programs: int


@dataclass(frozen=True)
class _Work:
    """Floating-point operations of a launch's products, and of its longest program."""

    flop: float
    longest: float


def estimate(
    compiled: Compiled, launches: Sequence[Launch], plan: AttentionPlan, sizes: Any
) -> Estimate:
    """Model the launches of one kernel in one pass of a layer with the bfloat16 ``sizes``."""
    gpu = MULTIPROCESSORS[compiled.arch]
    seconds, bounds = 0.0, dict[str, float]()
    for launch in launches:
        if not compiled.loops:
            taken, bound = _bytes(launch) / (gpu.memory_gbs * 1e9), "memory"
        else:
            cycles, bound = _cycles(compiled, _work(launch, plan, sizes), gpu)
            taken = cycles / gpu.cycles_per_second
        seconds += taken
        bounds[bound] = bounds.get(bound, 0.0) + taken
    programs = max(math.prod(launch.grid) for launch in launches)
    return Estimate(seconds * 1e3, max(bounds, key=lambda bound: bounds[bound]), programs)


def _cycles(compiled: Compiled, work: _Work, gpu: Multiprocessors) -> tuple[float, str]:
    """Return the cycles of a launch, and what bounds them; loops have equal shares of products."""
    needed = sum(compiled.needed)
    resident = _resident(compiled, gpu)
    steps = [_parts(loop, gpu) for loop in compiled.loops]
    alone = sum(_alone(loop, parts) for loop, parts in zip(compiled.loops, steps, strict=True))
    total = {name: sum(parts[name] for parts in steps) for name in steps[0]}
    full = max(total["tensor cores"] + total["shared memory"], total["issue"], total["L2"])
    shared_out = work.flop / needed / gpu.count * max(full, alone / resident)
    longest = work.longest / needed * alone
    if longest > shared_out:
        return longest, "longest program"
    return shared_out, max(total, key=lambda name: total[name])


def _parts(loop: Loop, gpu: Multiprocessors) -> dict[str, float]:
    """Return the cycles that a step takes of each resource."""
    tensor = shared = 0.0
    for product in loop.products:
        multiplying = product.occupied / gpu.products
        reading = product.shared / gpu.shared_bytes
        if multiplying >= reading:
            tensor += multiplying
        else:
            shared += reading
    others = loop.shared_read + loop.shared_written - sum(p.shared for p in loop.products)
    return {
        "tensor cores": tensor,
        "shared memory": shared + others / gpu.shared_bytes,
        "issue": loop.instructions / gpu.instructions,
        "waits": BARRIER * loop.barriers + (0 if loop.ahead is not False else LATENCY),
        "L2": loop.global_bytes / gpu.l2_bytes,
    }


def _alone(loop: Loop, parts: dict[str, float]) -> float:
    """Return the cycles of a step of a program that has an SM for itself."""
    rest = sum(parts.values()) - parts["L2"]
    return rest + parts["L2"] if loop.ahead is False else max(rest, parts["L2"])


def _resident(compiled: Compiled, gpu: Multiprocessors) -> int:
    """Return how many programs an SM holds."""
    threads = compiled.warps * WARP
    memory = SHARED_MEMORY[compiled.arch] + _OF_THE_SYSTEM
    by_memory = memory // (compiled.shared + _OF_THE_SYSTEM)
    by_registers = gpu.registers // (compiled.registers * threads)
    return max(1, min(by_memory, by_registers, gpu.threads // threads))


def _work(launch: Launch, plan: AttentionPlan, sizes: Any) -> _Work:
    name, values, grid = launch.specimen.name, launch.values, launch.grid
    if name == "index_scores_kernel":
        per_key = 2 * sizes.index_n_heads * sizes.index_head_dim
        begin, rows = values["first_query"], values["n_rows"]
        seen = plan.entries_seen(slice(begin, begin + rows), batch=1)
        return _Work(per_key * seen, per_key * values["KEYS"] * values["QUERIES"])
    if name in _OF_LOSS:
        return _loss_work(launch, plan, sizes)
    per_key = 2 * sizes.num_attention_heads * sizes.head_dim
    rows = values.get("n_chunk", len(plan.queries))
    begin = values.get("begin", 0)
    chunk = slice(begin, begin + rows)
    entries, most = plan.entries_seen(chunk, batch=1), 0
    if entries:
        visible = plan.entry_span(chunk)
        most = visible.stop - visible.start
    if plan.ratio == OVERLAP_RATIO:
        entries, most = min(entries, rows * sizes.index_topk), min(most, sizes.index_topk)
    window = plan.window if name == "forward_kernel" else raw_slots(plan.window)
    if name == "keys_kernel":
        span = plan.raw_span(chunk)
        blocks = in_blocks(span.start, span.stop) // tiles.ALIGNED
        of_entries = math.prod(grid) // grid[0] * (grid[0] - blocks)
        raw = 2 * per_key * rows * window
        if not of_entries:
            return _Work(raw, raw / math.prod(grid))
        summed = 2 * per_key * entries
        of_raws = math.prod(grid) - of_entries
        return _Work(raw + summed, max(raw / of_raws, summed / of_entries))
    products = {"forward_kernel": 2, "scores_kernel": 2, "queries_kernel": 1, "selected_kernel": 2}
    if name == "selected_kernel":
        window = 0
    of_query = products[name] * per_key
    return _Work(
        of_query * (rows * window + entries), of_query * (window + most) * rows / math.prod(grid)
    )


_OF_LOSS = {
    "target_kernel": 2,
    "gradients_kernel": 3,
    "selected_keys_kernel": 2,
    "index_keys_kernel": 2,
}
"""Kernels of the indexer's loss, and their products with an entry or its index key."""


def _loss_work(launch: Launch, plan: AttentionPlan, sizes: Any) -> _Work:
    name, values, programs = launch.specimen.name, launch.values, math.prod(launch.grid)
    rows = values["n_chunk"]
    chunk = slice(values["begin"], values["begin"] + rows)
    entries, most = plan.entries_seen(chunk, batch=1), len(plan.entry_span(chunk))
    if values.get("SELECTED", name == "selected_keys_kernel"):
        entries, most = min(entries, rows * sizes.index_topk), min(most, sizes.index_topk)
    if name == "target_kernel":
        per_key = 2 * sizes.num_attention_heads * sizes.head_dim
        longest = per_key * (plan.window + 2 * most) * rows / programs
        return _Work(per_key * (rows * plan.window + 2 * entries), longest)
    of_entries = 2 * _OF_LOSS[name] * sizes.index_n_heads * sizes.index_head_dim
    of_longest = entries / programs if name == "index_keys_kernel" else most
    return _Work(of_entries * entries, of_entries * of_longest)


def _bytes(launch: Launch) -> float:
    """Return the bytes that a kernel without products reads and writes, of two a number."""
    name, values, grid = launch.specimen.name, launch.values, launch.grid
    if name == "top_k_kernel":
        read = bytes_read(values["n_scores"], values["GROUP"], values["K"])
        return float(math.prod(grid) * (read + 4 * values["K"]))
    if name == "sum_parts_kernel":  # float32 parts to their sum, which is read too
        return float(4 * grid[0] * values["ROWS"] * values["D"] * (values["parts"] + 2))
    numbers = grid[0] * values["n_heads"]
    tensors = {
        "rotate_kernel": 2 * values["ROTARY"],
        "norm_rotate_kernel": 2 * values["D"],  # x to z
        "norm_rotate_backward_kernel": 3 * values["D"],  # x and dz to dx
        "ready_kernel": 5 * values["D"],  # x, out and their gradient to q and do
    }
    return float(2 * numbers * tensors[name])
