# SPDX-License-Identifier: Apache-2.0
"""One attention layer of V4.1-Flash as a rank of a context-parallel group would run it.

V4-Flash's is in :mod:`nemo_dsv4_cp.bench.layer`.
"""

# B batch rows   L local tokens   E hidden   S global tokens   P compressed entries (S / ratio)
# D head_dim   F index width   K selected entries   M candidate blocks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4GroupedLinear
from nemo_automodel.components.models.deepseek_v41 import attention as automodels
from nemo_automodel.components.models.deepseek_v41.attention import (
    DeepseekV41Attention,
    DeepseekV41AttentionState,
)

from nemo_dsv4_cp import DeepseekV41ContextParallelConfig
from nemo_dsv4_cp.attention.gradient_sum import summing_gradients
from nemo_dsv4_cp.attention.layer_v41 import (
    ContextParallelAttentionV41,
    SharedState,
    document_alignment,
)
from nemo_dsv4_cp.attention.step import StepContext
from nemo_dsv4_cp.bench.layer import Case, Forward, Output, default_dtype
from nemo_dsv4_cp.sequence.plan import NOTHING
from nemo_dsv4_cp.tools.crossings import AUTOMODEL


def cases(
    paths: Sequence[str],
    layers: Sequence[int],
    seq_len: int,
    cp_size: int,
    rank: int,
    **options: Any,
) -> list[Case]:
    """Return the measurements of some layers by some paths.

    Raises:
        ValueError: If V4.1-Flash has no such layer, or shards would cut its compressed entries.
    """
    config = DeepseekV41ContextParallelConfig().text_config
    ratios = config.compress_ratios[: config.num_hidden_layers]
    for layer in layers:
        if not 0 <= layer < len(ratios):
            raise ValueError(f"layer {layer} is none of V4.1-Flash's; use 0 to {len(ratios) - 1}")
    multiple = document_alignment(config) * cp_size
    if seq_len < 1 or seq_len % multiple:
        working = max(-(-seq_len // multiple), 1) * multiple
        raise ValueError(
            f"seq_len={seq_len} does not cut into {cp_size} shards of a multiple of "
            f"{multiple // cp_size} tokens; use {working}"
        )
    starts = options.get("documents", ())  # AutoModel pads documents so that they begin there
    starts = dict.fromkeys(start - start % document_alignment(config) for start in starts)
    options["documents"] = tuple(starts)
    return [
        Case(path, ratios[layer], seq_len, cp_size, rank, **options, layer=layer)
        for layer in layers
        for path in paths
    ]


def build(
    case: Case,
    group: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn: str = "sdpa",
    **sizes: Any,
) -> Forward:
    """Build the layer, its input and the state that the layer before it hands on.

    The input, the state's entries, and all parameters but the indexer's take gradients.
    ``attn`` is AutoModel's attention backend, ``sizes`` the fields of the text config that differ
    from V4.1-Flash.
    """
    assert case.layer is not None
    config = DeepseekV41ContextParallelConfig(text_config=sizes, context_parallel=case.options)
    text, options, length = config.text_config, config.context_parallel, case.layout.local_len
    text.torch_dtype = dtype
    backend = BackendConfig(attn=attn, linear="torch", rms_norm="torch_fp32")
    # AutoModel's constructor converts this module to the dtype, which fake parameters refuse.
    as_is = mock.patch.object(DeepseekV4GroupedLinear, "to", lambda module, **_: module)
    with default_dtype(dtype), device, as_is:
        layer = DeepseekV41Attention(text, case.layer, backend).train()
    with device:
        hidden = torch.randn(case.batch, length, text.hidden_size, dtype=dtype).requires_grad_()
        positions = case.layout.positions(device).expand(case.batch, -1)
    if case.path == AUTOMODEL:
        layer.cp_group = group
        state: Any = _automodels_state(case, text, dtype, device)
    else:
        ContextParallelAttentionV41.adopt(layer, text, options)
        state = _shared_state(case, text, options, group, dtype, device)
        for kind in (layer.kind, layer.selection_kind):
            state.step.plan(kind, device)

    def forward() -> Output:
        with mock.patch.object(automodels, "torch", _TorchWithoutValues()):
            out = layer(hidden, position_ids=positions, state=state)
        handed = vars(out.state).values()
        return Output(
            out.hidden_states,
            tuple(each for each in handed if isinstance(each, torch.Tensor)),
            sums_gradients=getattr(out.state, "entries_grad", None) is not None,
        )

    return forward


def _shared_state(
    case: Case, text: Any, options: Any, group: Any, dtype: torch.dtype, device: torch.device
) -> SharedState:
    """Return the state before a layer; a source needs nothing of the layers before it."""
    state = SharedState(StepContext(case.layout, group, options))
    if case.layer in text.kv_source_layer_ids or not case.ratio:
        return state
    batch, width = case.batch, case.seq_len // case.ratio
    within = 0 <= text.candidate_source_layer_id < (case.layer or 0)
    with device:
        leaf = torch.randn(batch, width, text.head_dim, dtype=dtype).requires_grad_()
        entries, entries_grad = summing_gradients(leaf)
        blocks = _drawn(case, text.candidate_topk_blocks, case.ratio * text.candidate_block_size)
        return replace(
            state,
            ratio=case.ratio,
            entries_BPD=entries,
            entries_grad=entries_grad,
            index_keys_BPF=torch.randn(batch, width, text.index_head_dim, dtype=dtype),
            selected_BLK=_drawn(case, text.index_topk, case.ratio),
            candidates_BLM=blocks if within else None,
        )


def _automodels_state(
    case: Case, text: Any, dtype: torch.dtype, device: torch.device
) -> DeepseekV41AttentionState:
    """Return the same for AutoModel's layer."""
    if case.layer in text.kv_source_layer_ids or not case.ratio:
        return DeepseekV41AttentionState()
    batch, width = case.batch, case.seq_len // case.ratio
    within = 0 <= text.candidate_source_layer_id < (case.layer or 0)
    with device:
        return DeepseekV41AttentionState(
            compressed_kv=torch.randn(batch, width, text.head_dim, dtype=dtype).requires_grad_(),
            index_keys=torch.randn(batch, width, text.index_head_dim, dtype=dtype),
            topk_indices=_drawn(case, text.index_topk, case.ratio).long(),
            candidates=torch.ones(batch, case.layout.local_len, width, dtype=torch.bool)
            if within
            else None,
            compressed_valid=torch.ones(batch, width, dtype=torch.bool),
            compression_ratio=case.ratio,
        )


def _drawn(case: Case, slots: int, tokens: int) -> torch.Tensor:
    """Draw what each query selected of groups of ``tokens`` before it, int32 [B, L, slots]."""
    seen = (case.layout.positions(torch.get_default_device()).view(1, -1, 1) + 1) // tokens
    drawn = torch.rand(case.batch, case.layout.local_len, slots, dtype=torch.float32) * seen
    return drawn.to(torch.int32).masked_fill_(seen == 0, NOTHING)


class _TorchWithoutValues:
    """torch for AutoModel's checks of positions and padding, which read values: none fails."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def equal(self, *_: torch.Tensor) -> bool:
        return True

    def any(self, *_: torch.Tensor) -> bool:
        return False
