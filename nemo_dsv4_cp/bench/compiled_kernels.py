# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels at the sizes of the published models, compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch

from nemo_dsv4_cp.kernels.operations import attend, attention_tensors, selection
from nemo_dsv4_cp.kernels.triton import TritonKernels
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from nemo_dsv4_cp.tools.ahead import Specimen, compile_kernel, record
from nemo_dsv4_cp.tools.sizes import read_model_fields

ARCHITECTURES = (80, 90, 100)
"""Capabilities of CUDA devices, times 10: A100; H100 and H200; B200."""

_SHARD = 64
_WORKSPACE = 1 << 30
_zeros = partial(torch.zeros, dtype=torch.bfloat16)


def _plan(sizes: Any, ratio: int, ranks: int) -> AttentionPlan:
    layout = SequenceLayout(_SHARD, ranks - 1, ranks)
    return AttentionPlan(Queries.own(layout), sizes.sliding_window, ratio)


def _attention(sizes: Any, ratio: int) -> None:
    """Run a layer's attention forward and backward on the last shard of 8K tokens."""
    plan, rotary = _plan(sizes, ratio, 128), sizes.qk_rope_head_dim
    q, raw, entries, _ = attention_tensors(sizes, plan, _zeros)
    kernels = TritonKernels(workspace_bytes=_WORKSPACE)
    raw = kernels.rotate(raw, (_zeros(1, raw.shape[1], rotary),) * 2)
    selected = torch.zeros(1, _SHARD, sizes.index_topk, dtype=torch.int32) if ratio == 4 else None
    sinks, rope = torch.zeros(sizes.num_attention_heads), (_zeros(1, _SHARD, rotary),) * 2
    out = attend(kernels, sizes, plan, rope, selected, q.requires_grad_(), raw, entries, sinks)
    out.backward(torch.zeros_like(out))


def _selection(sizes: Any) -> None:
    """Run top-k selection on the last shard of 1M tokens."""
    rope = (_zeros(1, _SHARD, sizes.qk_rope_head_dim),) * 2
    kernels = TritonKernels(workspace_bytes=_WORKSPACE)
    selection(kernels, sizes, _plan(sizes, 4, 1 << 14), rope, _zeros)()


def kernels_of(model: str, arch: int) -> list[Specimen]:
    """Return the kernels that the layers of one of ``sizes.MODELS`` launch, each kind once.

    Raises:
        RuntimeError: If triton is interpreting.
    """
    sizes = SimpleNamespace(**read_model_fields(model))
    found: list[Specimen] = []
    for run in (
        *(partial(_attention, sizes, ratio) for ratio in (0, 4, 128)),
        partial(_selection, sizes),
    ):
        found += [specimen for specimen in record(run, arch) if specimen not in found]
    return found


def compile_all(models: Sequence[str], archs: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Compile the kernels of models for architectures, and yield what ``bench kernels`` prints."""
    for model, arch in product(models, archs):
        for specimen in kernels_of(model, arch):
            compiled = asdict(compile_kernel(specimen, arch))
            names = ("arch", "registers", "stack", "shared", "tensor_core")
            row = {"kernel": compiled["kernel"], "model": model}
            yield row | {name: compiled[name] for name in names}
