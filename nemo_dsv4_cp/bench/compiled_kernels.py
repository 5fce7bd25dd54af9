# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels at the sizes of the published models, compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch

from nemo_dsv4_cp.bench.kernel_model import Estimate, estimate
from nemo_dsv4_cp.gpus import SHARED_MEMORY
from nemo_dsv4_cp.kernels.operations import (
    ALL_ENTRIES,
    CANDIDATES,
    INSIDE,
    attend,
    attention_tensors,
    indexer_loss,
    selection,
    shared_selection,
)
from nemo_dsv4_cp.kernels.triton import TritonKernels, tiles
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from nemo_dsv4_cp.tools.ahead import Compiled, Launch, Specimen, compile_kernel, record
from nemo_dsv4_cp.tools.sizes import read_model_fields

ARCHITECTURES = tuple(n for n, most in SHARED_MEMORY.items() if most >= tiles.SHARED_MEMORY)
"""Capabilities of CUDA devices that the kernels take, times 10: A100; H100, H200; B200; B300."""

REFUSED = tuple(n for n in SHARED_MEMORY if n not in ARCHITECTURES)
"""Those whose blocks have too little shared memory: A40; L40S; RTX PRO 6000."""

FORWARD, BACKWARD, LONG_ROWS = "forward", "backward", "1M tokens"
SPARSE_LOSS, FULL_LOSS = "indexer loss", "indexer loss, full"
_WORKSPACE = ContextParallelOptions().workspace_bytes


@dataclass(frozen=True)
class LayerPass:
    """One pass of a layer on the last rank of 128K tokens on 8: its launches.

    Attributes:
        direction: ``"forward"`` or ``"backward"``; the indexer's loss with its gradients alone,
            in one of its modes; or ``"1M tokens"``, top-k selection alone on the last of 64 ranks,
            whose rows are the longest.
    """

    ratio: int
    direction: str
    plan: AttentionPlan
    launches: Sequence[Launch]


def passes_of(model: str, arch: int, dtype: torch.dtype = torch.bfloat16) -> list[LayerPass]:
    """Record what the layers of one of ``sizes.MODELS`` launch, and the indexer's loss.

    Raises:
        RuntimeError: If triton is interpreting.
    """
    sizes = SimpleNamespace(**read_model_fields(model))
    found = []
    for ratio in (0, 4, 128):
        plan = _plan(sizes, ratio, 131_072, 8)
        found += record_layer(sizes, plan, arch, dtype)
        if ratio == OVERLAP_RATIO:
            found += record_losses(sizes, plan, arch, dtype)
    plan = _plan(sizes, OVERLAP_RATIO, 1 << 20, 64)
    launches = record(partial(_select, sizes, plan, dtype), arch)
    return [*found, LayerPass(OVERLAP_RATIO, LONG_ROWS, plan, launches)]


V41_FLASH = "v41_flash"
_V41_SIZES = SimpleNamespace(
    num_attention_heads=64,
    head_dim=512,
    o_groups=8,
    sliding_window=128,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=512,
    candidate_topk_blocks=2048,
    candidate_block_size=8,
)
"""Of DeepSeek-V4.1-Flash."""

_SELECTIONS = {0: (), 2: (ALL_ENTRIES,), 1: (CANDIDATES, INSIDE)}
"""How the layers of a ratio select."""


def passes_of_v41(arch: int, dtype: torch.dtype = torch.bfloat16) -> list[LayerPass]:
    """Record what the layers of V4.1-Flash launch, one kind of selection after the other."""
    found = []
    for ratio in _SELECTIONS:
        found += record_v41_layer(_plan(_V41_SIZES, ratio, 131_072, 8), arch, dtype)
    for ratio, kinds in _SELECTIONS.items():
        plan = _plan(_V41_SIZES, ratio, 1 << 20, 64)
        for kind in kinds:
            select = partial(_select_v41, plan, dtype, kind)
            found.append(LayerPass(ratio, LONG_ROWS, plan, record(select, arch)))
    return found


