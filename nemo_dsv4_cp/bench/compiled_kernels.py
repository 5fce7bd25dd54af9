# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels at the sizes of the published models, compiled without a GPU."""

# L local queries   N heads   D head_dim   r rotary dims   T raw keys   P entries
# K selected entries

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    IndexQueries,
)
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


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(1, *shape, dtype=torch.bfloat16)


def _attention(fields: dict[str, Any], ratio: int) -> None:
    """Run a layer's attention forward and backward on the last shard of 8K tokens."""
    layout = SequenceLayout(_SHARD, 127, 128)
    heads, width, rotary = (
        fields[name] for name in ("num_attention_heads", "head_dim", "qk_rope_head_dim")
    )
    window = fields["sliding_window"]
    n_raw = _SHARD + window - 1
    entries = layout.seq_len // ratio if ratio else 0
    selected = None
    if ratio == 4:
        selected = torch.zeros(1, _SHARD, fields["index_topk"], dtype=torch.int32)
    kernels = TritonKernels(workspace_bytes=_WORKSPACE)
    raw = kernels.rotate(_zeros(n_raw, width), (_zeros(n_raw, rotary),) * 2)
    out = kernels.attend(
        AttentionQueries(
            _zeros(_SHARD, heads, width).requires_grad_(),
            (_zeros(_SHARD, rotary),) * 2,
            AttentionPlan(Queries.own(layout), window, ratio),
            selected,
        ),
        AttentionKeys(raw, _zeros(entries, width), torch.zeros(heads)),
        AttentionConstants(width**-0.5, fields["rms_norm_eps"], fields["o_groups"]),
    )
    out.backward(torch.zeros_like(out))


def _selection(fields: dict[str, Any]) -> None:
    """Run top-k selection on the last shard of 1M tokens."""
    layout = SequenceLayout(_SHARD, (1 << 14) - 1, 1 << 14)
    heads, width = fields["index_n_heads"], fields["index_head_dim"]
    queries = IndexQueries(
        _zeros(_SHARD, heads, width),
        torch.zeros(1, _SHARD, heads),
        (_zeros(_SHARD, fields["qk_rope_head_dim"]),) * 2,
        AttentionPlan(Queries.own(layout), fields["sliding_window"], 4),
    )
    TritonKernels(workspace_bytes=_WORKSPACE).select_entries(
        queries, _zeros(layout.seq_len // 4, width), topk=fields["index_topk"]
    )


def kernels_of(model: str, arch: int) -> list[Specimen]:
    """Return the kernels that the layers of one of ``sizes.MODELS`` launch, each kind once.

    Args:
        model: Its name.
        arch: One of :data:`ARCHITECTURES`.

    Raises:
        RuntimeError: If triton is interpreting.
    """
    fields = read_model_fields(model)
    found: list[Specimen] = []
    for run in (
        *(partial(_attention, fields, ratio) for ratio in (0, 4, 128)),
        partial(_selection, fields),
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
