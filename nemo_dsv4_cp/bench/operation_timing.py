# SPDX-License-Identifier: Apache-2.0
"""Seconds and floating-point operations of each Triton operation of a layer, on this machine."""

# L local queries   T raw keys   P entries

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_dsv4_cp.gpus import known_gpu
from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    IndexQueries,
)
from nemo_dsv4_cp.kernels.triton import TritonKernels
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
        """Return products a second, times 1e12."""
        return self.flops / self.seconds / 1e12


def peak_tflops() -> float | None:
    """Return what this GPU could do, None without one that is known."""
    gpu = known_gpu()
    return None if gpu is None else gpu.tflops


def time_operations(
    fields: Mapping[str, Any], ratio: int, seq_len: int, cp_size: int, *,
    dtype: torch.dtype, workspace_bytes: int, repeats: int,
) -> list[OperationTime]:  # fmt: skip
    """Time the operations of the last rank's layer, one row, drawn tensors, after one run each.

    Args:
        fields: A complete model config.
        ratio: Compress ratio of the layer.
        seq_len: S, tokens in the whole row.
        cp_size: Number of CP ranks.
        dtype: Of activations.
        workspace_bytes: How much scratch an operation may take.
        repeats: Runs that count.

    Raises:
        ValueError: If the kernels cannot run here.
    """
    kernels = TritonKernels(workspace_bytes=workspace_bytes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = SequenceLayout.of_padded(seq_len, cp_rank=cp_size - 1, cp_size=cp_size)
    length, window = layout.local_len, fields["sliding_window"]
    heads, width = fields["num_attention_heads"], fields["head_dim"]
    plan = AttentionPlan(Queries.own(layout), window, ratio)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, dtype=dtype, device=device)

    angles = draw(length, fields["qk_rope_head_dim"] // 2).repeat(1, 1, 2)
    rope = (angles.cos(), angles.sin())
    measure = partial(_measure, ratio, device, repeats)
    found = [measure("rotary of keys", partial(kernels.rotate, draw(length, width), rope))]
    selected = None
    if ratio == OVERLAP_RATIO:
        index_heads, index_width = fields["index_n_heads"], fields["index_head_dim"]
        weights = draw(length, index_heads).float()
        select = partial(
            kernels.select_entries,
            IndexQueries(draw(length, index_heads, index_width), weights, rope, plan),
            draw(layout.seq_len // ratio, index_width),
            topk=fields["index_topk"],
        )
        selected = select()
        found.append(measure("index choice", select))
    q, raw = draw(length, heads, width), draw(length + window - 1, width)
    entries, sinks = draw(layout.seq_len // ratio if ratio else 0, width), draw(heads)[0]
    leaves = [leaf.requires_grad_() for leaf in (q, raw, entries, sinks)]
    attend = partial(
        kernels.attend,
        AttentionQueries(q, rope, plan, selected),
        AttentionKeys(raw, entries, sinks),
        AttentionConstants(width**-0.5, fields["rms_norm_eps"], fields["o_groups"]),
    )
    found.append(measure("attention forward", attend))
    out = attend()
    backward = partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)
    return [*found, measure("attention backward", backward)]


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