def record_v41_layer(plan: AttentionPlan, arch: int, dtype: torch.dtype) -> list[LayerPass]:
    """Record the kernels of V4.1-Flash's layers of a ratio, forward and backward."""
    outs: list[torch.Tensor] = []

    def forward() -> None:
        for kind in _SELECTIONS[plan.ratio]:
            _select_v41(plan, dtype, kind)
        outs.append(_attend_v41(plan, dtype))

    def backward() -> None:
        outs[0].backward(torch.empty_like(outs[0]))

    launches = [record(forward, arch), record(backward, arch)]
    directions = zip((FORWARD, BACKWARD), launches, strict=True)
    return [LayerPass(plan.ratio, direction, plan, each) for direction, each in directions]


def _attend_v41(plan: AttentionPlan, dtype: torch.dtype) -> torch.Tensor:
    q, *keys, _ = attention_tensors(_V41_SIZES, plan, partial(torch.empty, dtype=dtype))
    rows, length = q.shape[:2]
    selected, entries = None, keys[1].shape[1]
    if plan.ratio:
        n_selected = min(_V41_SIZES.index_topk, entries)
        selected = torch.empty(rows, length, n_selected, dtype=torch.int32)
    keys = [each.requires_grad_() for each in keys]
    sinks = torch.empty(_V41_SIZES.num_attention_heads, requires_grad=True)
    angles = (torch.empty(1, length, 64),) * 2
    tensors = q.requires_grad_(), *keys, sinks
    kernels = TritonKernels(workspace_bytes=_WORKSPACE)
    return attend(kernels, _V41_SIZES, plan, angles, selected, *tensors, normed=False)


def _select_v41(plan: AttentionPlan, dtype: torch.dtype, kind: str) -> None:
    layout, candidates = plan.queries.layout, None
    if kind == INSIDE:
        blocks = layout.longest_document // plan.ratio // _V41_SIZES.candidate_block_size
        n_candidates = min(_V41_SIZES.candidate_topk_blocks, blocks)
        candidates = torch.empty(layout.rows, layout.local_len, n_candidates, dtype=torch.int32)
    shared_selection(
        TritonKernels(workspace_bytes=_WORKSPACE),
        _V41_SIZES,
        plan,
        partial(torch.empty, dtype=dtype),
        candidates,
        chooses=kind != ALL_ENTRIES,
    )()


