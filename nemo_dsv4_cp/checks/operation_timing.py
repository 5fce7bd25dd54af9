# SPDX-License-Identifier: Apache-2.0
"""Seconds and floating-point operations of each operation of a layer's kernels, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_dsv4_cp.checks.model_layers import is_v41
from nemo_dsv4_cp.gpus import known_gpu
from nemo_dsv4_cp.kernels.operations import (
    CANDIDATES,
    INSIDE,
    Draw,
    attend,
    attention_tensors,
    selection,
    shared_selection,
)
from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries


@dataclass(frozen=True)
class OperationTime:
    """One operation alone: median seconds, and floating-point operations of its products."""

    operation: str
    ratio: int
    seconds: float
    flops: int

    @property
    def tflops(self) -> float:
        """Floating-point operations per second, times 1e12."""
        return self.flops / self.seconds / 1e12


def peak_tflops() -> float | None:
    """Return the peak of this GPU, None without one that is known."""
    gpu = known_gpu()
    return None if gpu is None else gpu.tflops


def time_operations(
    kernels: Kernels, sizes: Any, ratio: int, seq_len: int, cp_size: int, *,
    dtype: torch.dtype, repeats: int, selects: str | None = None,
) -> list[OperationTime]:  # fmt: skip
    """Time the operations of the last rank's layer, one row, drawn tensors, after one run each.

    ``sizes`` has the fields of a model config. ``selects`` is how a layer of V4.1 does, None for
    one that attends to what another selected, or to none.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = SequenceLayout.of_padded(seq_len, cp_rank=cp_size - 1, cp_size=cp_size)
    plan = AttentionPlan(Queries.own(layout), sizes.sliding_window, ratio)
    draw = partial(torch.randn, dtype=dtype, device=device)
    angles = draw(1, layout.local_len, sizes.qk_rope_head_dim // 2).repeat(1, 1, 2)
    rope = (angles.cos(), angles.sin())
    measure = partial(_measure, ratio, device, repeats)
    v41, found = is_v41(sizes), []
    if not v41:
        keys = draw(1, layout.local_len, sizes.head_dim)
        found.append(measure("rotary of keys", partial(kernels.rotate, keys, rope)))
    select = _selection(kernels, sizes, plan, rope, draw, selects)
    selected = select() if select else None
    if select and (selects or not v41):
        found.append(measure("top-k selection", select))
    leaves = [leaf.requires_grad_() for leaf in attention_tensors(sizes, plan, draw)]
    run = partial(attend, kernels, sizes, plan, rope, selected, *leaves, normed=not v41)
    found.append(measure("attention forward", run))
    out = run()
    backward = partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)
    return [*found, measure("attention backward", backward)]


def _selection(
    kernels: Kernels, sizes: Any, plan: AttentionPlan, rope: Rope, draw: Draw, selects: str | None
) -> Callable[[], torch.Tensor] | None:
    """Return a layer's top-k selection, None if it attends to all entries or has none."""
    if not is_v41(sizes):
        overlaps = plan.ratio == OVERLAP_RATIO
        return selection(kernels, sizes, plan, rope, draw) if overlaps else None
    if not plan.ratio:
        return None
    made = partial(shared_selection, kernels, sizes, plan, draw)
    candidates = made(None, chooses=True)()[1] if selects == INSIDE else None
    select = made(candidates, chooses=selects in (CANDIDATES, INSIDE))
    return lambda: select()[0]


def _measure(
    ratio: int, device: torch.device, repeats: int, name: str, run: Callable[[], Any]
) -> OperationTime:
    with FlopCounterMode(display=False) as counted:  # compiles, too
        run()
    seconds = [_seconds(run, device) for _ in range(repeats)]
    return OperationTime(name, ratio, statistics.median(seconds), counted.get_total_flops())


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
