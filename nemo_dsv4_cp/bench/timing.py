# SPDX-License-Identifier: Apache-2.0
"""Wall time of a layer's forward and backward: gloo ranks on the CPU, or one rank on a GPU."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from nemo_dsv4_cp.bench.layer import Case, Forward
from nemo_dsv4_cp.bench.profiling import builder
from nemo_dsv4_cp.checks.certificate import fastest_on_disk
from nemo_dsv4_cp.checks.kernel_choice import TORCH
from nemo_dsv4_cp.exchange.collectives import barrier, lone_last_rank
from nemo_dsv4_cp.tools import local_ranks
from nemo_dsv4_cp.tools.crossings import AUTOMODEL
from nemo_dsv4_cp.tools.sizes import read_model_fields

CPU_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 128,
    "o_lora_rank": 64,
    "o_groups": 2,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 128,
    "torch_dtype": "float32",
}
"""A layer that is small enough for CPU ranks."""
CPU_CANDIDATES = 128
"""Its blocks of candidates in V4.1: 1,024 entries."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one path's forward and backward, one entry per repeat, of the slowest rank.

    Attributes:
        peak_bytes: Most GPU memory allocated, None on a CPU.
    """

    case: Case
    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Return the median of the repeats."""
        return statistics.median(self.seconds)


def describe_machine() -> str:
    """Return what the times were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.machine()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        model = next(line for line in lines if line.startswith("model name")).split(":")[1]
    return f"{model.strip()}, {os.cpu_count()} cores, torch {torch.__version__}"


def automodel_kernels() -> str:
    """Return AutoModel's attention backend on this GPU: ``"tilelang"`` where it is installed."""
    return "tilelang" if find_spec("tilelang") else "sdpa"


def certified_kernels(model: str) -> str:
    """Return what ``kernels: auto`` takes on this GPU for a packaged model, by its certificates.

    Torch if there are none: ``gpu-report`` makes those of V4, and a job's start those of its model.
    """
    fields = read_model_fields(model)
    found = fastest_on_disk(SimpleNamespace(**fields.get("text_config", fields)))
    return found.kernels if found else TORCH


def time_gloo_ranks(cases: list[Case], repeats: int) -> list[Timing]:
    """Time real gloo ranks on this CPU, one thread each, the cases in turn (float32).

    The cases are those of a layer, one of each path; each runs once before the repeats that count.
    """
    seconds = local_ranks.run(_gloo_rank, cases[0].cp_size, cases, repeats)
    return [Timing(case, tuple(seconds[case.path])) for case in cases]


def _gloo_rank(group: Any, rank: int, cases: list[Case], repeats: int) -> dict[str, list[float]]:
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), **CPU_SIZES}
    if cases[0].layer is not None:
        on_cpu |= {"candidate_topk_blocks": CPU_CANDIDATES}
    forwards = {
        case.path: builder(case)(replace(case, rank=rank), group, **on_cpu) for case in cases
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats + 1):
        for path, forward in forwards.items():
            barrier(group)
            begin = time.perf_counter()
            _step(forward)
            barrier(group)
            seconds[path].append(time.perf_counter() - begin)
    return {path: of_path[1:] for path, of_path in seconds.items()}  # the first warms up


def time_one_gpu_rank(cases: list[Case], repeats: int) -> list[Timing]:
    """Time the cases' rank alone on this GPU, sizes of V4-Flash or V4.1-Flash, bfloat16.

    Collectives of its fake process group return at once with whatever memory held, so only
    computing is timed.
    """
    timings = []
    with lone_last_rank(cases[0].cp_size) as group:
        for case in cases:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            forward = builder(case)(
                case,
                group,
                dtype=torch.bfloat16,
                device=torch.device("cuda"),
                attn=automodel_kernels() if case.path == AUTOMODEL else "sdpa",
            )
            seconds = tuple(_cuda_seconds(forward) for _ in range(repeats + 1))
            timings.append(Timing(case, seconds[1:], torch.cuda.max_memory_allocated()))
            del forward
    return timings


def _step(forward: Forward) -> None:
    out = forward().hidden_BLE
    out.backward(torch.ones_like(out))


def _cuda_seconds(forward: Forward) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    _step(forward)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