def _plan(sizes: Any, ratio: int, seq_len: int, ranks: int) -> AttentionPlan:
    layout = SequenceLayout(seq_len // ranks, ranks - 1, ranks)
    return AttentionPlan(Queries.own(layout), sizes.sliding_window, ratio)


def record_layer(sizes: Any, plan: AttentionPlan, arch: int, dtype: torch.dtype) -> list[LayerPass]:
    """Record a layer's kernels, forward and backward, on tensors that nothing reads."""
    outs: list[torch.Tensor] = []

    def forward() -> None:
        if plan.ratio == OVERLAP_RATIO:
            _select(sizes, plan, dtype)
        outs.append(_attend(sizes, plan, dtype))

    def backward() -> None:
        outs[0].backward(torch.empty_like(outs[0]))

    launches = [record(forward, arch), record(backward, arch)]
    directions = zip((FORWARD, BACKWARD), launches, strict=True)
    return [LayerPass(plan.ratio, direction, plan, each) for direction, each in directions]


def record_losses(
    sizes: Any, plan: AttentionPlan, arch: int, dtype: torch.dtype
) -> list[LayerPass]:
    """Record the kernels of the indexer's loss in both modes, on tensors that nothing reads."""
    return [
        LayerPass(plan.ratio, way, plan, record(partial(_compare, sizes, plan, dtype, way), arch))
        for way in (SPARSE_LOSS, FULL_LOSS)
    ]


def _compare(sizes: Any, plan: AttentionPlan, dtype: torch.dtype, direction: str) -> None:
    empty, layout = partial(torch.empty, dtype=dtype), plan.queries.layout
    rope = (empty(1, layout.local_len, sizes.qk_rope_head_dim),) * 2
    n_selected = min(sizes.index_topk, layout.seq_len // plan.ratio)
    selected = torch.empty(layout.rows, layout.local_len, n_selected, dtype=torch.int32)
    kernels, full = TritonKernels(workspace_bytes=_WORKSPACE), direction == FULL_LOSS
    indexer_loss(kernels, sizes, plan, rope, selected, empty, full=full)()


def _attend(sizes: Any, plan: AttentionPlan, dtype: torch.dtype) -> torch.Tensor:
    length, empty = plan.queries.layout.local_len, partial(torch.empty, dtype=dtype)
    q, raw, entries, _ = attention_tensors(sizes, plan, empty)
    kernels = TritonKernels(workspace_bytes=_WORKSPACE)
    rotary, selected = sizes.qk_rope_head_dim, None
    raw = kernels.rotate(raw, (empty(1, raw.shape[1], rotary),) * 2)
    if plan.ratio == OVERLAP_RATIO:
        n_selected = min(sizes.index_topk, entries.shape[1])
        selected = torch.empty(1, length, n_selected, dtype=torch.int32)
    sinks, rope = torch.empty(sizes.num_attention_heads), (empty(1, length, rotary),) * 2
    return attend(kernels, sizes, plan, rope, selected, q.requires_grad_(), raw, entries, sinks)


def _select(sizes: Any, plan: AttentionPlan, dtype: torch.dtype) -> None:
    empty = partial(torch.empty, dtype=dtype)
    rope = (empty(1, plan.queries.layout.local_len, sizes.qk_rope_head_dim),) * 2
    selection(TritonKernels(workspace_bytes=_WORKSPACE), sizes, plan, rope, empty)()


def kernels_of(model: str, arch: int, dtype: torch.dtype = torch.bfloat16) -> list[Specimen]:
    """Return the kernels that a model's layers launch, each kind once.

    Args:
        model: One of ``sizes.MODELS``, or :data:`V41_FLASH`.
        arch: Capability of CUDA devices, times 10.
        dtype: Of the model.
    """
    passes = passes_of_v41(arch, dtype) if model == V41_FLASH else passes_of(model, arch, dtype)
    return _specimens(passes)


def _specimens(passes: Sequence[LayerPass]) -> list[Specimen]:
    found: list[Specimen] = []
    for each in passes:
        for launch in each.launches:
            if launch.specimen not in found:
                found.append(launch.specimen)
    return found


@dataclass(frozen=True)
class Modelled:
    """A kernel of a model, compiled, with its time in each pass of a layer that launches it."""

    model: str
    compiled: Compiled
    estimates: dict[tuple[int, str], Estimate]

    @property
    def longest(self) -> Estimate:
        """Its time in the pass of 128K tokens where that is longest, or else of 1M."""
        short = [each for (_, way), each in self.estimates.items() if way != LONG_ROWS]
        return max(short or self.estimates.values(), key=lambda each: each.ms)


def compile_all(models: Sequence[str], archs: Sequence[int]) -> Iterator[Modelled]:
    """Compile the kernels of models for architectures, and model their time."""
    for model, arch in product(models, archs):
        sizes = SimpleNamespace(**read_model_fields(model))
        passes = passes_of(model, arch)
        for specimen in _specimens(passes):
            compiled, estimates = compile_kernel(specimen, arch), {}
            for each in passes:
                of_it = [launch for launch in each.launches if launch.specimen == specimen]
                if of_it:
                    layer = each.ratio, each.direction
                    estimates[layer] = estimate(compiled, of_it, each.plan, sizes)
            yield Modelled(model, compiled, estimates)


def figures(kernel: Modelled) -> dict[str, Any]:
    """Return a row of ``bench kernels --json``."""
    compiled = kernel.compiled
    return {
        "kernel": compiled.kernel,
        "model": kernel.model,
        "arch": compiled.arch,
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "limit": SHARED_MEMORY[compiled.arch],
        "tensor_core": compiled.tensor_core,
        "issued_over_needed": compiled.issued_over_needed,
        "modelled_ms": kernel.longest.ms,
    }


def layer_times(kernels: Sequence[Modelled]) -> dict[tuple[str, int, int, str], float]:
    """Return the modelled ms of all kernels of a layer, by model, arch, ratio and direction."""
    sums: dict[tuple[str, int, int, str], float] = {}
    for kernel in kernels:
        for (ratio, direction), each in kernel.estimates.items():
            if direction != LONG_ROWS:
                layer = kernel.model, kernel.compiled.arch, ratio, direction
                sums[layer] = sums.get(layer, 0.0) + each.ms
    return sums
